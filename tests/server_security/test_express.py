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
from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.conftest import Keys
from tests.server_security.live import BIG_BYTES, FILE_START, Live, running

HEADERS_OWN = ("x-request-id", "date")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def live(entries: tuple[StoreEntry, ...], keys: Keys) -> Iterator[Live]:
    # Fifty requests of each key in ten seconds.
    settings = ServerSettings(
        stores=entries, keys_file=keys.file, port=0, requests_per_s=5.0, keep_alive_s=3
    )
    with running(settings, toy=False) as live:
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


def log_lines(live: Live, path: str, key: str) -> list[dict[str, object]]:
    """Those of requests for the path with that key."""
    time.sleep(0.2)
    lines = [json.loads(line) for line in live.log.read_text().splitlines() if line[:1] == "{"]
    client = f"key:{key.split('_')[1]}"
    return [line for line in lines if line.get("path") == path and line["client"] == client]


def test_both_ways_answer_alike_and_the_short_one_knows_every_limit(
    live: Live, entries: tuple[StoreEntry, ...], keys: Keys
) -> None:
    store = logitstore.store.open(entries[0].location)
    name = store.shards[0].object
    data = Path(entries[0].location, "shards", name).read_bytes()
    path = f"/v1/stores/alpha/shards/{name}"
    key = keys.add("alpha")
    bearer = f"Authorization: Bearer {key}"
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
            for header in HEADERS_OWN:
                assert short[1].pop(header)
                assert long[1].pop(header)
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
        lines = log_lines(live, path, key)
        assert len([line for line in lines if line["status"] == 206]) == asked - 2
        statuses = [ask(client, path, *plain)[0] for _ in range(50)]
        assert statuses[0] == 206
        assert statuses[-1] == 429
        revoke_key(keys.file, key.split("_")[1])
        assert ask(client, path, *plain)[0] == 401


def test_what_is_not_plain_takes_the_long_way(
    live: Live, entries: tuple[StoreEntry, ...], keys: Keys
) -> None:
    """What the short way sends leaves in one go, so nothing follows its first byte."""
    name = logitstore.store.open(entries[0].location).shards[0].object
    path = f"/v1/stores/alpha/shards/{name}"
    bearer = f"Authorization: Bearer {keys.alpha}"
    part = "Range: bytes=1-2"
    with live.connect() as client:
        assert ask(client, path, bearer)[0] == 200
        for lines in (
            (bearer, part),
            (part.lower(), "Accept: */*", bearer.replace("Auth", "auth")),
        ):
            assert ask(client, path, *lines)[0] == 206
        assert [line["stream_s"] for line in log_lines(live, path, keys.alpha)[1:]] == [0, 0]
        for lines in (
            (bearer, part, "X-Other: 1"),
            (bearer, part, "Content-Length: 0"),
            (bearer, part, "Host: localhost"),
            (bearer, part, part),
            (bearer, part.upper().replace("BYTES", "bytes")),
            (bearer, part.replace(": ", ":")),
            (bearer, part.replace("1-2", "1-")),
            (bearer, part.replace("1-2", "1-2, 4-5")),
            (bearer, part, "Accept: a\tb"),
            (bearer, f"X-{part}"),
        ):
            ask(client, path, *lines)
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}\r\n{part}\r\n\r\n"
        client.sendall(head[:100].encode())
        time.sleep(0.2)
        client.sendall(head[100:].encode())
        assert answer(client)[0] == 206
        assert ask(client, f"{path}?", bearer, part)[0] == 206
        with live.connect() as other:
            other.sendall(head.replace(part, f"\r\n{part}")[:-2].encode())
            assert answer(other)[0] == 400
        long = log_lines(live, path, keys.alpha)[3:]
        assert len(long) == 12  # all but that with two hosts, which is nobody's
        assert 0 not in [line["stream_s"] for line in long]
        # The next is plain again.
        assert ask(client, path, bearer, part)[2] == ask(client, path, bearer, part)[2]
        assert [line["stream_s"] for line in log_lines(live, path, keys.alpha)[15:]] == [0, 0]


def test_a_connection_of_several_callers_shows_each_what_is_theirs(
    live: Live, entries: tuple[StoreEntry, ...], keys: Keys
) -> None:
    """As a proxy's does."""
    name = logitstore.store.open(entries[1].location).shards[0].object
    path = f"/v1/stores/beta/shards/{name}"
    part = "Range: bytes=1-2"
    wrong = keys.all[:-1] + ("a" if keys.all[-1] != "a" else "b")
    with live.connect() as client:
        for _ in range(3):
            assert ask(client, path, f"Authorization: Bearer {keys.all}", part)[0] == 206
            assert ask(client, path, f"Authorization: Bearer {keys.alpha}", part)[0] == 404
            assert ask(client, path, f"Authorization: Bearer {wrong}", part)[0] == 401
            assert ask(client, path, part)[0] == 401
    assert [line["status"] for line in log_lines(live, path, keys.all)] == [206] * 3


def test_a_host_name_of_others_is_refused_and_an_idle_client_dropped_on_the_short_way(
    live: Live, entries: tuple[StoreEntry, ...]
) -> None:
    name = logitstore.store.open(entries[2].location).shards[0].object
    path = f"/v1/stores/open/shards/{name}"
    with live.connect() as client:
        assert ask(client, path)[0] == 200
        assert ask(client, path, "Range: bytes=0-1")[0] == 206
        client.sendall(
            f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nRange: bytes=0-1\r\n\r\n".encode()
        )
        assert answer(client)[0] == 421
        assert ask(client, path, "Range: bytes=0-1")[0] == 206
        assert client.recv(1) == b""  # after keep_alive_s


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
