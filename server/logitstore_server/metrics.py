"""What the service counts, for Prometheus at `/metrics`; right with any number of workers.

With `PROMETHEUS_MULTIPROC_DIR` set before this module is imported, each worker keeps its values in
files of that folder and a scrape of any worker adds them up. Labels take few values: routes are
templates, stores are configured names, statuses and reasons are fixed sets.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from logitstore.spec.errors import IntegrityError

__all__ = [
    "CACHE_READS",
    "CONNECTIONS",
    "DROPPED_CONNECTIONS",
    "FIRST_BYTE_SECONDS",
    "IN_FLIGHT",
    "MULTIPROCESS_DIR",
    "OPEN_SHARDS",
    "REFUSALS",
    "REQUESTS",
    "RESPONSE_BYTES",
    "ROWS",
    "STORE_AVAILABLE",
    "STREAM_SECONDS",
    "VERIFY_FAILURES",
    "count_damage",
    "exposition",
]

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_REGISTRY = CollectorRegistry()
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUESTS = Counter(
    "logitstore_requests",
    "Requests answered.",
    ["method", "route", "status"],
    registry=_REGISTRY,
)
FIRST_BYTE_SECONDS = Histogram(
    "logitstore_first_byte_seconds",
    "From a request's head to the first byte of its answer.",
    ["route"],
    buckets=_BUCKETS_S,
    registry=_REGISTRY,
)
STREAM_SECONDS = Histogram(
    "logitstore_stream_seconds",
    "From the first byte of an answer to its last.",
    ["route"],
    buckets=_BUCKETS_S,
    registry=_REGISTRY,
)
RESPONSE_BYTES = Counter(
    "logitstore_response_bytes",
    "Bytes of answers' bodies; store is empty for answers about none.",
    ["store"],
    registry=_REGISTRY,
)
ROWS = Counter(
    "logitstore_rows",
    "Samples decoded for answers and in searches; what is sent as stored bytes is not.",
    ["store"],
    registry=_REGISTRY,
)
IN_FLIGHT = Gauge(
    "logitstore_requests_in_flight",
    "Requests being answered.",
    multiprocess_mode="livesum",
    registry=_REGISTRY,
)
CONNECTIONS = Gauge(
    "logitstore_connections",
    "Open connections.",
    multiprocess_mode="livesum",
    registry=_REGISTRY,
)
OPEN_SHARDS = Gauge(
    "logitstore_open_shards",
    "Files of shard objects held open, as of each worker's last request.",
    multiprocess_mode="livesum",
    registry=_REGISTRY,
)
CACHE_READS = Counter(
    "logitstore_cache_reads",
    "Lookups of stores' documents in memory; result is hit or miss.",
    ["result"],
    registry=_REGISTRY,
)
STORE_AVAILABLE = Gauge(
    "logitstore_store_available",
    "1 if the store could be opened when a worker last looked, else 0.",
    ["store"],
    multiprocess_mode="livemostrecent",
    registry=_REGISTRY,
)
VERIFY_FAILURES = Counter(
    "logitstore_verify_failures",
    "Answers that stored bytes other than the committed ones spoilt, by kind of error.",
    ["kind"],
    registry=_REGISTRY,
)
REFUSALS = Counter(
    "logitstore_refusals",
    "Requests refused before they reached a store, by kind of error.",
    ["kind"],
    registry=_REGISTRY,
)
DROPPED_CONNECTIONS = Counter(
    "logitstore_dropped_connections",
    "Connections ended by the guard, by reason.",
    ["reason"],
    registry=_REGISTRY,
)


def count_damage(error: BaseException) -> None:
    """Count an error, if it says that stored bytes are not the committed bytes."""
    # A failure after an answer has begun reaches us as the cause of another.
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, IntegrityError):
            VERIFY_FAILURES.labels(found.kind).inc()
            return
        found = found.__cause__


def exposition() -> bytes:
    """All metrics in Prometheus' text format, summed over the workers."""
    folder = os.environ.get(MULTIPROCESS_DIR)
    if folder is None:
        return generate_latest(_REGISTRY)
    _forget_dead_workers(Path(folder))
    together = CollectorRegistry()
    MultiProcessCollector(together, path=folder)
    return generate_latest(together)


def _forget_dead_workers(folder: Path) -> None:
    """A killed worker cannot take back what its gauges say. Its counters stay, as they must."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, path=str(folder))
        except PermissionError:
            continue  # alive, and another user's
