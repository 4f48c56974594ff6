"""A static HTTP server over a folder, and a proxy before it that misbehaves on demand.

Both run in one thread of the test's process, on an event loop of their own.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import http.server
import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from logitstore.data import Batch, Loader

__all__ = ["FaultProxy", "StaticHost", "digest", "digests"]


class _Handler(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, with single ranges."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match or not path.is_file():
            return super().send_head()
        first, last, size = int(match[1]), int(match[2]), path.stat().st_size
        if first >= size:
            self.send_error(416)
            return None
        last = min(last, size - 1)
        self.send_response(206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        return io.BytesIO(path.read_bytes()[first : last + 1])

    def log_message(self, *args: object) -> None:
        pass


class StaticHost:
    """`python -m http.server` over a folder; can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self._handler = functools.partial(_Handler, directory=str(folder))
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class FaultProxy:
    """Passes GET and HEAD to a host, as `rule(method, path, headers)` says for each request.

    "pass"; a status, answered at once with `self.retry_after`; a share in (0, 1) of the reply's
    body after which the connection is cut; "flip" turns one bit of the body over.

    Attributes:
        requests: (seconds, method, path) of every request.
        faults: how many requests were not passed untouched.
        delay_s: waited before each reply.
    """

    def __init__(self, upstream: str, rule: Callable[..., str | int | float] | None = None) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = (host, int(port))
        self.rule = rule or (lambda method, path, headers: "pass")
        self.requests: list[tuple[float, str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.faults = 0
        self.delay_s = 0.0
        self.retry_after: str | None = None
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        line, *fields = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = line.split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (f.partition(":") for f in fields)}
        self.requests.append((time.monotonic(), method, path))
        self.headers.append(headers)
        action = self.rule(method, path, headers)
        self.faults += action != "pass"
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if isinstance(action, int):
            asked = "" if self.retry_after is None else f"Retry-After: {self.retry_after}\r\n"
            writer.write(f"HTTP/1.1 {action} No\r\nContent-Length: 0\r\n{asked}\r\n".encode())
            await writer.drain()
            return
        upstream, up = await asyncio.open_connection(*self._upstream)
        try:
            kept = [f for f in fields if not f.lower().startswith("connection:")]
            up.write("\r\n".join([line, *kept, "Connection: close", "", ""]).encode("latin-1"))
            reply = await upstream.read(-1)
        finally:
            up.close()
        start, _, body = reply.partition(b"\r\n\r\n")
        if isinstance(action, float):
            writer.write(start + b"\r\n\r\n" + body[: int(len(body) * action)])
            await writer.drain()
            raise ConnectionResetError
        if action == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        writer.write(start + b"\r\n\r\n" + body)
        await writer.drain()
        if b"connection: close" in start.lower():
            raise ConnectionResetError


def digests(batches: Loader) -> list[str]:
    """A hash per batch of an epoch."""
    return [digest(batch) for batch in batches]


def digest(batch: Batch) -> str:
    """SHA-256 over a batch's tensors, targets and sample ids."""
    total = hashlib.sha256(repr((batch.sample_ids, batch.sample_keys)).encode())
    for name, value in sorted({**vars(batch), **vars(batch.targets)}.items()):
        if isinstance(value, torch.Tensor):
            total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()
