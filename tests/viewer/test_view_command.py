"""`logitstore view`: an address on loopback that answers until it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from logitstore import store
from logitstore_cli.commands import view
from logitstore_cli.main import run
from logitstore_server.viewer import viewer_app
from tests import store_push
from tests.viewer.viewed import push


def test_view_prints_its_address_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    place = tmp_path / "a b<c>"
    push(place, "topk:4")
    code = "from logitstore_cli.main import main; main()"
    command = [sys.executable, "-c", code, "view", str(place), "--port", "0", "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            assert address.endswith("/stores/a%20b%3Cc%3E/overview")
            with urllib.request.urlopen(address) as answer:
                assert "Distributions" in answer.read().decode()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (0, 130, -signal.SIGINT), said
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = push(tmp_path / "st", "topk:4")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["view", str(place), "--port", str(port), "--no-browser"]) == 1
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said
    assert "--port 0" in said


def test_stores_of_one_name_get_numbers(tmp_path: Path) -> None:
    for parent in "ab":
        os.mkdir(tmp_path / parent)
        push(tmp_path / parent / "st", "topk:4")
    opened = view.OpenedStores((str(tmp_path / "a" / "st"), f"{tmp_path}/b/st/"))
    assert list(opened) == ["st", "st-2"]
    opened.close()


def test_names_are_such_that_a_browser_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bytes that are no UTF-8 reach Python as lone surrogates.
    for name in ("inside", "bad\udcff"):
        push(tmp_path / name, "topk:4")
    monkeypatch.chdir(tmp_path / "inside")
    opened = view.OpenedStores((".", "../inside/", str(tmp_path / "bad\udcff")))
    assert list(opened) == ["inside", "inside-2", "bad?"]
    client = TestClient(viewer_app(opened))
    for path in ("/", "/stores.json", "/stores/bad%3F/overview", "/stores/bad%3F/samples/0.json"):
        assert client.get(path).status_code == 200, path
    opened.close()


def test_a_store_that_grows_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "st")
    writer = store.create(place, store_push.header(), store_push.tables())
    planned = writer.add_plan(store_push.plan(writer.header, 2))
    store_push.commit_shard(writer, planned, planned.shards[0].shard)
    opened = view.OpenedStores((place,))
    first = opened["st"]
    monkeypatch.setattr(view, "MAX_AGE_S", 0.0)
    assert opened["st"] is first
    store_push.commit_shard(writer, planned, planned.shards[1].shard)
    assert [len(first.shards), len(opened["st"].shards)] == [1, 2]
    opened.close()
    first.close()
    writer.close()
