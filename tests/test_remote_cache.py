"""The host's cache of remote stores: offline, shared, bounded, checked, private."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import logitstore.store
from logitstore.containers.protocol import crc32c
from logitstore.data import LogitDataset, loader
from logitstore.data.prefetch import Lookahead
from logitstore.spec.errors import NotFoundError, StorageError, UsageError
from logitstore.store import mapping
from logitstore.store.cache import Cache
from tests.data_stores import add_shard, make_store, random_samples
from tests.remote_host import FaultProxy, StaticHost, digests
from tests.store_report import report

PROCESSES = multiprocessing.get_context("forkserver")


def sealed(folder: Path, seed: int = 0) -> None:
    make_store(folder, random_samples(100, seed=seed), shards=2).close()
    with logitstore.store.append(folder) as writer:
        writer.seal()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sealed stores, `st` and `other`."""
    folder = tmp_path_factory.mktemp("host")
    sealed(folder / "st")
    sealed(folder / "other", seed=1)
    return folder


@pytest.fixture
def proxy(folder: Path) -> Iterator[FaultProxy]:
    host = StaticHost(folder)
    with FaultProxy(host.url) as proxy:
        yield proxy
    host.stop()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    return digests(loader(LogitDataset(folder / "st", shuffle=True), 9))


def entries(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.is_file() and "stores" in p.parts]


def chunks(cache: Path) -> list[Path]:
    return [p for p in entries(cache) if "shards" in p.parts]


def test_a_complete_cache_works_offline_and_an_incomplete_one_says_what_is_missing(
    proxy, expected, tmp_path
):
    url = f"{proxy.url}/st"
    assert digests(loader(LogitDataset(url, shuffle=True, cache_dir=tmp_path), 9)) == expected
    first = len(proxy.requests)
    # The next opening asks for header and index; everything else is here.
    assert digests(loader(LogitDataset(url, shuffle=True, cache_dir=tmp_path), 9)) == expected
    assert [path for _, _, path in proxy.requests[first:]] == ["/st/store.json", "/st/index.json"]

    proxy.rule = lambda *request: 500
    seen = len(proxy.requests)
    for num_workers in (0, 2):
        dataset = LogitDataset(url, shuffle=True, cache_dir=tmp_path, offline=True)
        assert digests(loader(dataset, 9, num_workers=num_workers)) == expected
    assert dataset.store.refresh().snapshot == dataset.store.snapshot
    assert len(proxy.requests) == seen

    lost = sorted(chunks(tmp_path))[3]
    lost.unlink()
    with pytest.raises(NotFoundError) as caught:
        LogitDataset(url, cache_dir=tmp_path, offline=True)
    assert caught.value.kind == "not-cached"
    [(shard, chunk)] = caught.value.data["missing"]
    store = logitstore.store.open(url, cache_dir=tmp_path, offline=True)
    row = next(s for s in range(2) if store.shards[s].shard == shard)
    assert store.shards[row].object == lost.parent.name
    assert lost.name.startswith(f"{store.commit(row).chunks[chunk].offset}-")
    with pytest.raises(NotFoundError, match="not-cached"):
        store.read_chunk(row, chunk)
    store.read_chunk(row, 0 if chunk else 1)
    for cache, match in ((tmp_path / "other", "store.json"), (None, "cache_dir")):
        with pytest.raises((NotFoundError, UsageError), match=match):
            logitstore.store.open(url, cache_dir=cache, offline=True)


def test_another_store_at_the_same_place_is_not_mixed_up(proxy, folder, tmp_path):
    place = folder / "place"
    place.symlink_to(folder / "st")
    url = f"{proxy.url}/place"
    one = logitstore.store.open(url, cache_dir=tmp_path)
    one.sample(0)
    place.unlink()
    place.symlink_to(folder / "other")
    two = logitstore.store.open(url, cache_dir=tmp_path)
    assert two.header.store_uuid != one.header.store_uuid
    assert two.sample(0).sample_keys() == ["text1#0@0"]
    place.unlink()
    # Offline the one that was opened last answers.
    offline = logitstore.store.open(url, cache_dir=tmp_path, offline=True)
    assert offline.header.store_uuid == two.header.store_uuid


