"""Training from our own service while it is cut off, refuses, is killed and sends damaged bytes:
the batches are those of the disk, hash by hash, from Zarr and from Arrow."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

import logitstore.store
from logitstore.data import LogitDataset, loader
from logitstore.spec.errors import IntegrityError, NotFoundError
from logitstore.store import retry
from logitstore_server.keys import create_key
from tests.data_stores import make_header, make_store, random_samples
from tests.live_service import LiveService
from tests.remote_host import FaultProxy, digest
from tests.store_report import report

CONTAINERS = ("zarr", "arrow")
BATCH = 12


def wait_shortly(worker: int = 0) -> None:
    """Short waits where the server names no time."""
    retry.FIRST_WAIT_S, retry.MAX_WAIT_S = 0.01, 0.1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", retry.FIRST_WAIT_S)
    monkeypatch.setattr(retry, "MAX_WAIT_S", retry.MAX_WAIT_S)
    wait_shortly()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sealed stores of one content, `few-zarr` and `few-arrow`, and larger `zarr` and `arrow`."""
    folder = tmp_path_factory.mktemp("stores")
    for container in CONTAINERS:
        for name, number in ((f"few-{container}", 80), (container, 300)):
            samples = random_samples(number)
            make_store(folder / name, samples, header=make_header(container=container)).close()
            with logitstore.store.append(folder / name) as writer:
                writer.seal()
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of keys, and the key in it that may read every store."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, create_key(file, label="t", stores=("*",), metrics=False, expires=None)[0]


@pytest.fixture
def serve(folder, key, tmp_path, monkeypatch) -> Iterator[Callable[..., LiveService]]:
    """Starts a service of both stores that asks for the key."""
    monkeypatch.setenv("LOGITSTORE_TOKEN", key[1])
    monkeypatch.setenv("LOGITSTORE_TOKEN_HOSTS", "127.0.0.1")
    running: list[LiveService] = []

    def start(**settings: object) -> LiveService:
        stores = [f"{path.name}={path}" for path in folder.iterdir()]
        running.append(LiveService(tmp_path, *stores, keys_file=key[0], **settings))
        return running[-1]

    yield start
    for service in running:
        service.kill()


def epoch(url: str, *, workers: int = 0, **options: object) -> Iterator[tuple[str, ...]]:
    """Digests of a shuffled epoch of both stores, side by side.

    Args:
        workers: reader processes for the first store; the second is read in this process.
    """
    datasets = [LogitDataset(url.format(name), shuffle=True, **options) for name in CONTAINERS]
    spawned = {
        "num_workers": workers,
        "multiprocessing_context": "spawn",
        "worker_init_fn": wait_shortly,
    }
    loaders = [loader(datasets[0], BATCH, **(spawned if workers else {}))]
    loaders.append(loader(datasets[1], BATCH))
    for batches in zip(*loaders, strict=True):
        yield tuple(map(digest, batches))
    for dataset in datasets:
        dataset.close()


def told(name: str, fault: str, times: str, found: list, expected: list) -> None:
    """Publish a row of the table in docs/reliability.md."""
    differ = sum(one != two for one, two in zip(found, expected, strict=True))
    assert differ == 0
    batches = sum(map(len, found))
    report(f"service-{name}", f"| {fault} | {times} | {differ} of {batches} |")


def test_streams_cut_at_each_tenth_and_damaged_answers(serve, folder):
    service = serve()
    expected = list(epoch(str(folder / "few-{}")))
    cuts, found = 0, []
    for tenth in (*range(10), "flip"):
        seen: Counter[str] = Counter()

        def rule(method, path, headers, tenth=tenth, seen=seen) -> str | float:
            asked = path + headers.get("range", "")
            seen[asked] += 1
            if seen[asked] > 1:
                return "pass"
            return tenth if tenth == "flip" else max(tenth / 10, 1e-9)

        with FaultProxy(service.url, rule) as proxy:
            got = list(epoch(f"{proxy.url}/v1/stores/few-{{}}"))
            assert proxy.faults == len(seen) >= 30  # every document and every chunk of both
            assert all("authorization" in headers for headers in proxy.headers)
        if tenth == "flip":
            told("damaged", "every answer damaged once", f"{proxy.faults}", got, expected)
        else:
            cuts += proxy.faults
            found += got
    told(
        "cuts",
        "every stream cut once, after 0 %, 10 %, ... 90 %",
        f"10 epochs, {cuts} cuts",
        found,
        expected * 10,
    )


