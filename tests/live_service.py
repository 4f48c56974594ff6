"""`logitstore serve` as its users run it: a process with keys and logs that can be killed and
started again on its port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

__all__ = ["LiveService"]

_PROGRAM = [sys.executable, "-c", "from logitstore_cli.main import main; main()", "serve"]
_PATIENCE_S = 60.0


class LiveService:
    """A running service. Every start writes a log of its own into `folder`.

    Args:
        folder: of logs.
        stores: as the command takes them, in the settings' form `NAME=LOCATION`.
        settings: further ones of `ServerSettings`, by name.
    """

    def __init__(self, folder: Path, *stores: str, **settings: Any) -> None:
        self.folder = folder
        given = {"stores": json.dumps(stores), "shutdown_delay_s": 0, "log_format": "json"}
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LOGITSTORE_TOKEN", "LOGITSTORE_SERVER_"))
        }
        self.change(**given, **settings)
        self.port = _free_port()
        self.starts = 0
        self.start()

    def __enter__(self) -> LiveService:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def store(self, name: str) -> str:
        """The URL of a store."""
        return f"{self.url}/v1/stores/{name}"

    def change(self, **settings: Any) -> None:
        """Settings of the next start."""
        for name, value in settings.items():
            self._environment[f"LOGITSTORE_SERVER_{name.upper()}"] = str(value)

    def start(self, *, wait: bool = True) -> None:
        """Start it on its port."""
        self.starts += 1
        with open(self.folder / f"log-{self.starts}", "w") as log:
            self.process = subprocess.Popen(
                [*_PROGRAM, "--port", str(self.port)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
            )
        if wait:
            try:
                self.wait_until_it_answers()
            except BaseException:
                self.kill()
                raise

    def wait_until_it_answers(self) -> None:
        until = time.monotonic() + _PATIENCE_S
        while True:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=_PATIENCE_S):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, where there are several."""
        return [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE
            and "resource_tracker" not in " ".join(child.cmdline())
        ]

    def kill(self) -> None:
        """SIGKILL; workers notice, and end too."""
        left = [] if self.process.poll() is not None else self.workers()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(left, _PATIENCE_S)

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_PATIENCE_S)

    def log(self, start: int | None = None) -> str:
        """What a start, by default the last, has logged."""
        return (self.folder / f"log-{start or self.starts}").read_text()

    def requests(self, start: int | None = None) -> list[dict[str, Any]]:
        """Requests that a start has answered."""
        lines = [json.loads(line) for line in self.log(start).splitlines() if line[:1] == "{"]
        return [line for line in lines if line.get("event") == "request"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
