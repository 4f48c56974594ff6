"""`logitstore serve`: several workers, several stores, and an end in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest

import logitstore.store
from logitstore_cli.commands import serve
from logitstore_cli.main import run
from logitstore_cli.output import Output
from tests import store_push

PROGRAM = [sys.executable, "-c", "from logitstore_cli.main import main; main()", "serve"]


def test_two_workers_serve_two_stores_and_end_on_sigterm(tmp_path):
    store_push.push(str(tmp_path / "one"), "zarr")
    store_push.push(str(tmp_path / "two"), "arrow", seal=False)
    process = subprocess.Popen(
        [
            *PROGRAM,
            *(str(tmp_path / "one"), str(tmp_path / "two")),
            *("--name", "first", "--name", "second", "--port", "0", "--workers", "2"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "LOGITSTORE_SERVER_SHUTDOWN_DELAY_S": "0"},
    )
    try:
        assert process.stdout is not None
        urls = [process.stdout.readline().strip() for _ in range(2)]
        assert [url.rpartition("/")[2] for url in urls] == ["first", "second"]
        with httpx2.Client(transport=httpx2.HTTPTransport(retries=20), timeout=60) as client:
            assert client.get(urls[0].replace("/v1/stores/first", "/readyz")).status_code == 200
        for url, name in zip(urls, ("one", "two"), strict=True):
            with (
                logitstore.store.open(url) as remote,
                logitstore.store.open(tmp_path / name) as disk,
            ):
                assert remote.snapshot == disk.snapshot
                for sample in range(disk.num_samples):
                    np.testing.assert_array_equal(
                        remote.sample(sample)["tokens"], disk.sample(sample)["tokens"]
                    )

        def tag(_: int) -> str:
            # A connection of its own, so that either worker may answer.
            return httpx2.get(f"{urls[1]}/index.json", timeout=60).headers["etag"]

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(tag, range(24)))) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_storage_without_an_answer_does_not_keep_the_start_waiting(tmp_path, monkeypatch, capsys):
    store_push.push(str(tmp_path / "s"), "zarr", shards=1)
    monkeypatch.setattr(serve, "_LOOK_PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        stores = [("here", str(tmp_path / "s")), ("far", "s3://bucket/s"), ("none", "/none")]
        serve._check_stores(Output(), stores)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: far has not answered within 0.5 s"
    assert lines[1].startswith("warning: none cannot be served until this is mended: [not-a-store]")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["none"], "not-a-store"),
        ([], "bad-argument"),
        (["none", "--name", "a", "--name", "b"], "bad-argument"),
        (["none", "--name", "a/b"], "bad-argument"),
        (["STORE", "--host", "0.0.0.0"], "unsafe-bind"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(tmp_path, capsys, arguments, kind):
    store_push.push(str(tmp_path / "s"), "zarr", shards=1)
    places = {"none": str(tmp_path / "none"), "STORE": str(tmp_path / "s")}
    code = run(["serve", *(places.get(word, word) for word in arguments)])
    assert code in (1, 2)
    assert f"[{kind}]" in capsys.readouterr().err
