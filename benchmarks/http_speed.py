"""How fast stores are served: beside nginx on the same files, and beside the same files on disk.

    python benchmarks/http_speed.py                  # the report in benchmarks/reports/
    python benchmarks/http_speed.py --tiny --out X   # seconds; what the test runs
    python benchmarks/http_speed.py --parts shards ranges

(Not named `http.py`, which every script of this folder would import for the standard library's.)

The servers run on the first core that this process may use and the client on the second; they take
turns, run by run, so that what slows one slows the others. `logitstore serve` is started as users
start it, logs every request, and is measured without keys and with; nginx keeps no log. Bytes are
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import http_clients as clients
import http_training as training
import numpy as np
from http_page import capacity_of, page, targets_of
from http_servers import NGINX_MISSING, Server, logitstore_server, nginx_program, nginx_server
from http_stores import MANY, STUDENT, chunk_ranges, write_stores
from report import REPORTS, environment, write_report

from logitstore_server.keys import create_key

RANGE_BYTES = (266_240, 49_152)
GB = 10**9


@dataclass
class Setup:
    """What is measured with what."""

    stores: dict[str, Path]
    servers: list[Server]
    pool: ProcessPoolExecutor
    repeats: int
    tiny: bool
    result: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments).result()

    @property
    def own(self) -> Server:
        return next(server for server in self.servers if server.name == "logitstore")

    def turns(self, function: Callable[..., Any], requests: Any, streams: int) -> dict[str, Any]:
        """server -> its runs, one after another in turn; the first round is not counted."""
        runs: dict[str, list[clients.Answers]] = {server.name: [] for server in self.servers}
        for number in range(self.repeats + 1):
            for server in self.servers:
                answers = self.run(function, server.port, requests, streams, server.headers)
                if number or self.repeats == 0:
                    runs[server.name].append(answers)
        return runs


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compared(runs: dict[str, list[clients.Answers]]) -> list[dict[str, Any]]:
    """A row for each server; ratios are those of the same round."""
    rows = []
    for name, answers in runs.items():
        row: dict[str, Any] = {
            "server": name,
            "requests": answers[0].requests,
            "mb_per_s": spread([each.body_bytes / each.seconds / 1e6 for each in answers]),
            "requests_per_s": spread([each.requests / each.seconds for each in answers]),
        }
        first = [value for each in answers for value in each.first_byte_s]
        if first:
            row["first_byte_ms"] = {
                f"p{q}": float(np.percentile(first, q) * 1000) for q in (50, 99)
            }
        if "nginx" in runs and name != "nginx":
            pairs = zip(runs["nginx"], answers, strict=True)
            row["of_nginx"] = spread([base.seconds / own.seconds for base, own in pairs])
        rows.append(row)
    return rows


def shard_paths(setup: Setup) -> tuple[list[str], int]:
    folder = setup.stores["topk-arrow"] / "shards"
    files = sorted(folder.iterdir())
    return [f"/v1/stores/topk-arrow/shards/{f.name}" for f in files], files[0].stat().st_size


def check_bytes(setup: Setup) -> None:
    paths, _ = shard_paths(setup)
    found = {setup.run(clients.sha256_of, s.port, paths[0], s.headers) for s in setup.servers}
    if len(found) != 1:
        raise SystemExit("servers send different bytes")


def shards(setup: Setup) -> list[dict[str, Any]]:
    paths, size = shard_paths(setup)
    rows = []
    for streams in (1, 2) if setup.tiny else (1, 4, 16):
        count = 4 if setup.tiny else max(16, 2 * streams)
        requests = [(paths[i % len(paths)],) for i in range(count)]
        runs = setup.turns(clients.download, requests, streams)
        rows += [{"streams": streams, "bytes": size, **row} for row in compared(runs)]
    return rows


def ranges(setup: Setup) -> list[dict[str, Any]]:
    paths, size = shard_paths(setup)
    rng = random.Random(0)
    rows = []
    for length in RANGE_BYTES:
        length = min(length, size // 2)
        for function, name in ((clients.obstore_ranges, "obstore"), (clients.download, "socket")):
            for streams in (1, 2) if setup.tiny else (1, 4, 16):
                requests = []
                for _ in range(20 if setup.tiny else 2000):
                    start = rng.randrange(size - length)
                    requests.append((rng.choice(paths), start, start + length))
                runs = setup.turns(function, requests, streams)
                rows += [
                    {"client": name, "bytes": length, "streams": streams, **row}
                    for row in compared(runs)
                ]
    return rows


def load(setup: Setup) -> list[dict[str, Any]]:
    """Chunks of a top-K store, one sample each, in random order."""
    chunks = chunk_ranges(setup.stores["topk"], "topk")
    rng = random.Random(0)
    rows = []
    for streams in (1, 4) if setup.tiny else (1, 8, 64):
        requests = rng.choices(chunks, k=20 if setup.tiny else 3000)
        rows += [
            {"clients": streams, **row}
            for row in compared(setup.turns(clients.download, requests, streams))
        ]
    return rows


def epochs(setup: Setup) -> list[dict[str, Any]]:
    """Shuffled epochs of decoded batches, from disk and over HTTP."""
    rows = []
    for name in ("topk", "threshold", "sampled", "topk-arrow"):
        folder, url = setup.stores[name], setup.own.url(name)
        with tempfile.TemporaryDirectory() as warm:
            setup.run(training.epoch, url, 0, warm)
            runs: dict[str, list[dict[str, float]]] = {}
            for number in range(setup.repeats + 1):
                with tempfile.TemporaryDirectory() as cold:
                    for how, location, cache in (
                        ("disk", str(folder), None),
                        ("warm cache", url, warm),
                        ("no cache", url, None),
                        ("cold cache, filled", url, cold),
                    ):
                        found = setup.run(training.epoch, location, number, cache)
                        if number or setup.repeats == 0:
                            runs.setdefault(how, []).append(found)
        if len({each["checksum"] for found in runs.values() for each in found}) != 1:
            raise SystemExit(f"{name}: epochs differ in what they read")
        for how, found in runs.items():
            pairs = zip(runs["disk"], found, strict=True)
            rows.append(
                {
                    "store": name,
                    "read": how,
                    "positions": found[0]["positions"],
                    "tokens_per_s": spread([each["positions"] / each["seconds"] for each in found]),
                    "of_disk": spread([disk["seconds"] / own["seconds"] for disk, own in pairs]),
                }
            )
    return rows


def memory(setup: Setup) -> dict[str, Any]:
    """The server's memory while it sends much: shard bytes, then one Arrow stream."""
    paths, size = shard_paths(setup)
    total = 20 * size if setup.tiny else 10 * GB
    step = total // 10
    rss, sent = [setup.own.rss_bytes()], [0]
    for _ in range(10):
        requests = [(paths[i % len(paths)],) for i in range(max(1, round(step / size)))]
        answers = setup.run(clients.download, setup.own.port, requests, 4, setup.own.headers)
        sent.append(sent[-1] + answers.body_bytes)
        rss.append(setup.own.rss_bytes())
    return {"shards": _slope(sent, rss), "samples": _samples_stream(setup)}