def test_a_storm_of_refusals_its_own_and_those_of_a_proxy(serve, folder):
    service = serve(requests_per_s=4)
    expected = list(epoch(str(folder / "few-{}")))
    numbers = iter(range(10**6))
    refused: Counter[int] = Counter()

    def rule(method, path, headers) -> str | int:
        answer = {0: 503, 1: 429}.get(next(numbers) % 4, "pass")
        refused[answer] += 1
        return answer

    with FaultProxy(service.url, rule) as proxy:
        proxy.retry_after = "0"
        found = list(epoch(f"{proxy.url}/v1/stores/few-{{}}"))
    own = [r["status"] for r in service.requests() if r["status"] == 429]
    assert len(own) >= 3
    assert min(refused[503], refused[429]) > 10
    told(
        "storm",
        "429 of the service's own rate limit, 503 and 429 of a proxy",
        f"{len(own)} + {refused[503]} + {refused[429]}",
        found,
        expected,
    )


def fill(url: str, cache: Path, both: Barrier, results: SimpleQueue[object]) -> None:
    """An epoch in another process, through the same cache."""
    wait_shortly()
    both.wait()
    results.put(list(epoch(url, cache_dir=cache)))


def test_two_processes_fill_a_cache_while_the_service_is_killed(serve, folder, tmp_path):
    """What is then in the cache is whole, and serves offline; what is missing or damaged is named
    or fetched again."""
    service = serve()
    expected = list(epoch(str(folder / "{}")))
    cache = tmp_path / "cache"
    shards = []

    def kill_once(method, path, headers) -> str:
        if "/shards/" in path:
            shards.append(path)
            if len(shards) == 40:
                service.kill()
                service.start()
        return "pass"

    context = multiprocessing.get_context("spawn")
    both, results = context.Barrier(2), context.SimpleQueue()
    with FaultProxy(service.url, kill_once) as proxy:
        url = f"{proxy.url}/v1/stores/{{}}"
        other = context.Process(target=fill, args=(url, cache, both, results))
        other.start()
        both.wait()
        found = list(epoch(url, cache_dir=cache))
        found += results.get()
        other.join()
        assert service.starts == 2
        told(
            "cache",
            "two processes fill one cache while the service is killed and started again",
            "1",
            found,
            expected * 2,
        )

        asked = len(proxy.requests)
        assert list(epoch(url, cache_dir=cache, offline=True)) == expected
        zarr = url.format("zarr")
        store = logitstore.store.open(zarr, cache_dir=cache, offline=True)
        row = store.commit(2).chunks[1]
        (entry,) = cache.rglob(f"{store.shards[2].object}/{row.offset}-{row.bytes}")
        store.close()
        whole = entry.read_bytes()
        entry.unlink()
        with pytest.raises(NotFoundError, match="not-cached") as missing:
            LogitDataset(zarr, cache_dir=cache, offline=True)
        assert missing.value.data["missing"] == [(store.shards[2].shard, 1)]
        assert len(proxy.requests) == asked

        entry.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        store = logitstore.store.open(zarr, cache_dir=cache)
        proxy.rule = lambda method, path, headers: "flip" if "/shards/" in path else "pass"
        asked = len(proxy.requests)
        with pytest.raises(IntegrityError, match="chunk-checksum-mismatch") as damaged:
            store.read_chunk(2, 1)
        assert damaged.value.data == {"shard": store.shards[2].shard, "chunk": 1}
        assert len(proxy.requests) == asked + 2
        proxy.rule = lambda *request: "pass"
        store.read_chunk(2, 1)
        assert (len(proxy.requests), entry.read_bytes()) == (asked + 3, whole)


def test_killed_ended_and_started_again_with_readers_in_processes_of_their_own(serve, folder):
    """One of two workers is killed, then all; the next is ended in order, the third killed again.
    Each time the service comes back on its port, and goes only after it was read from."""
    service = serve(workers=2)
    expected = list(epoch(str(folder / "{}")))
    happened = []

    def wait_for_readers() -> None:
        asked = 0
        while asked < 20:
            asked = len([r for r in service.requests() if "/shards/" in r["path"]])
            time.sleep(0.01)

    def trouble() -> None:
        wait_for_readers()
        os.kill(service.workers()[0].pid, signal.SIGKILL)
        happened.append("worker killed")
        for stop in (service.kill, service.terminate, service.kill):
            wait_for_readers()
            stop()
            happened.append(stop.__name__)
            service.change(workers=1)
            service.start()

    thread = threading.Thread(target=trouble, daemon=True)
    thread.start()
    # Nothing that was read is kept, so that all is asked for until the end.
    found = list(epoch(service.store("{}"), workers=2, cache_bytes=0))
    thread.join()
    assert happened == ["worker killed", "kill", "terminate", "kill"]
    told(
        "kills",
        "a worker killed; the service killed twice, ended once, and started again",
        "1 + 2 + 1",
        found,
        expected,
    )
    assert service.starts == 4
    assert [r for r in service.requests() if "/shards/" in r["path"]]  # to the end
