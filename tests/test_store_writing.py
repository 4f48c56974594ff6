"""Writing to a disk: flushed in order, nothing lost to a kill or a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from logitstore import store
from logitstore.spec.errors import NotFoundError, StorageError
from logitstore.store import local, steps
from tests import store_push
from tests.store_push import PROCESSES
from tests.store_report import report

SHARDS = 2


def check_complete(location: str, container: str, reference: dict[str, str]) -> None:
    """Sealed, undamaged, every shard once, bytes as in an undisturbed run."""
    found = store.verify(location, full=True)
    assert found.problems == []
    opened = store.open(location)
    assert opened.sealed
    assert {
        v.shard: opened.commit(i).object.sha256 for i, v in enumerate(opened.shards)
    } == reference
    keys = [opened.sample(i, ["sample_key"]).sample_keys()[0] for i in range(len(opened))]
    assert len(keys) == len(set(keys)) == SHARDS * 6


@pytest.fixture(params=["zarr", "arrow"])
def container(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(tmp_path, container) -> dict[str, str]:
    """shard -> sha256 of its object when nothing goes wrong."""
    location = str(tmp_path / "reference")
    store_push.push(location, container, SHARDS)
    opened = store.open(location)
    return {v.shard: opened.commit(i).object.sha256 for i, v in enumerate(opened.shards)}


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is one: these tests flush thousands of times."""
    with tempfile.TemporaryDirectory(dir=store_push.MEMORY, prefix="logitstore-test-") as folder:
        yield Path(folder)


# killed at every step


def push_and_die(location: str, container: str, log: str, kill_at: int) -> None:
    count = 0
    with open(log, "a") as lines:

        def hook(name: str) -> None:
            nonlocal count
            count += 1
            print("step", name, file=lines, flush=True)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        steps.hook = hook
        with store.create(location, store_push.header(container), store_push.tables()) as writer:
            planned = writer.add_plan(store_push.plan(writer.header, SHARDS))
            for each in planned.shards:
                store_push.commit_shard(writer, planned, each.shard)
                print("committed", each.shard, file=lines, flush=True)
            writer.seal()


def run_killed(location: str, container: str, log: Path, kill_at: int) -> list[list[str]]:
    process = PROCESSES.Process(target=push_and_die, args=(location, container, str(log), kill_at))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    return [line.split() for line in log.read_text().splitlines()]


def test_killed_at_every_write_step_then_run_again(memory_path, container, reference):
    told = run_killed(str(memory_path / "whole"), container, memory_path / "whole.log", 0)
    walked = [name for word, name in told if word == "step"]
    assert set(walked) == set(steps.STEPS), "a step exists that a push does not walk through"
    rows = []
    for number, name in enumerate(walked, 1):
        # Only objects differ between the containers.
        if container == "arrow" and not name.startswith("object:"):
            continue
        location = str(memory_path / f"killed-{number}")
        told = run_killed(location, container, memory_path / f"{number}.log", number)
        promised = {shard for word, shard in told if word == "committed"}
        visible = set()
        if Path(location, "store.json").exists():
            assert store.verify(location, full=True).problems == []
            visible = {view.shard for view in store.open(location).shards}
        assert promised <= visible, "a shard that was reported committed is lost"
        store_push.push(location, container, SHARDS)
        check_complete(location, container, reference)
        garbage = store.gc(location, grace_s=0, abandoned=True, dry_run=False)
        assert store.verify(location).ok
        rows.append(
            f"{number:>4}  {name:<15} {len(visible):>7} {len(garbage.deletions):>8}  complete"
        )
        shutil.rmtree(location)
    report(
        f"kill-steps-{container}",
        "step  killed after    visible  garbage  after the same command again",
        *rows,
        f"{len(rows)} steps enumerated, {len(rows)} killed at, {len(rows)} survived",
    )


# failing calls


