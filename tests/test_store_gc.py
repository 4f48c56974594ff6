"""gc removes what no reader can need, after the grace period, and nothing else."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from logitstore import store
from logitstore.spec.errors import FormatError, NotFoundError
from logitstore.store import local
from tests import store_push

HOUR_S = 3600.0


@pytest.fixture
def crowded(tmp_path) -> Path:
    """Two committed shards, one open; a losing, an abandoned and an unfinished attempt."""
    root = tmp_path / "st"
    with store.create(root, store_push.header(), store_push.tables()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 3))
        for shard in ("0001-000000", "0001-000001"):
            store_push.commit_shard(writer, planned, shard)
    for name in (
        "shards/0001-000000.00000000000000aa.zarr.zip",
        "shards/0001-000002.00000000000000bb.zarr.zip",
        "shards/.0001-000002.00000000000000cc.zarr.zip.0011aabb.tmp",
        "commits/.0001-000002.1.json.0011aabb.tmp",
        ".index.json.0011aabb.tmp",
        "shards/notes.txt",
        "notes.txt",
    ):
        (root / name).write_bytes(b"12345")
    return root


def age(root: Path, seconds: float, pattern: str = "**/*") -> None:
    then = time.time() - seconds
    for path in root.glob(pattern):
        if path.is_file():
            os.utime(path, (then, then))


def keys(plan: store.GcPlan) -> dict[str, str]:
    return {d.key: d.reason for d in plan.deletions}


def test_the_plan_names_each_file_and_why(crowded):
    age(crowded, 2 * HOUR_S)
    plan = store.gc(crowded, grace_s=HOUR_S)
    assert keys(plan) == {
        "shards/0001-000000.00000000000000aa.zarr.zip": "losing-attempt",
        "shards/.0001-000002.00000000000000cc.zarr.zip.0011aabb.tmp": "leftover",
        "commits/.0001-000002.1.json.0011aabb.tmp": "leftover",
        ".index.json.0011aabb.tmp": "leftover",
    }
    assert (plan.bytes, plan.kept_unfinished, plan.done) == (20, 1, False)
    assert (crowded / "shards/0001-000000.00000000000000aa.zarr.zip").exists()
    with_abandoned = store.gc(crowded, grace_s=HOUR_S, abandoned=True)
    assert keys(with_abandoned).keys() - keys(plan).keys() == {
        "shards/0001-000002.00000000000000bb.zarr.zip"
    }


def test_young_files_are_spared(crowded):
    plan = store.gc(crowded, grace_s=HOUR_S, abandoned=True)
    assert (plan.deletions, plan.kept_young) == ((), 5)


def test_readers_do_not_notice(crowded):
    reader = store.open(crowded)
    before = [reader.sample(i)["tokens"].tolist() for i in range(len(reader))]
    plan = store.gc(crowded, grace_s=0, abandoned=True, dry_run=False)
    assert plan.done
    assert len(plan.deletions) == 5
    for opened in (reader, store.open(crowded)):
        assert [opened.sample(i)["tokens"].tolist() for i in range(len(opened))] == before
    assert store.verify(crowded, full=True).ok
    assert store.gc(crowded, grace_s=0, abandoned=True).deletions == ()
    # Files of strangers stay.
    assert (crowded / "notes.txt").exists()
    assert (crowded / "shards" / "notes.txt").exists()


def test_a_replaced_generation_stays_for_the_grace_period_of_its_successor(crowded):
    age(crowded, 48 * HOUR_S)
    with store.append(crowded) as writer:
        store_push.commit_shard(writer, writer.plans()[0], "0001-000000", chunks=1, generation=2)
    replaced = store.open(
        crowded, snapshot=store.Snapshot(writer.header.store_uuid, (("0001-000000", 1),))
    )
    superseded = {
        k for k, r in keys(store.gc(crowded, grace_s=HOUR_S)).items() if r == "superseded"
    }
    assert superseded == set()
    store.gc(crowded, grace_s=HOUR_S, dry_run=False)
    assert replaced.sample(5).num_samples == 1
    age(crowded, 2 * HOUR_S, "commits/0001-000000.2.json")
    plan = store.gc(crowded, grace_s=HOUR_S, dry_run=False)
    object_name = replaced.shards[0].object
    assert [d.key for d in plan.deletions] == [
        "commits/0001-000000.1.json",
        f"shards/{object_name}",
    ]
    assert store.verify(crowded, full=True).ok
    assert len(store.open(crowded)) == 3 + 6


def test_killed_between_two_deletions_it_can_be_repeated(crowded, monkeypatch):
    age(crowded, 48 * HOUR_S)
    with store.append(crowded) as writer:
        store_push.commit_shard(writer, writer.plans()[0], "0001-000000", generation=2)
    honest = local.LocalBackend.delete
    deleted = 0

    def one_then_die(self, key):
        nonlocal deleted
        if deleted:
            raise KeyboardInterrupt
        deleted += 1
        honest(self, key)

    monkeypatch.setattr(local.LocalBackend, "delete", one_then_die)
    rounds = 0
    while store.gc(crowded, grace_s=0, abandoned=True).deletions:
        deleted = 0
        with suppress(KeyboardInterrupt):
            store.gc(crowded, grace_s=0, abandoned=True, dry_run=False)
        assert store.verify(crowded, full=True).ok
        rounds += 1
    assert rounds == 7
    assert len(list((crowded / "shards").glob("*.zip"))) == 2
    assert store.verify(crowded, full=True).ok


def test_nothing_is_deleted_on_the_word_of_a_damaged_document(crowded):
    path = crowded / "commits" / "0001-000000.1.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="document-malformed"):
        store.gc(crowded, grace_s=0, abandoned=True, dry_run=False)
    assert len(list((crowded / "shards").glob("*.zip"))) == 4


def test_not_a_store(tmp_path):
    (tmp_path / ".x.0011aabb.tmp").write_bytes(b"")
    with pytest.raises(NotFoundError, match="not-a-store"):
        store.gc(tmp_path, grace_s=0, dry_run=False)
    assert (tmp_path / ".x.0011aabb.tmp").exists()
