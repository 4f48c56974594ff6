"""F18: a hundred slow clients, and what a good one notices of them; the same with uvicorn alone.

A quarter each: silent; silent in the middle of a header; a byte of the head a second; readers of a
byte a second of a large answer. Each comes back when it is dropped. The good client reads 4 KiB
ranges one after another and times the first byte: before, during and after. Server on one core,
all clients on the other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import http_clients as clients
import numpy as np
from http_servers import logitstore_server
from security_stores import cores

import logitstore

__all__ = ["KINDS", "slow"]

KINDS = ("silent", "half a header", "a byte a second", "slow reader")
_HEAD = "GET /v1/stores/big/shards/{shard} HTTP/1.1\r\nHost: localhost\r\n"
_UVICORN = """
import sys, uvicorn, socket
from logitstore_server.app import create_app
from logitstore_server.settings import ServerSettings
app = create_app(ServerSettings(stores=sys.argv[1:]), unguarded=True)
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, access_log=False, log_level="error", timeout_keep_alive=5)
uvicorn.Server(config).run(sockets=[listening])
"""


def _big_store(place: Path, samples: int) -> str:
    """A store of one object, 1.6 MB a sample; its name."""
    rng = np.random.default_rng(0)
    with logitstore.writer(
        place, signal="topk:64", vocab_size=256, container="arrow", shard_positions=1 << 20
    ) as writer:
        logits = rng.normal(0, 3, (4096, 256)).astype(np.float32)
        for _ in range(samples):
            writer.add(rng.integers(0, 256, 4096), logits)
    return next((place / "shards").iterdir()).name


def slow(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """A row for each server, after the same attack."""
    store = folder / "big"
    shard = _big_store(store, 8 if tiny else 24)
    count, before_s, during_s = (8, 1.0, 3.0) if tiny else (100, 10.0, 45.0)
    limits = {"head_timeout_s": "1", "send_window_s": "1"} if tiny else {}
    rows = []
    with logitstore_server(folder, {"big": store}, cores()[0], settings=limits) as server:
        rows.append(_attacked("logitstore serve", server.port, shard, count, before_s, during_s))
    with _uvicorn_alone(store) as port:
        rows.append(_attacked("uvicorn alone", port, shard, count, before_s, during_s))
    return {"clients": count, "attack_s": during_s, "rows": rows}


@contextmanager
def _uvicorn_alone(store: Path) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _UVICORN, f"big={store}"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {cores()[0]}),
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)  # it would wait for its slow clients
        process.communicate()


def _attacked(
    name: str, port: int, shard: str, count: int, before_s: float, during_s: float
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    stop = context.Event()
    attacker = context.Process(target=attack, args=(port, shard, count, stop, found))
    with clients.client(cores()[1]) as pool:

        def latencies_ms(seconds: float) -> list[float]:
            path = f"/v1/stores/big/shards/{shard}"
            requests = [(path, 4096 * n, 4096 * (n + 1)) for n in range(50)]
            until_s, times = time.monotonic() + seconds, []
            while time.monotonic() < until_s:
                answers = pool.submit(clients.download, port, requests, 1, {}).result()
                times += [each * 1e3 for each in answers.first_byte_s]
            return times

        latencies_ms(1.0)
        before = latencies_ms(before_s)
        attacker.start()
        found.get()  # all are connected
        during = latencies_ms(during_s)
        stop.set()
        held_s, still = found.get()
        attacker.join()
        after = latencies_ms(before_s)
    quiet = statistics.median([_p99(before), _p99(after)])
    return {
        "server": name,
        "requests": len(during),
        "p50_ms": {"before": _p50(before), "during": _p50(during), "after": _p50(after)},
        "p99_ms": {"before": _p99(before), "during": _p99(during), "after": _p99(after)},
        "max_ms": {"before": max(before), "during": max(during), "after": max(after)},
        "p99_during_of_quiet": _p99(during) / quiet,
        "dropped_after_s": {
            kind: {"median": statistics.median(times), "most": max(times), "drops": len(times)}
            for kind, times in held_s.items()
            if times
        },
        "never_dropped": still,
    }


def _p50(values: list[float]) -> float:
    return float(np.percentile(values, 50))


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


def attack(port: int, shard: str, count: int, stop: Any, found: Any) -> None:
    """Hold `count` slow connections until told to stop; in a process of its own.

    Puts None once all are connected, then kind -> seconds that connections lasted, and kind -> how
    many of the first connections were still there.
    """
    os.sched_setaffinity(0, {cores()[1]})
    lasted: dict[str, list[float]] = {kind: [] for kind in KINDS}
    still = dict.fromkeys(KINDS, 0)
    ready = threading.Barrier(count + 1)

    def hold(kind: str) -> None:
        first = True
        while not stop.is_set():
            with socket.socket() as client:
                if kind == "slow reader":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                began_s = time.monotonic()
                if first:
                    ready.wait()
                dropped = _keep(client, kind, shard, stop)
                if dropped:
                    lasted[kind].append(time.monotonic() - began_s)
                elif first:
                    still[kind] += 1
                first = False

    threads = [
        threading.Thread(target=hold, args=(KINDS[n % len(KINDS)],), daemon=True)
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    found.put(None)
    for thread in threads:
        thread.join()
    found.put((lasted, still))


def _keep(client: socket.socket, kind: str, shard: str, stop: Any) -> bool:
    """Be slow until dropped (True) or stopped (False)."""
    head = _HEAD.format(shard=shard).encode()
    client.settimeout(0.05)
    try:
        if kind == "half a header":
            client.sendall(head + b"X-Half: ")
        elif kind == "slow reader":
            client.sendall(head + b"\r\n")
        trickle = iter(head + b"X-Slow: " + b"x" * 10_000)
        while not stop.wait(1.0):
            if kind == "a byte a second":
                client.sendall(bytes([next(trickle)]))
            # What has arrived is read before a reset is seen, which at a byte a second takes long.
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            try:
                if not client.recv(1):
                    return True
            except TimeoutError:
                continue
    except OSError:
        return True
    return False
