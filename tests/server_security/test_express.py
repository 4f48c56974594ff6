"""Parts of shard objects by the short way, and files that the kernel sends."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import logitstore.store
from logitstore_server.keys import revoke_key
from logitstore_server.outlet import ZERO_COPY
from logitstore_server.settings import ServerSettings
from tests.server_security.conftest import Keys
from tests.server_security.live import BIG_BYTES, FILE_START, Live, running

KEYS_OWN = ("x-request-id", "date")


@pytest.fixture
def live(settings: ServerSettings) -> Iterator[Live]:
    # Fifty requests in ten seconds.
    with running(settings.model_copy(update={"port": 0, "requests_per_s": 5.0}), toy=False) as live:
        yield live


def ask(client: socket.socket, path: str, *lines: str) -> tuple[int, dict[str, str], bytes]:
    head = "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *lines, "", ""])
    client.sendall(head.encode())
    return answer(client)


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += received(client)
    text, _, body = data.partition(b"\r\n\r\n")
    first, *fields = text.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (field.partition(": ") for field in fields)}
    body = bytearray(body)
    while len(body) < int(headers["content-length"]):
        body += received(client)
    return int(first.split()[1]), headers, bytes(body)


def received(client: socket.socket) -> bytes:
    data = client.recv(1 << 16)
    assert data, "the server closed the connection"
    return data


def log_lines(live: Live, path: str) -> list[dict[str, object]]:
    time.sleep(0.2)
    lines = [json.loads(line) for line in live.log.read_text().splitlines() if line[:1] == "{"]
    return [line for line in lines if line.get("path") == path]


def test_both_ways_answer_alike_and_the_short_one_knows_every_limit(
    live: Live, settings: ServerSettings, keys: Keys
) -> None:
    store = logitstore.store.open(settings.stores[0].location)
    name = store.shards[0].object
    data = Path(settings.stores[0].location, "shards", name).read_bytes()
    path = f"/v1/stores/alpha/shards/{name}"
    bearer = f"Authorization: Bearer {keys.alpha}"
    with live.connect() as client:
        # The first is not plain: neither key nor object has been seen before.
        assert ask(client, path, bearer)[2] == data
        asked = 1
        for start, last in ((0, 0), (7, 100), (len(data) - 9, len(data) + 50)):
            wanted = f"Range: bytes={start}-{last}"
            short = ask(client, path, bearer, wanted)
            long = ask(client, path, bearer, wanted, "X-Not-Plain: 1")
            assert short[2] == long[2] == data[start : last + 1]
            assert short[0] == long[0] == 206
            for key in KEYS_OWN:
                assert short[1].pop(key)
                assert long[1].pop(key)
            assert short[1] == long[1]
            asked += 2
        # Two at once: answered both, in order.
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}\r\nRange: bytes=5-{{}}\r\n\r\n"
        client.sendall((head.format(9) + head.format(99)).encode())
        both = received(client)
        while not both.endswith(data[5:100]):
            both += received(client)
        assert both.count(b"HTTP/1.1 206") == 2
        asked += 2
        plain = (bearer, "Range: bytes=1-2")
        # Refused as by the long way, each of these.
        others = path.replace("alpha", "beta")
        assert ask(client, others, *plain)[0] == 404
        assert ask(client, path, "Range: bytes=1-2")[0] == 401
        assert ask(client, path, bearer, f"Range: bytes={len(data)}-{len(data) + 1}")[0] == 416
        asked += 1
        assert len([line for line in log_lines(live, path) if line["status"] == 206]) == asked - 2
        statuses = [ask(client, path, *plain)[0] for _ in range(50)]
        assert statuses[0] == 206
        assert statuses[-1] == 429
        key_id = keys.alpha.split("_")[1]
        revoke_key(keys.file, key_id)
        assert ask(client, path, *plain)[0] == 401


def test_a_host_name_of_others_is_refused_on_the_short_way(
    live: Live, settings: ServerSettings
) -> None:
    name = logitstore.store.open(settings.stores[2].location).shards[0].object
    path = f"/v1/stores/open/shards/{name}"
    with live.connect() as client:
        assert ask(client, path)[0] == 200
        assert ask(client, path, "Range: bytes=0-1")[0] == 206
        client.sendall(
            f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nRange: bytes=0-1\r\n\r\n".encode()
        )
        assert answer(client)[0] == 421


FILES = ServerSettings(
    stores=["a=/a"], port=0, send_window_s=1, min_send_bytes_per_s=20_000, max_connections=40
)


@pytest.fixture(scope="module")
def files() -> Iterator[Live]:
    with running(FILES) as live:
        yield live


def test_a_file_arrives_whole_however_it_is_read(files: Live) -> None:
    with files.connect(receive_buffer_bytes=4096) as client:
        for _ in range(2):
            status, _, body = ask(client, "/v1/stores/a/file/")
            assert status == 200
            assert body[: len(FILE_START)] == FILE_START
            assert body[len(FILE_START) :] == bytes(BIG_BYTES - len(FILE_START))


def test_who_does_not_take_a_file_is_dropped_and_who_leaves_is_forgotten(files: Live) -> None:
    with files.connect(receive_buffer_bytes=4096) as slow:
        slow.sendall(b"GET /v1/stores/a/file/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(5):
            with files.connect(receive_buffer_bytes=4096) as leaver:
                leaver.sendall(b"GET /v1/stores/a/file/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert leaver.recv(100)
        until_s = time.monotonic() + 20
        dropped = 'logitstore_dropped_connections_total{reason="slow-reader"} 1.0'
        with files.connect() as client:
            text = ""
            while dropped not in text or "logitstore_connections 1.0" not in text:
                assert time.monotonic() < until_s, text
                text = ask(client, "/metrics")[2].decode()
                time.sleep(0.1)
    assert ZERO_COPY not in files.log.read_text()  # nothing failed
    assert "Exception" not in files.log.read_text()
