"""The committed nginx configuration in front of the running service.

Skipped where nginx is not installed: `apt-get install nginx`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.live import running
from tests.source_tree import REPOSITORY

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(
    NGINX is None or OPENSSL is None, reason="nginx or openssl is not installed"
)
PATIENCE_S = 30


@dataclass
class Edge:
    """The running nginx."""

    port: int
    log: Path
    trust: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, verify=self.trust, timeout=PATIENCE_S)

    def logged(self, path: str) -> list[dict[str, str]]:
        """Lines of the access log for a path; nginx writes one after the answer's last byte."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line[0] == "{"]
        return [line for line in lines if line["path"] == path]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def configuration(folder: Path, upstream_port: int) -> tuple[str, int]:
    """The committed configuration with this machine's paths and ports, and short timeouts."""
    text = (REPOSITORY / "deploy/nginx/nginx.conf").read_text()
    port, health_port = free_port(), free_port()
    for old, new in {
        " /tmp/": f" {folder}/",  # first: the folder may itself be below /tmp
        "server api:8640;": f"server 127.0.0.1:{upstream_port};",
        "listen 8443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen 127.0.0.1:8080;": f"listen 127.0.0.1:{health_port};",
        "client_header_timeout 10s;": "client_header_timeout 1s;",
        "/run/secrets/": f"{folder}/",
        "/var/cache/nginx/": f"{folder}/cache-",
        "/dev/stdout": f"{folder}/log",
        "/dev/stderr": f"{folder}/log",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    return text, port


@pytest.fixture(scope="module")
def edge(
    tmp_path_factory: pytest.TempPathFactory,
    entries: tuple[StoreEntry, ...],
    keys_file: Path,
    reader_key: str,
) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("nginx")
    certificate, key = folder / "tls_certificate", folder / "tls_key"
    command = [str(OPENSSL), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    settings = ServerSettings(
        stores=entries,
        keys_file=keys_file,
        port=0,
        trusted_proxies=("127.0.0.1",),
        shutdown_delay_s=0,
    )
    with running(settings, toy=False) as live:
        text, port = configuration(folder, live.port)
        (folder / "nginx.conf").write_text(text)
        # Its workers would otherwise be another user, who cannot read the tests' folders.
        more = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
        command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", more]
        check = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stderr
        assert "[warn]" not in check.stderr
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            edge = Edge(port, folder / "log", ssl.create_default_context(cafile=str(certificate)))
            wait_for(port, process)
            yield edge
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError("nginx did not start")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def shard_of(stores: Path, name: str) -> tuple[str, bytes]:
    file = sorted((stores / name / "shards").iterdir())[0]
    return f"/v1/stores/{name}/shards/{file.name}", file.read_bytes()


def test_ranges_pass_through_and_public_objects_are_kept(edge: Edge, stores: Path) -> None:
    path, data = shard_of(stores, "open")
    size = len(data)
    with edge.client() as client:
        for start, stop in [(0, 100), (100, size), (0, 100)]:
            answer = client.get(path, headers={"Range": f"bytes={start}-{stop - 1}"})
            assert answer.status_code == 206
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
            assert answer.content == data[start:stop]
        assert client.get(path, headers={"Range": "bytes=-7"}).content == data[-7:]
        whole = client.get(path)
        assert (whole.status_code, whole.content) == (200, data)
        same = client.get(path, headers={"If-None-Match": whole.headers["etag"]})
        assert same.status_code == 304
        beyond = client.get(path, headers={"Range": f"bytes={size}-"})
        assert beyond.status_code == 416
    kept = [line["cache"] for line in edge.logged(path)]
    assert kept[0] == "MISS"
    assert set(kept[1:5]) == {"HIT"}


def test_private_objects_are_not_kept(edge: Edge, stores: Path, reader_key: str) -> None:
    path, data = shard_of(stores, "private")
    with edge.client() as client:
        for _ in range(2):
            answer = client.get(path, headers={"Range": "bytes=5-99"} | bearer(reader_key))
            assert (answer.status_code, answer.content) == (206, data[5:100])
        assert client.get(path, headers={"Range": "bytes=5-99"}).status_code == 401
    assert "HIT" not in [line["cache"] for line in edge.logged(path)]


def test_metrics_stay_inside(edge: Edge, metrics_key: str) -> None:
    with edge.client() as client:
        assert client.get("/metrics", headers=bearer(metrics_key)).status_code == 404
        assert client.get("/healthz").status_code == 200
        found = client.get("/v1/stores/open/store.json")
        assert found.status_code == 200
        assert "strict-transport-security" in found.headers
        assert len(found.headers.get_list("x-request-id")) == 1


def test_a_client_that_never_ends_its_headers_is_dropped(edge: Edge) -> None:
    with (
        socket.create_connection(("127.0.0.1", edge.port), PATIENCE_S) as plain,
        edge.trust.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        # nginx says 408 or nothing, and closes; the timeout of the socket would raise.
        answer = b""
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := client.recv(1000):
                answer += part
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    with edge.client() as good:
        assert good.get("/healthz").status_code == 200
