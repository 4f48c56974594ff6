"""A server of the application in a process of its own, on a free port of loopback.

    python tests/server/live.py NAME=LOCATION...

It prints the port, then serves until it is killed. What stands in front of the application in
production (keys, limits) is not there.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

from logitstore_server.app import create_app
from logitstore_server.settings import ServerSettings

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def serving(*stores: str) -> Iterator[tuple[str, psutil.Process]]:
    """(URL, process) of a server of these stores."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.Popen(
        [sys.executable, __file__, *stores], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        transport = httpx2.HTTPTransport(retries=20)
        with httpx2.Client(transport=transport, timeout=60) as client:
            assert client.get(f"{url}/healthz").status_code == 200
        yield url, psutil.Process(child.pid)
    finally:
        child.kill()
        child.communicate()


def main() -> None:
    import uvicorn

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = create_app(ServerSettings(stores=sys.argv[1:], max_ranges=8), unguarded=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    print(listening.getsockname()[1], flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
