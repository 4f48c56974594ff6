"""Slow and greedy clients against a real server; a good client must not feel them."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from logitstore_server.settings import ServerSettings
from tests.server_security.live import BIG_BYTES, Live, running

HEAD = b"GET /v1/stores/a/ping HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/stores/a/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"

SETTINGS = ServerSettings(
    stores=["a=/a"],
    port=0,
    head_timeout_s=1,
    body_timeout_s=1,
    keep_alive_s=2,
    send_window_s=1.5,
    min_send_bytes_per_s=20_000,
    max_connections=40,
    max_head_bytes=8192,
)
# Far above every deadline, far below "for ever": without the guard these clients are still there.
PATIENCE_S = 20


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(SETTINGS) as live:
        yield live


def dropped(live: Live, reason: str) -> float:
    text = httpx2.get(f"{live.url}/metrics").text
    for line in text.splitlines():
        if line.startswith(f'logitstore_dropped_connections_total{{reason="{reason}"}}'):
            return float(line.split()[-1])
    return 0.0


def until_closed(client: socket.socket, keep_busy: Callable[[], object] = lambda: None) -> bytes:
    """What the server sends before it ends the connection, while the client goes on as it does."""
    client.settimeout(0.2)
    received = b""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            keep_busy()
            block = client.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return received
        if not block:
            return received
        received += block
    raise AssertionError(f"still connected after {PATIENCE_S} s")


def test_a_silent_client_is_dropped(live: Live) -> None:
    before = dropped(live, "head-timeout")
    with live.connect() as client:
        assert until_closed(client) == b""
    assert dropped(live, "head-timeout") == before + 1


def test_a_client_that_stops_in_its_headers_is_dropped(live: Live) -> None:
    with live.connect() as client:
        client.sendall(HEAD)
        assert until_closed(client) == b""


@pytest.mark.parametrize(
    "begin", [b"", HEAD + b"X-Slow: ", b"\r\n"], ids=["request line", "header", "empty lines"]
)
def test_a_client_that_trickles_its_head_is_dropped(live: Live, begin: bytes) -> None:
    with live.connect() as client:
        client.sendall(begin)
        piece = b"\r\n" if begin == b"\r\n" else b"G"
        assert b"200" not in until_closed(client, lambda: client.sendall(piece))


def test_a_client_that_trickles_its_second_head_is_dropped(live: Live) -> None:
    with live.connect() as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        until_closed(client, lambda: client.sendall(b"G"))


def test_a_client_that_trickles_its_body_is_told_and_dropped(live: Live) -> None:
    with live.connect() as client:
        client.sendall(POST)
        received = until_closed(client, lambda: client.sendall(b"x"))
    assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b'"kind": "request-timeout"' in received


def test_a_body_that_nobody_reads_is_limited_too(live: Live) -> None:
    """The answer is sent before the body arrives; the connection must end all the same."""
    with live.connect() as client:
        client.sendall(POST.replace(b"/echo", b"/nothing"))
        received = until_closed(client, lambda: client.sendall(b"x"))
    assert received.startswith(b"HTTP/1.1 404")


def test_an_idle_connection_is_closed(live: Live) -> None:
    with live.connect() as client:
        client.sendall(HEAD + b"\r\n")
        assert until_closed(client).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_too_slowly_is_dropped(live: Live) -> None:
    before = dropped(live, "slow-reader")
    with live.connect(receive_buffer_bytes=4096) as client:
        client.sendall(HEAD.replace(b"ping", b"big") + b"\r\n")
        end_s = time.monotonic() + PATIENCE_S
        while dropped(live, "slow-reader") == before:
            assert time.monotonic() < end_s, "still connected"
            time.sleep(0.2)
            client.recv(10)
        # What the system held for it is gone, too: it would send that for as long as it is read.
        left = 0
        try:
            while block := client.recv(4096):
                left += len(block)
            pytest.fail(f"closed in order, after another {left} bytes")
        except ConnectionResetError:
            assert left < 1 << 16


def test_a_client_that_reads_at_a_fair_pace_gets_everything(live: Live) -> None:
    """It takes longer than the window, with the server's buffer full all the while."""
    with live.connect(receive_buffer_bytes=1 << 16) as client:
        client.sendall(HEAD.replace(b"ping", b"big") + b"Connection: close\r\n\r\n")
        received = 0
        while block := client.recv(1 << 18):
            received += len(block)
            time.sleep(0.01)
    assert received > BIG_BYTES


@pytest.mark.parametrize("piece_bytes", [100, 200_000])
def test_a_huge_head_is_refused(live: Live, piece_bytes: int) -> None:
    with live.connect() as client:
        client.sendall(HEAD)
        header = b"X-Huge: " + b"x" * piece_bytes + b"\r\n"
        sent = b""
        try:
            while len(sent) < 20_000:
                client.sendall(header)
                sent += header
            client.sendall(b"\r\n")
        except OSError:
            pass  # refused before the end
        client.settimeout(PATIENCE_S)
        try:
            received = client.recv(4096)
        except ConnectionResetError:
            received = b"HTTP/1.1 431"  # the answer was lost with the rest of what was sent
    assert received.startswith(b"HTTP/1.1 431")
    assert dropped(live, "head-too-large") >= 1


def test_connections_beyond_the_limit_are_refused_and_the_rest_is_served(live: Live) -> None:
    with httpx2.Client() as good:
        assert good.get(f"{live.url}/v1/stores/a/ping").status_code == 200
        crowd = [live.connect() for _ in range(SETTINGS.max_connections)]
        try:
            crowd[-1].settimeout(PATIENCE_S)
            assert crowd[-1].recv(4096).startswith(b"HTTP/1.1 503")
            assert good.get(f"{live.url}/healthz").status_code == 200
        finally:
            for client in crowd:
                client.close()


def test_a_good_client_does_not_feel_slow_ones(live: Live) -> None:
    """Beside 30 slow clients of all sorts, no request of it fails or waits for a deadline."""

    def latencies_s() -> list[float]:
        found = []
        with httpx2.Client() as good:
            for _ in range(200):
                start_s = time.perf_counter()
                assert good.get(f"{live.url}/v1/stores/a/ping").status_code == 200
                found.append(time.perf_counter() - start_s)
        return found

    alone = latencies_s()
    crowd = [live.connect(receive_buffer_bytes=4096) for _ in range(30)]
    stop = threading.Event()

    def attack() -> None:
        openings = [b"", HEAD, HEAD + b"X: ", POST, HEAD.replace(b"ping", b"big") + b"\r\n"]
        for number, client in enumerate(crowd):
            client.sendall(openings[number % len(openings)])
        while not stop.wait(0.1):
            for number, client in enumerate(crowd):
                try:
                    if number % len(openings) in (2, 3):
                        client.sendall(b"x")
                except OSError:
                    continue  # dropped already

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        attacked = latencies_s()
    finally:
        stop.set()
        attacker.join()
        for client in crowd:
            client.close()
    p99 = [statistics.quantiles(found, n=100)[98] * 1000 for found in (alone, attacked)]
    print(f"p99 of a good client: {p99[0]:.2f} ms alone, {p99[1]:.2f} ms under attack")
    assert max(attacked) < SETTINGS.head_timeout_s
