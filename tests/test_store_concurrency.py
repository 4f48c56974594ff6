"""Readers beside writers, and writers killed at random moments beside a naive one."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from logitstore import store
from logitstore.spec.errors import CommitError
from tests import store_push
from tests.store_push import PROCESSES
from tests.store_report import report

SHARDS = 60


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=store_push.MEMORY, prefix="logitstore-test-") as folder:
        yield Path(folder)


def write(location: str, seed: int) -> None:
    """One of several workers on the same store, each in an order of its own."""
    with store.append(location) as writer:
        planned = writer.plans()[0]
        names = [each.shard for each in planned.shards]
        random.Random(seed).shuffle(names)
        for shard in names:
            if shard not in writer.committed():
                try:
                    store_push.commit_shard(writer, planned, shard)
                except CommitError as error:
                    if error.kind != "already-committed":
                        raise


def check_snapshot(opened: store.Store, rng: random.Random) -> None:
    """Order, numbers and values of one snapshot belong together."""
    names = [view.shard for view in opened.shards]
    assert names == sorted(set(names))
    assert len(opened) == 6 * len(names)
    if names:
        sample = rng.randrange(len(opened))
        record = opened.sample(sample)
        shard, chunk, row = names[sample // 6], sample % 6 // 3, sample % 3
        expected = store_push.record(opened.header, shard, chunk).sample(row)
        assert all(np.array_equal(record[name], expected[name]) for name in expected.arrays)


def test_readers_see_whole_snapshots_while_workers_write(memory_path):
    location = str(memory_path / "st")
    with store.create(location, store_push.header(), store_push.tables()) as writer:
        writer.add_plan(store_push.plan(writer.header, SHARDS))
    workers = [PROCESSES.Process(target=write, args=(location, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    rng = random.Random(0)
    snapshots: list[store.Store] = []
    while any(worker.is_alive() for worker in workers):
        snapshots.append(store.open(location))
        check_snapshot(snapshots[-1], rng)
        store.gc(location, dry_run=False)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store.append(location).seal()
    snapshots.append(store.open(location))
    assert len(snapshots[-1].shards) == SHARDS
    seen: set[tuple[str, int]] = set()
    for opened in snapshots:
        held = set(opened.snapshot.commits)
        assert seen <= held, "a shard that was seen is gone"
        seen = held
        # What was pinned long ago reads as it did.
        check_snapshot(opened, rng)
        again = store.open(location, snapshot=opened.snapshot)
        assert again.shards == opened.shards
    assert store.verify(location, full=True).ok
    report("snapshots", f"{len(snapshots)} snapshots during writes, 0 inconsistent")


# random kills


def push_all(location: str, log: str) -> None:
    with (
        open(log, "a") as lines,
        store.create(location, store_push.header(), store_push.tables()) as writer,
    ):
        planned = writer.add_plan(store_push.plan(writer.header, 6))
        held = writer.committed()
        for each in planned.shards:
            if each.shard not in held:
                store_push.commit_shard(writer, planned, each.shard)
                print(each.shard, file=lines, flush=True)
        writer.seal()


def kill_at_random(process, rng: random.Random, longest_s: float) -> bool:
    """Start it and kill it after a random time; whether it was still running."""
    process.start()
    time.sleep(rng.uniform(0, longest_s))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_hundred_random_kills(memory_path):
    started = time.monotonic()
    push_all(str(memory_path / "timing"), os.devnull)
    longest_s = 1.5 * (time.monotonic() - started) + 0.05
    rng = random.Random(0)
    kills = stores = 0
    while kills < 500:
        location, log = str(memory_path / f"st-{stores}"), memory_path / f"{stores}.log"
        log.touch()
        stores += 1
        while not Path(location, "index.json").exists():
            kills += kill_at_random(
                PROCESSES.Process(target=push_all, args=(location, str(log))), rng, longest_s
            )
            if Path(location, "store.json").exists():
                assert store.verify(location, full=True).ok
                visible = {view.shard for view in store.open(location).shards}
                assert set(log.read_text().split()) <= visible
        opened = store.open(location)
        keys = [opened.sample(i).sample_keys()[0] for i in range(len(opened))]
        assert len(keys) == len(set(keys)) == 36
    report(
        "random-kills",
        f"{kills} kills over {stores} stores: 0 unreadable, 0 committed shards lost, 0 doubled",
    )


def push_naively(folder: str) -> None:
    """What a capture script often does: a shard under its final name, a manifest rewritten."""
    shards = []
    for number in range(40):
        name = f"shard-{number}.npy"
        np.save(Path(folder, name), np.full(500_000, number, np.float64))
        shards.append({"name": name, "bytes": 4_000_128, "padding": "x" * 5_000})
        Path(folder, "manifest.json").write_text(json.dumps(shards))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sixty_random_kills_of_a_naive_writer_do_harm(tmp_path):
    """The baseline of the test above; it shows that these kills find what can go wrong."""
    (tmp_path / "timing").mkdir()
    started = time.monotonic()
    push_naively(str(tmp_path / "timing"))
    longest_s = time.monotonic() - started
    rng = random.Random(0)
    kills = unreadable = half = 0
    while kills < 60:
        folder = tmp_path / f"naive-{kills}"
        folder.mkdir(exist_ok=True)
        kills += kill_at_random(
            PROCESSES.Process(target=push_naively, args=(str(folder),)), rng, longest_s
        )
        try:
            manifest = folder / "manifest.json"
            listed = json.loads(manifest.read_text()) if manifest.exists() else []
        except ValueError:
            unreadable += 1
            listed = []
        present = list(folder.glob("*.npy"))
        half += any(path.stat().st_size != 4_000_128 for path in present)
        assert len(listed) <= 40
        for path in present:
            path.unlink()
    assert unreadable + half > 0
    report(
        "random-kills-naive",
        f"{kills} kills of a naive writer: {unreadable} unreadable manifests, {half} half shards",
    )
