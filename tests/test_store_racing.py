"""Writers of one shard on a disk: one winner, whoever is slow, and whatever reply is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from logitstore import store
from logitstore.record.statistics import statistics_of
from logitstore.spec.errors import CommitError, StorageError
from logitstore.store.local import LocalBackend
from tests import store_push
from tests.store_push import PROCESSES
from tests.store_report import report


def race(location: str, barrier, results) -> None:
    with store.append(location) as writer:
        planned = writer.plans()[0]
        with writer.begin("0001-000000", planned) as attempt:
            record = store_push.record(writer.header, "0001-000000", 0)
            attempt.add(record)
            barrier.wait()
            try:
                attempt.commit(statistics=statistics_of(record))
                results.put(("won", attempt.attempt))
            except CommitError as error:
                results.put((error.kind, error.data.get("same_bytes")))


def test_of_32_racing_processes_exactly_one_wins(tmp_path):
    location = str(tmp_path / "st")
    with store.create(location, store_push.header()) as writer:
        writer.add_plan(store_push.plan(writer.header, 1))
    racers, barrier, results = 32, PROCESSES.Barrier(32), PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=race, args=(location, barrier, results)) for _ in range(racers)
    ]
    for process in processes:
        process.start()
    outcomes = [results.get() for _ in processes]
    for process in processes:
        process.join()
    winners = [attempt for word, attempt in outcomes if word == "won"]
    assert len(winners) == 1
    assert outcomes.count(("already-committed", True)) == racers - 1
    opened = store.open(location)
    assert opened.commit(0).attempt == winners[0]
    # The losers removed what they wrote.
    assert len(list((tmp_path / "st" / "shards").iterdir())) == 1
    assert store.verify(location, full=True).ok
    report("race", f"{racers} committers of one shard, {len(winners)} winner")


def start(location: str, barrier, results) -> None:
    barrier.wait()
    with store.create(location, store_push.header(), store_push.tables()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        results.put((writer.header.store_uuid, planned.fingerprint))


def test_racing_starters_agree_on_one_store(tmp_path):
    location = str(tmp_path / "deep" / "er" / "st")
    barrier, results = PROCESSES.Barrier(8), PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=start, args=(location, barrier, results)) for _ in range(8)
    ]
    for process in processes:
        process.start()
    seen = {results.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(seen) == 1
    assert seen.pop()[0] == store.open(location).header.store_uuid


def test_losing_with_other_bytes_says_so(tmp_path):
    with store.create(tmp_path / "st", store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        late = writer.begin("0001-000000", planned)
        store_push.commit_shard(writer, planned, "0001-000000")
        record = store_push.record(writer.header, "0001-000000", 9)
        late.add(record)
        with pytest.raises(CommitError) as caught:
            late.commit(statistics=statistics_of(record))
        assert (caught.value.kind, caught.value.data) == (
            "already-committed",
            {"same_bytes": False},
        )
        with pytest.raises(CommitError, match="already-committed"):
            writer.begin("0001-000000", planned)


def sleeping(location: str, ready, results) -> None:
    """A worker that stops after writing its object and is woken after gc."""
    with (
        store.append(location) as writer,
        writer.begin("0001-000000", writer.plans()[0]) as attempt,
    ):
        record = store_push.record(writer.header, "0001-000000", 0)
        attempt.add(record)
        stop = LocalBackend.size

        def size(self, key):
            LocalBackend.size = stop
            ready.put(os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
            return stop(self, key)

        LocalBackend.size = size
        try:
            attempt.commit(statistics=statistics_of(record))
            results.put("committed")
        except (StorageError, CommitError) as error:
            results.put(error.kind)


@pytest.mark.parametrize("meanwhile", ["another commits", "its object is collected"])
def test_a_worker_that_wakes_up_late_cannot_harm(tmp_path, meanwhile):
    location = str(tmp_path / "st")
    with store.create(location, store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        ready, results = PROCESSES.SimpleQueue(), PROCESSES.SimpleQueue()
        process = PROCESSES.Process(target=sleeping, args=(location, ready, results))
        process.start()
        pid = ready.get()
        # It stopped itself right after telling its pid: wait until the system shows it so.
        stat = Path(f"/proc/{pid}/stat")
        while stat.read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.01)
        if meanwhile == "another commits":
            store_push.commit_shard(writer, planned, "0001-000000")
        else:
            plan = store.gc(location, grace_s=0, abandoned=True, dry_run=False)
            assert [d.reason for d in plan.deletions] == ["abandoned-attempt"]
        os.kill(pid, signal.SIGCONT)
        told = results.get()
        process.join()
    expected = {"another commits": "already-committed", "its object is collected": "storage-failed"}
    assert told == expected[meanwhile]
    assert store.verify(location, full=True).ok


# lost replies


@pytest.mark.parametrize("reply", ["taken", "error"])
def test_a_lost_reply_is_recognised_as_own(tmp_path, monkeypatch, reply):
    honest = LocalBackend.create

    def losing(self, key, data, *, kind):
        created = honest(self, key, data, kind=kind)
        if kind == "commit" and created:
            if reply == "error":
                raise StorageError("storage-failed", "connection reset", where=key)
            return False
        return created

    monkeypatch.setattr(LocalBackend, "create", losing)
    store_push.push(str(tmp_path / "st"), "zarr")
    opened = store.open(tmp_path / "st")
    assert (len(opened), opened.sealed) == (18, True)
    assert store.verify(tmp_path / "st", full=True).ok


def test_an_error_without_a_commit_stays_an_error(tmp_path, monkeypatch):
    with store.create(tmp_path / "st", store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))

        def failing(self, key, data, *, kind):
            raise StorageError("storage-failed", "connection reset", where=key)

        monkeypatch.setattr(LocalBackend, "create", failing)
        with pytest.raises(StorageError, match="connection reset"):
            store_push.commit_shard(writer, planned, "0001-000000")
        monkeypatch.undo()
        store_push.commit_shard(writer, planned, "0001-000000")
