"""The servers that are compared: `logitstore serve` as users start it, and nginx on the same files.

Both listen on free ports of loopback, run one worker process on one core, and are ended here. nginx
gets a configuration of its own in a temporary folder; the machine's nginx service is not touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["NGINX_MISSING", "Server", "logitstore_server", "nginx_program", "nginx_server"]

NGINX_MISSING = (
    "nginx is not installed, so nothing is compared with it: `apt-get install nginx-light`, "
    "or your system's package of that name (the benchmark starts its own process of it)"
)
_PROGRAM = "from logitstore_cli.main import main; main()"
_START_S = 60

# Debian's settings for static files; no log, though our service writes one.
_CONFIG = """\
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on; tcp_nopush on; keepalive_requests 1000000000; keepalive_timeout 600;
  access_log {log}; default_type application/octet-stream;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; {locations} }}
}}
"""


@dataclass
class Server:
    """A running server.

    Attributes:
        name: what tables call it.
        port: of 127.0.0.1.
        process: the one that answers.
        log: file of its requests, one line each, where it keeps one.
        headers: what a client must send.
    """

    name: str
    port: int
    process: psutil.Process
    log: Path | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def url(self, store: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/stores/{store}"

    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def requests(self) -> list[str]:
        """Lines of the log about requests for stores."""
        assert self.log is not None
        time.sleep(0.2)  # a request is logged after its last byte was sent
        return [line for line in self.log.read_text().splitlines() if "/v1/stores/" in line]


def nginx_program() -> str | None:
    """Where nginx is; Debian keeps it off the path of ordinary users."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextmanager
def nginx_server(
    folder: Path, stores: Mapping[str, Path], core: int, *, log: bool = False
) -> Iterator[Server]:
    """nginx on these stores' folders; raises FileNotFoundError where it is not installed."""
    program = nginx_program()
    if program is None:
        raise FileNotFoundError(NGINX_MISSING)
    own = folder / f"nginx-{log}"
    own.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    access = own / "access.log"
    locations = " ".join(
        f"location /v1/stores/{name}/ {{ alias {path}/; }}" for name, path in stores.items()
    )
    text = _CONFIG.format(folder=own, port=port, locations=locations, log=access if log else "off")
    (own / "nginx.conf").write_text(text)
    command = [program, "-p", str(own), "-c", str(own / "nginx.conf"), "-e", str(own / "errors")]
    with _running(command, core, own / "output", {}) as process:
        _wait_until_answers(f"http://127.0.0.1:{port}/", process)
        yield Server("nginx", port, psutil.Process(process.pid), access if log else None)


@contextmanager
def logitstore_server(
    folder: Path,
    stores: Mapping[str, Path],
    core: int,
    *,
    key: tuple[Path, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`logitstore serve` on these stores.

    Args:
        key: file of keys, and the key that clients send.
        settings: of the service by name, through its environment.
    """
    command = [sys.executable, "-c", _PROGRAM, "serve", "--port", "0"]
    for name, path in stores.items():
        command += [str(path), "--name", name]
    if key is not None:
        command += ["--keys-file", str(key[0])]
    name = "logitstore" if key is None else "logitstore, with keys"
    log = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{len(stores)}.log"
    given = {f"LOGITSTORE_SERVER_{k.upper()}": v for k, v in (settings or {}).items()}
    environment = {"LOGITSTORE_SERVER_SHUTDOWN_DELAY_S": "0", **given}
    with _running(command, core, log, environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the service did not start: {log.read_text()}")
        port = int(line.split(":")[2].partition("/")[0])
        _wait_until_answers(f"http://127.0.0.1:{port}/readyz", process)
        headers = {} if key is None else {"Authorization": f"Bearer {key[1]}"}
        yield Server(name, port, psutil.Process(process.pid), log, headers)


@contextmanager
def _running(
    command: list[str], core: int, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # the parent has no threads yet
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()


def _wait_until_answers(url: str, process: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=_START_S).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > until_s or process.poll() is not None:
                raise
            time.sleep(0.02)
