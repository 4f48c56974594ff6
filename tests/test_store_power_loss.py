"""A disk that forgets all it was not told to flush: what was reported committed is still there."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from logitstore import store
from logitstore.store import local
from tests import store_push
from tests.store_report import report

SHARDS = 2

# folder -> name -> (is a folder, inode)
Names = dict[str, dict[str, tuple[bool, int]]]


class ForgetfulDisk:
    """The `os` module for the writer; notes after each call what would survive a power cut.

    Of a file the bytes it had at its last fsync survive, nothing if it never had one; of a folder
    the names it had at its last fsync.
    """

    CHANGING = ("mkdir", "open", "write", "link")

    def __init__(self) -> None:
        self.bytes_flushed: dict[int, bytes] = {}
        self.names_flushed: Names = {}
        self.promised: list[str] = []
        self.moments: list[tuple[str, dict[int, bytes], Names, list[str]]] = []

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            self.note(name)
            return result

        return call

    def fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.names_flushed[path] = {
                item.name: (item.is_dir(), item.inode()) for item in os.scandir(path)
            }
        else:
            self.bytes_flushed[status.st_ino] = os.pread(descriptor, status.st_size, 0)
        os.fsync(descriptor)
        self.note("fsync")

    def note(self, call: str) -> None:
        self.moments.append(
            (call, dict(self.bytes_flushed), dict(self.names_flushed), list(self.promised))
        )


def after_power_loss(folder: str, target: Path, contents: dict[int, bytes], names: Names) -> None:
    """Build at `target` what is left of `folder`."""
    target.mkdir()
    for name, (is_folder, inode) in names.get(folder, {}).items():
        if is_folder:
            after_power_loss(f"{folder}/{name}", target / name, contents, names)
        else:
            (target / name).write_bytes(contents.get(inode, b""))


def test_nothing_reported_is_lost_with_the_power(monkeypatch):
    with tempfile.TemporaryDirectory(dir=store_push.MEMORY, prefix="logitstore-test-") as name:
        folder = Path(os.path.realpath(name))
        disk = ForgetfulDisk()
        monkeypatch.setattr(local, "os", disk)
        location = folder / "before" / "st"
        with store.create(location, store_push.header(), store_push.tables()) as writer:
            planned = writer.add_plan(store_push.plan(writer.header, SHARDS))
            for each in planned.shards:
                store_push.commit_shard(writer, planned, each.shard)
                disk.promised.append(each.shard)
            writer.seal()
        disk.note("sealed")
        monkeypatch.setattr(local, "os", os)
        for number, (call, contents, names, promised) in enumerate(disk.moments):
            left = folder / f"left-{number}"
            after_power_loss(str(folder), left, contents, names)
            survivor = left / "before" / "st"
            visible = set()
            if (survivor / "store.json").exists():
                assert store.verify(survivor, full=True).problems == [], (number, call)
                visible = {view.shard for view in store.open(survivor).shards}
            assert set(promised) <= visible, (number, call)
            store_push.push(str(survivor), "zarr", SHARDS)
            assert store.verify(survivor, full=True).ok
            assert len(store.open(survivor)) == 6 * SHARDS
            shutil.rmtree(left)
        assert call == "sealed"
        assert promised == [each.shard for each in planned.shards]
        report(
            "power-loss",
            f"{len(disk.moments)} moments at which all unflushed bytes and names were lost, "
            f"{len(disk.moments)} survived",
        )
