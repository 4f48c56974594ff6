"""Exact resume: at every batch, whatever was prefetched, for any number of workers and ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from logitstore.data import Batch, Loader, LogitDataset, collate, loader
from logitstore.spec.errors import IntegrityError, StateError, UsageError
from tests.data_stores import add_shard, make_header, make_store, random_samples

# More workers than this machine may have cores are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SAMPLES = random_samples(61)
BATCH_SIZE = 10  # 61 samples: seven batches, the last one short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    location = tmp_path_factory.mktemp("loader") / "store"
    make_store(location, SAMPLES, shards=5).close()
    return location


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    after = [p for p in psutil.Process().children(recursive=True) if p not in before]
    # The resource tracker and fork server belong to multiprocessing and serve later tests too.
    left = [p for p in after if not {"resource_tracker", "forkserver"} & set(words(p))]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive


def words(process: psutil.Process) -> list[str]:
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return []
    return [w for w in ("resource_tracker", "forkserver") if w in line]


def dataset(folder: Path, **options: Any) -> LogitDataset:
    return LogitDataset(folder, **{"shuffle": True, "seed": 5, **options})


def content(batch: Batch) -> tuple[Any, ...]:
    """Everything that a student sees of a batch."""
    tensors = (batch.tokens, batch.labels, batch.targets.ids, batch.targets.logprobs)
    return (batch.sample_keys, *(t.numpy().tobytes() for t in tensors))


def rest(loader: Loader) -> list[tuple[Any, ...]]:
    return [content(batch) for batch in loader]


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


WORKERS = [
    pytest.param({"num_workers": 0}, id="0"),
    pytest.param({"num_workers": 1, "multiprocessing_context": "fork"}, id="1-fork"),
    # All seven batches of an epoch are prefetched at once.
    pytest.param(
        {"num_workers": 4, "multiprocessing_context": "fork", "prefetch_factor": 2}, id="4-fork"
    ),
]


@pytest.mark.parametrize("workers", WORKERS)
def test_every_stop_point_resumes_exactly(folder, workers):
    """Two epochs; every batch of both is a stop point, each resumed in a loader of its own."""
    whole = loader(dataset(folder), BATCH_SIZE, **workers)
    batches, states = [], []
    for _ in range(2):
        for batch in whole:
            batches.append(content(batch))
            states.append((batch.state, whole.state_dict()))
    assert len(batches) == 2 * len(whole) == 14
    assert set(batches[:7]).isdisjoint(batches[7:])

    tried = mismatches = 0
    for stop, (carried, asked) in enumerate(states[:-1], start=1):
        assert carried == asked
        resumed = loader(dataset(folder), BATCH_SIZE, **workers)
        resumed.load_state_dict(through_json(carried))
        tried += 1
        mismatches += rest(resumed) != batches[stop : 7 if stop < 7 else 14]
    print(f"stop points {tried}, workers {workers}: mismatches {mismatches}")
    assert mismatches == 0


@pytest.mark.parametrize(
    ("start", "number"),
    [("fork", 1), ("fork", 4), ("spawn", 1), ("spawn", 4)],
)
def test_persistent_workers_resume_at_every_stop_point(folder, start, number):
    """The same workers serve all resumes and epochs: nothing of an earlier place may stick."""
    options = {
        "num_workers": number,
        "multiprocessing_context": start,
        "persistent_workers": True,
    }
    expected = {}
    for epoch in range(3):
        expected[epoch] = rest(loader(dataset(folder, epoch=epoch), BATCH_SIZE))
    states = [batch.state for batch in loader(dataset(folder, epoch=1), BATCH_SIZE)]

    one = loader(dataset(folder), BATCH_SIZE, **options)
    assert rest(one) == expected[0]
    tried = mismatches = 0
    for stop, state in enumerate(states[:-1], start=1):
        one.load_state_dict(through_json(state))
        if stop % 3 == 0:
            next(iter(one))  # a reader that stops right away, with batches in flight
            one.load_state_dict(through_json(state))
        tried += 1
        mismatches += rest(one) != expected[1][stop:]
    assert rest(one) == expected[2]
    print(f"stop points {tried}, {number} persistent {start} workers: mismatches {mismatches}")
    assert mismatches == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_resumes_in_one_epoch(folder, num_workers):
    expected = rest(loader(dataset(folder), BATCH_SIZE))
    tried = mismatches = 0
    options = {"num_workers": num_workers}
    pairs = [(a, b) for a in range(1, 6) for b in range(a + 1, 7)]
    for first, second in pairs if num_workers == 0 else pairs[::4]:
        got = []
        state = None
        for stop in (first, second, 7):
            part = loader(dataset(folder), BATCH_SIZE, **options)
            if state is not None:
                part.load_state_dict(through_json(state))
            for batch in part:
                got.append(content(batch))
                state = part.state_dict()
                if len(got) == stop:
                    break
        tried += 1
        mismatches += got != expected
    print(f"pairs of stop points {tried}, {num_workers} workers: mismatches {mismatches}")
    assert mismatches == 0


def test_state_before_the_first_batch_and_after_the_last(folder):
    fresh = loader(dataset(folder), BATCH_SIZE)
    start = fresh.state_dict()
    first = rest(fresh)
    end = fresh.state_dict()
    assert (start["epoch"], start["consumed"]) == (0, 0)
    assert (end["epoch"], end["consumed"]) == (1, 0)

    again = loader(dataset(folder), BATCH_SIZE)
    again.load_state_dict(start)
    assert rest(again) == first
    second = rest(fresh)
    later = loader(dataset(folder), BATCH_SIZE)
    later.load_state_dict(end)
    assert rest(later) == second != first


def test_epochs_advance_by_themselves_or_are_set(folder):
    source = dataset(folder)
    one = loader(source, BATCH_SIZE)
    epochs = [rest(one) for _ in range(3)]
    assert len({tuple(e) for e in epochs}) == 3
    assert source.epoch == 3
    one.set_epoch(1)
    assert rest(one) == epochs[1]
    source.set_epoch(0)
    assert rest(one) == epochs[0]
    # A loop that stops early begins the same epoch again.
    next(iter(one))
    assert rest(one) == epochs[1]


def test_set_epoch_to_the_epoch_of_a_loaded_state_keeps_its_place(folder):
    expected = rest(loader(dataset(folder, epoch=2), BATCH_SIZE))
    states = [batch.state for batch in loader(dataset(folder, epoch=2), BATCH_SIZE)]
    one = loader(dataset(folder), BATCH_SIZE)
    one.load_state_dict(states[3])
    one.set_epoch(2)
    assert rest(one) == expected[4:]
    one.load_state_dict(states[3])
    one.set_epoch(4)
    assert rest(one) == rest(loader(dataset(folder, epoch=4), BATCH_SIZE))


def test_another_batch_size_continues_with_the_unseen(folder):
    states = [batch.state for batch in loader(dataset(folder), BATCH_SIZE)]
    seen = [key for part in rest(loader(dataset(folder), BATCH_SIZE))[:4] for key in part[0]]
    other = loader(dataset(folder), 5)
    other.load_state_dict(states[3])
    left = [key for batch in other for key in batch.sample_keys]
    assert sorted(seen + left) == sorted(s.key for s in SAMPLES)


# ranks


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_rank_makes_the_same_number_of_steps(folder, world_size, drop_last):
    steps, seen = set(), []
    for rank in range(world_size):
        part = loader(dataset(folder, rank=rank, world_size=world_size), 4, drop_last=drop_last)
        batches = [batch.sample_keys for batch in part]
        assert len(batches) == len(part)
        steps.add(len(batches))
        seen += [key for batch in batches for key in batch]
        assert all(len(b) == 4 for b in batches[:-1])
        assert len(batches[-1]) == 4 if drop_last else 1 <= len(batches[-1]) <= 5
    assert len(steps) == 1
    assert len(seen) == len(set(seen))
    if not drop_last:
        assert sorted(seen) == sorted(s.key for s in SAMPLES)


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in (1, 3, 8) for b in (1, 2, 5)])
def test_another_world_size_continues_with_exactly_the_unseen(folder, before, after):
    """Stopped after every possible step; the state of one rank serves all."""
    mismatches = tried = 0
    runs = [
        list(loader(dataset(folder, rank=rank, world_size=before), 2)) for rank in range(before)
    ]
    for step in range(1, len(runs[0])):
        seen = [key for run in runs for batch in run[:step] for key in batch.sample_keys]
        assert len({json.dumps(run[step - 1].state) for run in runs}) == 1
        state = through_json(runs[0][step - 1].state)
        left = []
        for rank in range(after):
            part = loader(dataset(folder, rank=rank, world_size=after), 2)
            part.load_state_dict(state)
            left += [key for batch in part for key in batch.sample_keys]
            assert part.source.epoch == 1
        tried += 1
        # With fewer samples left than ranks the epoch is over: no rank may step alone.
        enough = len(SAMPLES) - len(seen) >= after
        mismatches += sorted(seen + left) != sorted(s.key for s in SAMPLES) and enough
    print(f"world size {before} -> {after}, stops {tried}: mismatches {mismatches}")
    assert mismatches == 0


# the store grows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_grew_is_read_at_the_pinned_snapshot_until_the_epoch_ends(
    tmp_path, num_workers
):
    plan = add_growing(tmp_path)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    expected = rest(loader(dataset(tmp_path), BATCH_SIZE))
    running = loader(dataset(tmp_path), BATCH_SIZE, **options)
    reading = iter(running)
    state = [next(reading) for _ in range(3)][-1].state
    more = random_samples(9, seed=1)
    add_shard(tmp_path, more, plan=plan)
    # Shards of a second plan too, so that old numbers and new numbers of samples differ.
    add_shard(tmp_path, random_samples(4, seed=2))

    assert [content(batch) for batch in reading] == expected[3:]
    resumed = loader(dataset(tmp_path), BATCH_SIZE, **options)
    assert len(resumed.source) == 61 + 9 + 4
    resumed.load_state_dict(through_json(state))
    assert rest(resumed) == expected[3:]
    # The next epoch has everything.
    following = [key for part in rest(resumed) for key in part[0]]
    assert len(following) == len(set(following)) == 61 + 9 + 4
    # An old state's place is not one of the new snapshot's.
    assert rest(loader(dataset(tmp_path), BATCH_SIZE))[3:] != expected[3:]


def add_growing(location: Path):
    import logitstore.store

    logitstore.store.create(location, make_header()).close()
    plan = None
    for start in range(0, 61, 20):
        plan = add_shard(location, SAMPLES[start : start + 20], plan=plan)
    return plan


# states


def test_state_is_small_versioned_json(folder):
    one = loader(dataset(folder), BATCH_SIZE)
    next(iter(one))
    state = one.state_dict()
    assert len(json.dumps(state)) < 1000
    assert state["version"] == 1
    assert state["snapshot"]["store_uuid"] == one.source.header.store_uuid
    assert state["order"]["seed"] == 5
    assert state["consumed"] == BATCH_SIZE


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 6},
        {"shuffle": False},
        {"filter": [("length", ">", 3)]},
        {"max_samples": 50},
        {"holdout": 0.1},
        {"holdout": 0.1, "split": "validation"},
        {"tail": "drop"},
    ],
)
def test_a_state_of_another_order_is_refused_by_name(folder, options):
    state = loader(dataset(folder), BATCH_SIZE).state_dict()
    other = loader(dataset(folder, **options), BATCH_SIZE)
    with pytest.raises(StateError, match="state-mismatch") as caught:
        other.load_state_dict(state)
    assert next(iter(options)) in str(caught.value)
    # The refused state has changed nothing.
    assert rest(other) == rest(loader(dataset(folder, **options), BATCH_SIZE))


def test_a_state_of_another_store_or_later_snapshot_is_refused(folder, tmp_path):
    plan = add_growing(tmp_path / "a")
    state = loader(dataset(folder), BATCH_SIZE).state_dict()
    early = loader(dataset(tmp_path / "a"), BATCH_SIZE)
    with pytest.raises(StateError, match="another store"):
        early.load_state_dict(state)
    add_shard(tmp_path / "a", random_samples(9, seed=1), plan=plan)
    later = loader(dataset(tmp_path / "a"), BATCH_SIZE).state_dict()
    with pytest.raises(StateError, match="state-mismatch") as caught:
        early.load_state_dict(later)
    assert "0001-000004" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"epoch": -1},
        {"consumed": "6"},
        {"world_size": 0},
        {"intervals": [[5, 2]]},
        {"intervals": [[0, 1000]]},
        {"snapshot": {}},
        {"extra": 1},
    ],
)
def test_a_malformed_state_is_refused(folder, change):
    one = loader(dataset(folder), BATCH_SIZE)
    with pytest.raises(StateError, match="state-malformed"):
        one.load_state_dict({**one.state_dict(), **change})
    with pytest.raises(StateError, match="state-malformed"):
        one.load_state_dict({})


# processes


class ThreadCount:
    """Collates, and says how many threads torch would use and in which process."""

    def __call__(self, items):
        batch = collate(items)
        keys = (str(torch.get_num_threads()), str(os.getpid()))
        return Batch(**{**vars(batch), "sample_keys": keys})


def test_workers_use_one_thread_and_end(folder):
    one = loader(dataset(folder), BATCH_SIZE, num_workers=1, collate_fn=ThreadCount())
    seen = {batch.sample_keys for batch in one}
    assert len(seen) == 1
    threads, pid = seen.pop()
    assert threads == "1"
    assert int(pid) != os.getpid()
    # Stopping in the middle must end them too; the fixture looks.
    reading = iter(one)
    next(reading)
    del reading


def test_an_error_in_a_worker_keeps_its_class_and_kind(tmp_path):
    make_store(tmp_path, SAMPLES, shards=1).close()
    one = loader(dataset(tmp_path), BATCH_SIZE, num_workers=1)
    (path,) = (tmp_path / "shards").iterdir()
    data = bytearray(path.read_bytes())
    commit = one.source.store.commit(0)
    chunk = commit.chunks[len(commit.chunks) // 2]
    data[chunk.offset + chunk.bytes // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="chunk-checksum-mismatch"):
        rest(one)


def test_arguments_that_contradict_the_dataset_are_refused(folder):
    with pytest.raises(UsageError, match="the dataset decides the order"):
        loader(dataset(folder), 2, shuffle=True)
    with pytest.raises(UsageError, match="bad-argument"):
        loader(dataset(folder), 0)


# other loaders


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.filterwarnings("ignore")
def test_torchdata_stateful_dataloader_resumes_too(folder, num_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def fresh():
        return stateful.StatefulDataLoader(
            dataset(folder),
            batch_size=BATCH_SIZE,
            collate_fn=collate,
            num_workers=num_workers,
            multiprocessing_context=multiprocessing.get_context("fork") if num_workers else None,
        )

    whole = [content(batch) for batch in fresh()]
    for stop in (1, 4, 6):
        first = fresh()
        reading = iter(first)
        for _ in range(stop):
            next(reading)
        state = first.state_dict()
        del reading
        second = fresh()
        second.load_state_dict(state)
        assert [content(batch) for batch in second] == whole[stop:]