class FailingOs:
    """The `os` module, of which the n-th call that changes a disk fails."""

    CHANGING = ("mkdir", "open", "write", "fsync", "link")

    def __init__(self, fail_at: int, number: int) -> None:
        self.fail_at, self.number, self.calls = fail_at, number, 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def call(*args, **kwargs):
            if name != "open" or (len(args) > 1 and args[1] & os.O_CREAT):
                self.count(name)
            return real(*args, **kwargs)

        return call

    def count(self, name: str) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.number, os.strerror(self.number), name)

    def open_file(self, descriptor, mode, **kwargs):
        """What `open` returns, with a failing write."""
        failing = self

        class File:
            def __init__(self, file) -> None:
                self._file = file

            def write(self, data):
                failing.count("file.write")
                return self._file.write(data)

            def __getattr__(self, name):
                return getattr(self._file, name)

            def __enter__(self):
                return self

            def __exit__(self, *args):
                self._file.close()

        return File(open(descriptor, mode, **kwargs))


@pytest.mark.parametrize(
    ("container", "number", "kind"),
    [
        ("zarr", errno.ENOSPC, "disk-full"),
        ("zarr", errno.EIO, "storage-failed"),
        ("arrow", errno.ENOSPC, "disk-full"),
    ],
)
def test_a_failure_of_every_write_call_is_named_and_resumed(
    memory_path, monkeypatch, container, reference, number, kind
):
    counting = FailingOs(0, number)
    monkeypatch.setattr(local, "os", counting)
    monkeypatch.setattr(local, "open", counting.open_file, raising=False)
    store_push.push(str(memory_path / "whole"), container, SHARDS)
    clean = 0
    for fail_at in range(1, counting.calls + 1):
        location = str(memory_path / f"failed-{fail_at}")
        failing = FailingOs(fail_at, number)
        monkeypatch.setattr(local, "os", failing)
        monkeypatch.setattr(local, "open", failing.open_file, raising=False)
        kinds = []
        try:
            store_push.push(location, container, SHARDS)
        except StorageError as error:
            kinds.append(error.kind)
        assert kinds in ([], [kind])
        clean += len(kinds)
        monkeypatch.setattr(local, "os", os)
        monkeypatch.delattr(local, "open")
        # No half state: no temporary file stayed, and what is there is whole.
        assert not list(Path(location).rglob("*.tmp"))
        if Path(location, "store.json").exists():
            assert store.verify(location, full=True).ok
        store_push.push(location, container, SHARDS)
        check_complete(location, container, reference)
        shutil.rmtree(location)
    # A commit whose folder could not be flushed at first is flushed again and counts: not an error.
    assert counting.calls - SHARDS <= clean <= counting.calls
    report(
        f"failing-calls-{container}-{errno.errorcode[number]}",
        f"{counting.calls} write calls failed once each: {clean} named errors, "
        f"{counting.calls - clean} survived by a second try, {counting.calls} resumed",
    )


# flushing


