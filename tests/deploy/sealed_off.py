"""Runs the service where it can do nothing but read: a program for `unshare --mount --net`.

    unshare --mount --net python sealed_off.py STORE SCRATCH UID

The file system is read-only except for a small tmpfs at SCRATCH; there is no network but loopback,
no home and no capability, not even for root. Prints what a client saw, as JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def seal(scratch: Path) -> None:
    """Take everything away that the service must not need."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,mode=1777", "tmpfs", scratch], check=True
    )
    subprocess.run(["mount", "-o", "remount,bind,ro", "/"], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(asked, SIOCGIFFLAGS, request))
        fcntl.ioctl(asked, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def without_rights(command: list[str], uid: int) -> list[str]:
    """The command line that runs a command as a user without any capability."""
    user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["setpriv", *user, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        data: bytes = answer.read()
        return data


def main(store: Path, scratch: Path, uid: int) -> None:
    seal(scratch)
    seen: dict[str, Any] = {}
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TMPDIR": str(scratch)}
    program = "from logitstore_cli.main import main; main()"
    command = [sys.executable, "-c", program, "serve", str(store)]
    command += ["--name", "s", "--workers", "2", "--port", "0"]
    attempt = [sys.executable, "-c", f"open({str(store / 'x')!r}, 'w')"]
    tried = subprocess.run(
        without_rights(attempt, uid), env=environment, capture_output=True, check=False
    )
    seen["writable"] = tried.returncode == 0
    networks = Path("/proc/net/dev").read_text().splitlines()[2:]
    seen["networks"] = [line.partition(":")[0].strip() for line in networks]
    process = subprocess.Popen(
        without_rights(command, uid), env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        base = url.partition("/v1/")[0]
        status = Path(f"/proc/{process.pid}/status").read_text()
        seen["rights"] = [line.split()[1] for line in status.splitlines() if line[:6] == "CapEff"]
        seen["ready"] = json.loads(get(f"{base}/readyz"))["status"]
        shard = next((store / "shards").iterdir())
        sent = get(f"{url}/shards/{shard.name}")
        seen["same"] = hashlib.sha256(sent).digest() == hashlib.sha256(shard.read_bytes()).digest()
        seen["page"] = len(json.loads(get(f"{url}/rows?length=3"))["rows"])
        for _ in range(20):
            get(f"{url}/store.json")
        line = 'route="/v1/stores/{store}/store.json",status="200"} 20.0'
        seen["counted"] = line in get(f"{base}/metrics").decode()
        seen["written"] = sorted(
            {path.parent.name for path in scratch.rglob("*") if path.is_file()}
        )
        process.send_signal(signal.SIGTERM)
        seen["exit"] = process.wait(60)
        seen["left"] = [path.name for path in scratch.rglob("*")]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
