"""The guarded service in processes of its own, with an application that is easy to stall.

    python tests/server_security/live.py SETTINGS-JSON [toy]

It prints its URL, then serves. `toy` serves `toy_app` in place of the real application.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from logitstore_server.app import create_app
from logitstore_server.outlet import ZERO_COPY
from logitstore_server.serving import serve
from logitstore_server.settings import ServerSettings

REPOSITORY = Path(__file__).resolve().parents[2]
BIG_BYTES = 32 << 20
BLOCK = b"x" * (1 << 20)
FILE_START = b"a file that the kernel sends"


def toy_app(settings: ServerSettings) -> Starlette:
    """Answers at once, in 32 MiB, from a file, slowly, or with what was sent."""
    blob = tempfile.TemporaryFile()  # noqa: SIM115
    blob.truncate(BIG_BYTES)
    blob.write(FILE_START)
    blob.flush()

    async def ping(request: Request) -> Response:
        return JSONResponse({"pid": os.getpid()})

    async def echo(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body())})

    async def big(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(BIG_BYTES // len(BLOCK)):
                yield BLOCK

        return StreamingResponse(body(), headers={"content-length": str(BIG_BYTES)})

    async def file(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(BIG_BYTES).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        part = {"type": ZERO_COPY, "file": blob.fileno(), "offset": 0, "count": BIG_BYTES}
        await send(part)

    async def slow(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x" * 10
                await asyncio.sleep(float(request.query_params["pause_s"]))

        return StreamingResponse(body(), headers={"content-length": "100"})

    return Starlette(
        routes=[
            Route("/v1/stores/a/ping", ping),
            Route("/v1/stores/a/echo", echo, methods=["POST"]),
            Route("/v1/stores/a/big", big),
            Route("/v1/stores/a/slow", slow),
            Mount("/v1/stores/a/file", file),
            Route("/healthz", ping),
            Route("/readyz", ping),
        ]
    )


@dataclass
class Live:
    """A running service: its process, its port, and what it has logged."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, receive_buffer_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        client.settimeout(120)  # other work may keep the machine busy
        client.connect(("127.0.0.1", self.port))
        return client


@contextlib.contextmanager
def running(settings: ServerSettings, *, toy: bool = True) -> Iterator[Live]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, __file__, settings.model_dump_json(), *["toy"] * toy],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, log.read_text()
            live = Live(process, int(url.rpartition(":")[2]), log)
            ready(live)
            yield live
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Workers would outlive a parent that had no time to end them.
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.communicate()


def ready(live: Live) -> None:
    """Wait until the service answers; the port takes connections before that."""
    with live.connect() as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200"), live.log.read_text()


def say(url: str) -> None:
    print(url, flush=True)


def main() -> None:
    settings: Any = ServerSettings.model_validate_json(sys.argv[1])
    serve(settings, create_app=toy_app if sys.argv[2:] else create_app, on_bound=say)


if __name__ == "__main__":
    main()