def _samples_stream(setup: Setup) -> dict[str, Any]:
    count = 40 if setup.tiny else 12_400
    ids = ",".join(str(i % 8) for i in range(count))
    path = f"/v1/stores/topk/samples?ids={ids}"
    before = setup.own.rss_bytes()
    job = setup.pool.submit(clients.drain, setup.own.port, path, setup.own.headers)
    start, times, rss = time.perf_counter(), [0.0], [before]
    while not job.done():
        time.sleep(0.02 if setup.tiny else 0.25)
        times.append(time.perf_counter() - start)
        rss.append(setup.own.rss_bytes())
    received, seconds = job.result()
    sent = [round(min(each / seconds, 1) * received) for each in times]
    tenths = [min(range(len(sent)), key=lambda i: abs(sent[i] - t)) for t in _tenths(received)]
    found = _slope([sent[i] for i in tenths], [rss[i] for i in tenths])
    return {
        **found,
        "bytes": received,
        "seconds": seconds,
        "rows": count,
        "rows_per_s": count / seconds,
        "mb_per_s": received / seconds / 1e6,
        "peak_rss_mb": max(rss) / 1e6,
    }


def _tenths(total: int) -> list[float]:
    return [total * i / 10 for i in range(11)]


def _slope(sent: list[int], rss: list[int]) -> dict[str, Any]:
    """MB of memory for each GB sent, by least squares over the second half: the first one fills
    caches and pools."""
    half = len(sent) // 2
    x = np.array(sent[half:]) / GB
    slope = float(np.polyfit(x, np.array(rss[half:]) / 1e6, 1)[0]) if np.ptp(x) else 0.0
    return {
        "gb": [each / GB for each in sent],
        "rss_mb": [each / 1e6 for each in rss],
        "mb_per_gb": slope,
    }


