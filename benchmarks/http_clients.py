"""Clients of the HTTP benchmark. Each function runs in a process of its own, on one core.

The raw client writes requests to sockets and reads answers into one reused buffer, so that what is
measured is the server. The other one is obstore, which our reader uses.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

__all__ = ["Answers", "Range", "client", "download", "drain", "obstore_ranges", "sha256_of"]

# (path, first byte, byte after the last); the whole file without bounds.
Range = tuple[str, int, int] | tuple[str]
_BUFFER_BYTES = 1 << 20
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Answers:
    """What one run of requests took.

    Attributes:
        seconds: from the first request to the last byte.
        cpu_s: of this process meanwhile.
        requests, body_bytes: how many, how long in all.
        first_byte_s: of each request, from sending it to the first byte of its answer.
    """

    seconds: float
    cpu_s: float
    requests: int
    body_bytes: int
    first_byte_s: list[float]


def client(core: int) -> ProcessPoolExecutor:
    """One process on that core, to submit the functions of this module to."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_pin, initargs=(core,))


def _pin(core: int) -> None:
    os.sched_setaffinity(0, {core})


def download(
    port: int, requests: Sequence[Range], streams: int, headers: Mapping[str, str]
) -> Answers:
    """Send the requests over so many connections, the next one where an answer has ended."""
    waiting = iter(requests)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connections = [_Connection(port, waiting, lines) for _ in range(streams)]
    selector = selectors.DefaultSelector()
    for each in connections:
        selector.register(each.socket, selectors.EVENT_READ, each)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    cpu, start = time.process_time(), time.perf_counter()
    busy = {each for each in connections if each.ask()}
    only = connections[0] if streams == 1 else None
    while busy:
        # A single connection needs nobody to say which one can be read: one system call, not two.
        ready = [only] if only else [key.data for key, _ in selector.select(_TIMEOUT_S)]
        for each in ready:
            if each in busy and not each.read(buffer):
                busy.discard(each)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    selector.close()
    for each in connections:
        each.socket.close()
    first = [value for each in connections for value in each.first_byte_s]
    return Answers(seconds, cpu_s, len(first), sum(each.bytes for each in connections), first)


class _Connection:
    """One kept connection, with the answer that it waits for."""

    def __init__(self, port: int, waiting: Iterator[Range], lines: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), _TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.bytes = 0
        self.first_byte_s: list[float] = []
        self._waiting, self._lines = waiting, lines
        self._left = 0
        self._head: bytearray | None = None

    def ask(self) -> bool:
        """Send the next request; False when there is none."""
        request = next(self._waiting, None)
        if request is None:
            return False
        part = f"Range: bytes={request[1]}-{request[2] - 1}\r\n" if len(request) == 3 else ""
        self._head = bytearray()
        self._status = b" 206 " if part else b" 200 "
        text = f"GET {request[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._lines}{part}\r\n"
        self._asked_s = time.perf_counter()
        self.socket.sendall(text.encode())
        return True

    def read(self, buffer: memoryview) -> bool:
        """Take what has arrived; False when there is nothing more to ask for."""
        count = self.socket.recv_into(buffer)
        if not count:
            raise ConnectionError("the server closed the connection")
        if self._head is not None:
            count = self._read_head(buffer[:count])
        self._left -= count
        self.bytes += count
        return True if self._head is not None or self._left else self.ask()

    def _read_head(self, data: memoryview) -> int:
        """Bytes of the body in `data`, behind the head."""
        assert self._head is not None
        if not self._head:
            self.first_byte_s.append(time.perf_counter() - self._asked_s)
        before = len(self._head)
        self._head += data[: 16 << 10]
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return 0
        head = bytes(self._head[:end]).lower()
        line = head.partition(b"\r\n")[0] + b" "
        if self._status not in line:
            raise RuntimeError(f"expected{self._status.decode()}, got {line.decode()}")
        self._left = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        self._head = None
        return len(data) - (end + 4 - before)


def drain(port: int, path: str, headers: Mapping[str, str]) -> tuple[int, float]:
    """Bytes and seconds of one answer of unknown length."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    text = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n"
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    count = 0
    start = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), _TIMEOUT_S) as connection:
        connection.sendall(text.encode())
        got = connection.recv_into(buffer)
        if not bytes(buffer[:12]).endswith(b"200"):
            raise RuntimeError(bytes(buffer[:got]).decode())
        while got:
            count += got
            got = connection.recv_into(buffer)
    return count, time.perf_counter() - start


def sha256_of(port: int, path: str, headers: Mapping[str, str]) -> str:
    """Of a whole file."""
    import urllib.request

    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=dict(headers))
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


def obstore_ranges(
    port: int, requests: Sequence[tuple[str, int, int]], streams: int, headers: Mapping[str, str]
) -> Answers:
    """The same through obstore, `streams` requests at a time."""
    from obstore.store import HTTPStore

    options: Any = {"allow_http": True, "default_headers": dict(headers)}
    store = HTTPStore.from_url(f"http://127.0.0.1:{port}", client_options=options)
    waiting = iter(requests)
    sizes: list[int] = []

    async def work() -> None:
        for path, start, stop in waiting:
            part = await store.get_range_async(path.lstrip("/"), start=start, end=stop)
            sizes.append(len(part))

    async def everybody() -> None:
        await asyncio.gather(*(work() for _ in range(streams)))

    cpu, clock = time.process_time(), time.perf_counter()
    if streams == 1:
        for path, start, stop in waiting:
            sizes.append(len(store.get_range(path.lstrip("/"), start=start, end=stop)))
    else:
        asyncio.run(everybody())
    seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
    return Answers(seconds, cpu_s, len(sizes), sum(sizes), [])