def test_damaged_and_torn_entries_are_replaced(proxy, expected, tmp_path):
    url = f"{proxy.url}/st"
    digests(loader(LogitDataset(url, cache_dir=tmp_path), 9))
    for number, path in enumerate(sorted(entries(tmp_path))):
        if path.name == "in-use":
            continue
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data[len(data) // 2] ^= 4
        path.write_bytes([data, data[: len(data) // 2], b""][number % 3])
    assert digests(loader(LogitDataset(url, shuffle=True, cache_dir=tmp_path), 9)) == expected
    seen = len(proxy.requests)
    assert digests(loader(LogitDataset(url, shuffle=True, cache_dir=tmp_path), 9)) == expected
    assert len(proxy.requests) == seen + 2


def train(url: str, cache: str, limit: int, results: object) -> None:
    dataset = LogitDataset(url, shuffle=True, cache_dir=cache, cache_limit_bytes=limit)
    results.put([digests(loader(dataset, 9)) for _ in range(2)])


def test_processes_share_a_cache_that_is_too_small(proxy, folder, tmp_path, expected):
    whole = sum(p.stat().st_size for p in (folder / "st" / "shards").iterdir())
    limit = 20_000 + whole // 3
    results = PROCESSES.SimpleQueue()
    url = f"{proxy.url}/st"
    workers = [
        PROCESSES.Process(target=train, args=(url, str(tmp_path), limit, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    other = digests(loader(LogitDataset(folder / "st", shuffle=True, epoch=1), 9))
    assert found == [[expected, other]] * 3
    cache = Cache(tmp_path, limit)
    assert 0 < cache.size_bytes() <= limit
    assert 0 < len(chunks(tmp_path)) < 20
    assert not list((cache.folder / "tmp").iterdir())
    report("small cache", f"3 processes, 6 epochs, {limit} bytes for {whole}: 0 batches differ")


def test_the_oldest_go_first_and_documents_last(tmp_path):
    cache = Cache(tmp_path, 1_000)
    for name in ("a/store.json", "a/shards/x/0-96", "a/shards/x/96-96", "a/shards/y/0-96"):
        assert cache.write(name, bytes(96))
        time.sleep(0.02)  # the clock of file times is coarse
    assert cache.read("a/shards/x/0-96") == bytes(96)  # used last now
    for number in range(8):
        assert cache.write(f"a/shards/z/{number}-96", bytes(96))
        assert cache.size_bytes() <= 1_000
    assert cache.holds("a/store.json")
    assert not cache.holds("a/shards/x/96-96")
    assert not cache.holds("a/shards/y/0-96")
    assert cache.holds("a/shards/x/0-96")
    assert not cache.write("a/shards/big/0-2000", bytes(2_000))
    assert not list((cache.folder / "tmp").iterdir())


def test_nothing_of_an_offline_store_is_removed(proxy, tmp_path, expected):
    url = f"{proxy.url}/st"
    digests(loader(LogitDataset(url, cache_dir=tmp_path), 9))
    size = Cache(tmp_path).size_bytes()
    offline = LogitDataset(url, shuffle=True, cache_dir=tmp_path, offline=True, cache_bytes=0)
    other = f"{proxy.url}/other"
    # No room beside it: read, not kept.
    full = LogitDataset(other, cache_dir=tmp_path, cache_limit_bytes=size)
    keys = [b.sample_keys for b in loader(full, 9)]
    assert len(keys) == 12
    assert digests(loader(offline, 9)) == expected
    offline.close()
    list(loader(LogitDataset(other, cache_dir=tmp_path, cache_limit_bytes=size), 9))
    with pytest.raises(NotFoundError, match="not-cached"):
        LogitDataset(url, cache_dir=tmp_path, offline=True)
    assert Cache(tmp_path).size_bytes() <= size


def test_crashes_leave_nothing_that_stays(tmp_path):
    cache = Cache(tmp_path)
    dead, alive = cache.folder / "tmp" / "dead", cache.folder / "tmp" / "alive"
    for path in (dead, alive):
        path.write_bytes(b"half an ent")
    os.utime(dead, (0, 0))
    (cache.folder / "size").write_text("")  # torn
    cache = Cache(tmp_path)
    assert not dead.exists()
    assert alive.exists()
    assert cache.write("a/store.json", b"x" * 10)
    assert int((cache.folder / "size").read_text()) == cache.size_bytes() == 14


# large entries, which are mapped


def test_a_mapped_entry_outlives_its_removal_and_holds_no_descriptor(tmp_path):
    cache = Cache(tmp_path, 500_000)
    contents = {f"a/shards/x/{i}-100000": os.urandom(100_000) for i in range(4)}
    for name, data in contents.items():
        assert cache.write(name, data)
    descriptors = len(os.listdir("/proc/self/fd"))
    held = {name: cache.read_checked(name) for name in contents}
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(mapping._alive) >= {
        np.frombuffer(data, np.uint8).ctypes.data for data, _ in held.values()
    }
    for number in range(4):
        assert cache.write(f"a/shards/y/{number}-100000", bytes(100_000))
    assert not any(cache.holds(name) for name in contents)
    for name, (data, checksum) in held.items():
        assert data.readonly
        assert data == contents[name]
        assert checksum == crc32c(data)
    before = len(mapping._alive)
    held.clear()
    del data
    assert len(mapping._alive) == before - 4


@pytest.mark.parametrize("number", range(3))
def test_a_damaged_large_entry_is_removed(tmp_path, number):
    cache = Cache(tmp_path)
    contents = os.urandom(100_000)
    assert cache.write("a/shards/x/0-100000", contents)
    path = next(p for p in entries(tmp_path))
    data = bytearray(path.read_bytes())
    data[70_000] ^= 4
    path.write_bytes([data, data[:70_000], b""][number])
    assert cache.read("a/shards/x/0-100000") is None
    assert not path.exists()
    assert cache.write("a/shards/x/0-100000", contents)
    assert cache.read("a/shards/x/0-100000") == contents


def test_pages_that_cannot_be_had_cost_the_entry_and_not_the_process(tmp_path, monkeypatch):
    """Cut while it is mapped: touching the lost pages would be the end (SIGBUS)."""
    cache = Cache(tmp_path)
    contents = os.urandom(100_000)
    cache.write("a/shards/x/0-100000", contents)
    path = next(p for p in entries(tmp_path))
    populate = mapping._madvise()

    def cut_first(*arguments: int) -> int:
        os.truncate(path, 5_000)
        return populate(*arguments)

    monkeypatch.setattr(mapping, "_madvise", lambda: cut_first)
    assert cache.read("a/shards/x/0-100000") is None
    assert not path.exists()


def test_without_mappings_entries_are_read(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    contents = os.urandom(100_000)
    cache.write("a/shards/x/0-100000", contents)
    before = len(mapping._alive)
    for name, value in (("MAX_MAPPINGS", before), ("_madvise", lambda: lambda *_: -1)):
        with monkeypatch.context() as patch:
            patch.setattr(mapping, name, value)
            held = cache.read_checked("a/shards/x/0-100000")
            assert held is not None
            assert held[0] == contents
            assert len(mapping._alive) == before


def test_the_cache_is_private(tmp_path):
    previous = os.umask(0o000)
    try:
        cache = Cache(tmp_path / "new")
        cache.write("a/shards/x/0-3", b"abc")
    finally:
        os.umask(previous)
    assert cache.folder.stat().st_mode & 0o077 == 0  # whatever is below cannot be reached
    cache.folder.chmod(0o777)
    with pytest.raises(StorageError, match="plant"):
        Cache(tmp_path / "new")


def test_a_full_disk_costs_the_cache_and_not_the_training(
    proxy, expected, tmp_path, monkeypatch, caplog
):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    url = f"{proxy.url}/st"
    dataset = LogitDataset(url, shuffle=True, cache_dir=tmp_path)
    monkeypatch.setattr("logitstore.store.cache.os.rename", full)
    assert digests(loader(dataset, 9)) == expected
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1


def test_an_unsealed_bucket_works_offline(tmp_path, monkeypatch):
    import boto3
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    style = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=style)
    client.create_bucket(Bucket="data")
    client.close()
    samples = random_samples(30)
    make_store("s3://data/st", samples[:20], shards=2).close()
    opened = LogitDataset("s3://data/st", cache_dir=tmp_path)
    batches = digests(loader(opened, 4))
    add_shard("s3://data/st", samples[20:])
    server.stop()
    offline = LogitDataset("s3://data/st", cache_dir=tmp_path, offline=True)
    assert digests(loader(offline, 4)) == batches
    assert offline.store.snapshot == opened.store.snapshot
    next(p for p in entries(tmp_path) if "commits" in p.parts and "lists" not in p.parts).unlink()
    with pytest.raises(NotFoundError, match="commits/0001"):
        logitstore.store.open("s3://data/st", cache_dir=tmp_path, offline=True)


def test_a_cache_beside_an_open_store_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="cache_dir"):
        LogitDataset(logitstore.store.open(folder / "st"), cache_dir=tmp_path)
    with pytest.raises(UsageError, match="cache_limit_bytes"):
        logitstore.store.open("http://127.0.0.1:9/st", cache_dir=tmp_path, cache_limit_bytes=0)


# fetching ahead


def test_lookahead_tells_each_chunk_once_in_time_and_not_too_early():
    needs = {batch: [(0, batch), (0, batch + 1)] for batch in range(40)}
    ahead = Lookahead(needs.__getitem__, first=0, step=1, stop=40, distance=6)
    told: list[tuple[int, int]] = []
    for batch in range(40):
        told += ahead.at(batch)
        assert set(needs[batch]) <= set(told)
        assert len(told) <= batch + 2 + 6 + 1
    assert told == [(0, chunk) for chunk in range(41)]
    second = Lookahead(needs.__getitem__, first=1, step=2, stop=40)
    assert second.at(1)[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_only_what_the_cache_lacks_is_fetched_by_threads(proxy, expected, tmp_path, monkeypatch):
    url = f"{proxy.url}/st"
    digests(loader(LogitDataset(url, cache_dir=tmp_path), 9))
    lost = sorted(chunks(tmp_path))[::5]
    for path in lost:
        path.unlink()
    batches = loader(LogitDataset(url, shuffle=True, cache_dir=tmp_path), 9)
    read, by_thread = batches.source.store.chunk_bytes, set()

    def noted(shard: int, chunk: int) -> memoryview:
        if threading.current_thread() is not threading.main_thread():
            by_thread.add((shard, chunk))
        return read(shard, chunk)

    monkeypatch.setattr(batches.source.store, "chunk_bytes", noted)
    assert digests(batches) == expected
    # Opening the dataset has read some of them already, here.
    assert 1 < len(by_thread) <= len(lost)
    assert all(path.exists() for path in lost)


def test_fetching_ahead_overlaps_with_training(proxy, expected, monkeypatch):
    """The share of time that the trainer waits is printed; that requests overlap is tested."""
    proxy.delay_s = 0.02
    shares = {}
    for distance in (0, 32):
        monkeypatch.setattr(Lookahead.__init__, "__defaults__", (distance,))
        running, most, asked = [0], [0], set()
        batches = loader(LogitDataset(f"{proxy.url}/st", shuffle=True), 9)
        read = batches.source.store.chunk_bytes

        def counted(shard, chunk, read=read, running=running, most=most, asked=asked):
            asked.add((shard, chunk))
            running[0] += 1
            most[0] = max(most[0], running[0])
            try:
                return read(shard, chunk)
            finally:
                running[0] -= 1

        monkeypatch.setattr(batches.source.store, "chunk_bytes", counted)
        waited, found, started = 0.0, [], time.perf_counter()
        stream = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(stream, None)
            waited += time.perf_counter() - before
            if batch is None:
                break
            found.append(batch)
            time.sleep(0.02)  # the training step
        shares[distance] = waited / (time.perf_counter() - started)
        assert digests(found) == expected
        assert most[0] == 1 if distance == 0 else most[0] > 1
        assert len(asked) == len(batches.source.chunks_of(range(100)))
    report(
        "trainer waits",
        f"20 ms to the server, steps of 20 ms: {shares[0]:.0%} of the time without fetching "
        f"ahead, {shares[32]:.0%} with it",
    )