def test_files_and_folders_are_flushed_before_a_commit_is_reported(tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace, location = tmp_path / "trace", tmp_path / "st"
    calls = "openat,link,linkat,fsync,fdatasync,unlink,unlinkat,write,mkdir"
    command = ["strace", "-f", "-y", "-s", "40", "-e", f"trace={calls}", "-o", str(trace)]
    program = [sys.executable, store_push.__file__, str(location), "zarr", "0"]
    done = subprocess.run(
        [*command, *program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    events = list(_events(trace.read_text(), str(location)))
    linked = [(i, e) for i, e in enumerate(events) if e[0] == "link"]
    assert len(linked) == 1 + 1 + 1 + 3 + 3 + 1  # header, table, plan, objects, commits, index
    for at, (_, source, target) in linked:
        synced = max(
            (i for i, e in enumerate(events[:at]) if e == ("fsync", source, "")), default=-1
        )
        written = max(
            (i for i, e in enumerate(events[:at]) if e == ("write", source, "")), default=-1
        )
        assert -1 < written < synced < at, f"{target} was linked before its bytes were flushed"
        folder = ("fsync", str(Path(target).parent), "")
        durable = next((i for i, e in enumerate(events) if i > at and e == folder), None)
        assert durable is not None, f"the folder of {target} was not flushed"
        if "/commits/" in target:
            shard = Path(target).name[:11]
            said = next(i for i, e in enumerate(events) if e == ("said", shard, ""))
            assert durable < said, "a commit was reported before its name was durable"
            objects = [i for i, e in linked if f"/shards/{shard}." in e[2]]
            assert len(objects) == 1
            shards = ("fsync", str(location / "shards"), "")
            assert any(objects[0] < i < at for i, e in enumerate(events) if e == shards)
    # Nothing is ever opened for writing under a final name.
    assert all(name.endswith(".tmp") for word, name, _ in events if word == "create")
    for folder in ("tables", "plans", "shards", "commits"):
        made = events.index(("mkdir", str(location / folder), ""))
        assert ("fsync", str(location), "") in events[made:]
    assert ("fsync", str(tmp_path), "") in events


def _events(trace: str, location: str):
    """What happened inside the store, in order; `said` is a reported commit on stdout."""
    for line in trace.splitlines():
        call, _, rest = line.partition(" ")[2].strip().partition("(")
        names = re.findall(r'"([^"]*)"', rest)
        descriptor = re.search(r"<([^>]*)>", rest)
        held = descriptor[1] if descriptor else ""
        if call == "write" and names and names[0].startswith("committed "):
            yield "said", names[0].split("\\n")[0].split()[1], ""
        elif call in ("link", "linkat"):
            yield "link", names[0], names[1]
        elif call == "mkdir" and names[0].startswith(location):
            yield "mkdir", names[0], ""
        elif (
            call == "openat"
            and names[0].startswith(location)
            and re.search("O_WRONLY|O_RDWR", rest)
        ):
            yield "create", names[0], ""
        elif call in ("fsync", "write") and held.startswith(str(Path(location).parent)):
            yield call, held, ""


# other conditions


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", seal=False)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(local.os, "link", refuse)
    with store.append(location) as writer:
        planned = writer.plans()[0]
        with pytest.raises(StorageError, match="permission-denied"):
            store_push.commit_shard(writer, planned, "0001-000000", generation=2)


def test_permissions_are_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "st").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission-denied"):
        store.create(tmp_path / "st", store_push.header())


def test_a_file_system_without_links_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(local.os, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        store.create(tmp_path / "st", store_push.header())


def test_a_path_that_is_too_long_is_named(tmp_path):
    with pytest.raises(StorageError, match="storage-failed"):
        store.create(tmp_path / ("x" * 300), store_push.header())


def test_a_file_where_a_folder_must_be_is_named(tmp_path):
    (tmp_path / "st").write_text("")
    with pytest.raises(NotFoundError, match="not-a-store"):
        store.open(tmp_path / "st")
    with pytest.raises(StorageError, match="storage-failed"):
        store.create(tmp_path / "st", store_push.header())


def test_a_clock_that_jumps_back_harms_nothing(tmp_path, monkeypatch):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", seal=False)
    future = 4_000_000_000
    for path in Path(location).rglob("*"):
        os.utime(path, (future, future))
    stray = Path(location, "shards", "0001-000000.00000000deadbeef.zarr.zip")
    stray.write_bytes(b"x")
    os.utime(stray, (future, future))
    plan = store.gc(location, grace_s=1)
    assert (plan.deletions, plan.kept_young) == ((), 1)
    assert store.append(location).seal().samples == 18


def test_an_abandoned_attempt_leaves_nothing(tmp_path):
    with store.create(tmp_path / "st", store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        with suppress(KeyboardInterrupt), writer.begin("0001-000000", planned) as attempt:
            attempt.add(store_push.record(writer.header, "0001-000000", 0))
            raise KeyboardInterrupt
        assert list((tmp_path / "st" / "shards").iterdir()) == []


def test_objects_are_a_function_of_their_records(tmp_path, container, reference):
    store_push.push(str(tmp_path / "again"), container, SHARDS)
    for path in (tmp_path / "again" / "shards").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == reference[path.name[:11]]
    assert np.unique(list(reference.values())).size == SHARDS