def opening(setup: Setup, folder: Path, core: int) -> dict[str, Any]:
    """A sealed store of many shards: requests, counted by the servers, and time."""
    found: dict[str, Any] = {"disk": setup.run(training.cold_open, str(setup.stores[MANY]))}
    with ExitStack() as stack:
        counting = [setup.own]
        if nginx_program():
            stores = {MANY: setup.stores[MANY]}
            counting.append(stack.enter_context(nginx_server(folder, stores, core, log=True)))
        for server in counting:
            times, asked = [], []
            for _ in range(max(1, setup.repeats)):
                before = len(server.requests())
                opened = setup.run(training.cold_open, server.url(MANY))
                asked.append(len(server.requests()) - before)
                times.append(opened["open_s"])
            found[server.name] = {**opened, "open_s": spread(times), "requests": max(asked)}
    return found


def waiting(setup: Setup) -> list[dict[str, Any]]:
    """A student's training loop: the share of its time that it waits for data."""
    steps = 4 if setup.tiny else 40
    url, folder = setup.own.url(STUDENT), str(setup.stores[STUDENT])
    rows = []
    for how, location, ahead in (
        ("disk", folder, True),
        ("HTTP, fetched ahead", url, True),
        ("HTTP, fetched when needed", url, False),
    ):
        runs = [
            setup.pool.submit(training.trainer, location, steps, ahead=ahead).result()
            for _ in range(min(3, max(1, setup.repeats)))
        ]
        rows.append(
            {
                "data": how,
                "step_ms": spread([each["step_s"] * 1000 for each in runs]),
                "waits_percent": spread(
                    [100 * each["waited_s"] / each["seconds"] for each in runs]
                ),
            }
        )
    return rows


@contextmanager
def started(folder: Path, options: argparse.Namespace) -> Iterator[Setup]:
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_core = cores[0], cores[-1]
    samples, many = (16, 20) if options.tiny else (options.samples, options.shards)
    stores = write_stores(folder / "stores", samples=samples, many=many, tiny=options.tiny)
    repeats = 1 if options.tiny else options.repeats
    with ExitStack() as stack:
        servers = []
        if nginx_program():
            servers.append(stack.enter_context(nginx_server(folder, stores, server_core)))
        servers.append(stack.enter_context(logitstore_server(folder, stores, server_core)))
        if not options.tiny:
            keys = folder / "keys.json"
            text, _ = create_key(keys, label="benchmark", stores=["*"], metrics=True, expires=None)
            servers.append(
                stack.enter_context(
                    logitstore_server(folder, stores, server_core, key=(keys, text))
                )
            )
        pool = stack.enter_context(clients.client(client_core))
        yield Setup(stores, servers, pool, repeats, options.tiny)


PARTS = ("shards", "ranges", "load", "epochs", "memory", "opening", "waiting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--samples", type=int, default=320, help="of 2,048 positions, a store")
    parser.add_argument("--shards", type=int, default=10_000, help="of the store that is opened")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if not nginx_program():
        print(NGINX_MISSING)
    folder = Path(tempfile.mkdtemp(prefix="logitstore-http-"))
    try:
        with started(folder, options) as setup:
            check_bytes(setup)
            found = {}
            for part in options.parts:
                print(f"{part} ...", flush=True)
                if part == "opening":
                    found[part] = opening(setup, folder, min(os.sched_getaffinity(0)))
                else:
                    found[part] = globals()[part](setup)
    finally:
        shutil.rmtree(folder)
    packages = {name: version(name) for name in ("uvicorn", "uvloop", "httptools", "obstore")}
    result = {
        "environment": {**environment(), **packages, "nginx": _nginx_version()},
        "skipped": [] if nginx_program() else [NGINX_MISSING],
        "repeats": 1 if options.tiny else options.repeats,
        **found,
    }
    result["targets"] = targets_of(result)
    result["capacity"] = capacity_of(result)
    write_report(options.out, "http", result, page(result))
    print((options.out / "http.md").read_text(encoding="utf-8"))


def _nginx_version() -> str:
    import subprocess

    program = nginx_program()
    if program is None:
        return "missing"
    told = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    return told.strip().rpartition("/")[2]


if __name__ == "__main__":
    main()
