"""A store is read back as it was written: values, order, snapshots, tables, plans."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from logitstore import store
from logitstore.record.record import Record
from logitstore.record.statistics import merge, statistics_of
from logitstore.spec.commit import Quarantined
from logitstore.spec.errors import (
    CommitError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StateError,
    UsageError,
)
from tests import store_push


def same(a: Record, b: Record) -> None:
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert np.array_equal(array, b.arrays[name]), name


@pytest.fixture(params=["zarr", "arrow"])
def container(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sealed(tmp_path, container) -> str:
    location = str(tmp_path / "st")
    store_push.push(location, container)
    return location


def test_every_value_comes_back(sealed):
    with store.open(sealed) as opened:
        assert (len(opened), opened.sealed) == (18, True)
        for shard, view in enumerate(opened.shards):
            for chunk in range(2):
                same(
                    opened.read_chunk(shard, chunk),
                    store_push.record(opened.header, view.shard, chunk),
                )


def test_samples_are_found_by_number_in_reading_order(sealed):
    opened = store.open(sealed)
    keys = [opened.sample(i).sample_keys()[0] for i in range(len(opened))]
    assert keys == [f"0001-{s:06d}/{c}/{r}" for s in range(3) for c in range(2) for r in range(3)]
    assert opened.locate(10) == (1, 1, 1)
    for outside in (-1, 18):
        with pytest.raises(NotFoundError, match="sample-out-of-range"):
            opened.locate(outside)


def test_columns_can_be_chosen(sealed):
    part = store.open(sealed).read_chunk(0, 0, ["tokens", "logprobs"])
    assert {"sample_lengths", "tokens", "logprobs"} == part.arrays.keys()


def test_statistics_and_sizes_are_those_of_all_shards(sealed):
    opened = store.open(sealed)
    parts = [
        merge(statistics_of(store_push.record(opened.header, v.shard, c)) for c in range(2))
        for v in opened.shards
    ]
    assert opened.statistics() == merge(parts)
    assert sum(opened.column_bytes().values()) == sum(v.object_bytes for v in opened.shards)


def test_an_unsealed_store_reads_the_same(tmp_path, container):
    location = str(tmp_path / "st")
    store_push.push(location, container, seal=False)
    before = store.open(location)
    store.append(location).seal()
    after = store.open(location)
    assert (before.sealed, after.sealed) == (False, True)
    assert before.snapshot == after.snapshot
    assert before.shards == after.shards
    assert before.statistics() == after.statistics()
    assert before.column_bytes() == after.column_bytes()
    same(before.sample(7), after.sample(7))
    assert store.open(location, snapshot=before.snapshot).shards == before.shards


def test_a_snapshot_stays_while_the_store_grows(tmp_path):
    location = str(tmp_path / "st")
    with store.create(location, store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 3))
        store_push.commit_shard(writer, planned, "0001-000001")
        first = store.open(location)
        assert [v.shard for v in first.shards] == ["0001-000001"]
        store_push.commit_shard(writer, planned, "0001-000000")
        assert len(first) == 6
        grown = first.refresh()
        assert [v.shard for v in grown.shards] == ["0001-000000", "0001-000001"]
        assert store.open(location, snapshot=first.snapshot).shards == first.shards
        store_push.commit_shard(writer, planned, "0001-000002")
        writer.seal()
        assert store.open(location, snapshot=first.snapshot).shards == first.shards


def test_a_newer_generation_replaces_and_the_older_stays_readable(tmp_path):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", seal=False)
    pinned = store.open(location)
    with store.append(location) as writer:
        planned = writer.plans()[0]
        store_push.commit_shard(writer, planned, "0001-000001", chunks=3, generation=2)
    newer = store.open(location)
    assert [v.generation for v in newer.shards] == [1, 2, 1]
    assert (len(pinned), len(newer)) == (18, 21)
    again = store.open(location, snapshot=pinned.snapshot)
    same(again.sample(11), pinned.sample(11))
    assert store.verify(location, full=True).ok


def test_snapshots_survive_json_and_notice_damage():
    commits = tuple((f"{p:04d}-{i:06d}", 1 + (i == 77)) for p in (1, 3) for i in range(0, 999, 7))
    snapshot = store.Snapshot("a" * 32, commits)
    state = json.loads(json.dumps(snapshot.as_state()))
    assert store.Snapshot.from_state(state) == snapshot
    whole = store.Snapshot("a" * 32, tuple((f"0001-{i:06d}", 1) for i in range(10_000)))
    assert len(json.dumps(whole.as_state())) < 300
    for broken in (
        {**state, "store_uuid": "b" * 32},
        {**state, "generations": {}},
        {**state, "shards": {"1": "AAAA"}},
        {"digest": state["digest"]},
        {**state, "shards": {"1": state["shards"]["1"]}},
    ):
        with pytest.raises(StateError, match="state-malformed"):
            store.Snapshot.from_state(broken)


def test_another_stores_snapshot_is_refused(sealed, tmp_path):
    other = str(tmp_path / "other")
    store_push.push(other, "zarr")
    with pytest.raises(StateError, match="state-mismatch"):
        store.open(sealed, snapshot=store.open(other).snapshot)


def test_tables_and_plans(sealed):
    opened = store.open(sealed)
    assert opened.table("tokenizer.json") == store_push.TABLE.encode()
    assert [len(p.shards) for p in opened.plans()] == [3]
    with pytest.raises(NotFoundError, match="table-not-found"):
        opened.table("means")


def test_not_a_store(tmp_path):
    with pytest.raises(NotFoundError, match="not-a-store"):
        store.open(tmp_path / "nothing")
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(FormatError, match="document-malformed"):
        store.open(tmp_path)


def test_a_newer_format_is_refused_by_name(tmp_path):
    header = store_push.header().model_copy(update={"format_version": 2})
    (tmp_path / "store.json").write_bytes(header.encode())
    with pytest.raises(FormatError, match="format-too-new"):
        store.open(tmp_path)


def test_stray_files_are_ignored(sealed, tmp_path):
    whole = store.open(sealed)
    root = tmp_path / "st"
    for name in (
        "commits/0001-000000.2.json.bak",
        "commits/.0001-000000.2.json.00112233.tmp",
        "commits/0001-000000.02.json",
        "shards/0001-000000.ffffffffffffffff.zarr.zip",
        "shards/notes.txt",
        "plans/latest.json",
        "README",
    ):
        (root / name).write_bytes(b"stray")
    (root / "commits" / "folder").mkdir()
    report = store.verify(sealed, full=True)
    assert (report.ok, report.objects) == (True, 3)
    assert store.open(sealed).shards == whole.shards


def test_a_store_goes_to_other_processes_and_threads(sealed):
    opened = store.open(sealed)
    opened.sample(0)
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 what DataLoader does with workers
    same(copy.sample(5), opened.sample(5))
    wrong = []

    def work(start: int) -> None:
        for i in range(18):
            sample = (start + i) % 18
            shard, chunk, row = divmod(sample, 6)[0], sample % 6 // 3, sample % 3
            if copy.sample(sample).sample_keys() != [f"0001-{shard:06d}/{chunk}/{row}"]:
                wrong.append(sample)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# joining and refusing


def test_the_same_configuration_joins(tmp_path):
    location = str(tmp_path / "st")
    first = store.create(location, store_push.header(), store_push.tables())
    second = store.create(location, store_push.header(), store_push.tables())
    assert first.header == second.header
    planned = first.add_plan(store_push.plan(first.header, 3))
    assert second.add_plan(store_push.plan(second.header, 3)) == planned


def test_another_configuration_is_refused_with_a_diff(tmp_path):
    location = str(tmp_path / "st")
    store.create(location, store_push.header(), store_push.tables())
    with pytest.raises(CommitError) as caught:
        store.create(location, store_push.header(seed=7), {"tokenizer.json": b"x"})
    assert caught.value.kind == "configuration-changed"
    assert caught.value.data["changes"][0] == "seed: 0 -> 7"
    assert caught.value.data["changes"][1].startswith("tables/tokenizer.json: sha256 ")
    assert "seed: 0 -> 7" in str(caught.value)


def test_another_plan_of_a_number_is_refused(tmp_path):
    writer = store.create(tmp_path / "st", store_push.header())
    writer.add_plan(store_push.plan(writer.header, 3))
    with pytest.raises(CommitError, match="configuration-changed"):
        writer.add_plan(store_push.plan(writer.header, 4))


def test_push_sessions_get_plans_of_their_own(tmp_path):
    location = str(tmp_path / "st")
    with store.create(location, store_push.header()) as one, store.append(location) as two:
        plans = [one.add_push_plan(), two.add_push_plan(), one.add_push_plan()]
        assert [p.number for p in plans] == [1, 2, 3]
        for planned in plans:
            store_push.commit_shard(one, planned, f"{planned.number:04d}-000000")
        one.seal()
    assert len(store.open(location)) == 18
    assert store.verify(location, full=True).ok


def test_an_incomplete_plan_is_not_sealed_and_a_sealed_store_not_extended(tmp_path):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", shards=2, seal=False)
    writer = store.append(location)
    planned = writer.add_plan(store_push.plan(writer.header, 2, number=2))
    with pytest.raises(CommitError) as caught:
        writer.seal()
    assert caught.value.kind == "plan-incomplete"
    assert caught.value.data["missing"] == ["0002-000000", "0002-000001"]
    late = writer.begin("0002-000000", planned)
    store_push.commit_shard(writer, planned, "0002-000000")
    store_push.commit_shard(writer, planned, "0002-000001")
    assert writer.seal() == writer.seal()
    late.add(store_push.record(writer.header, "0002-000000", 0))
    with pytest.raises(CommitError, match="store-sealed"):
        late.commit(statistics=merge([]))
    with pytest.raises(CommitError, match="store-sealed"):
        store.append(location)


def test_a_shard_of_another_plan_is_refused(tmp_path):
    writer = store.create(tmp_path / "st", store_push.header())
    planned = writer.add_plan(store_push.plan(writer.header, 2))
    for shard in ("0002-000000", "0001-000002"):
        with pytest.raises(UsageError, match="bad-argument"):
            writer.begin(shard, planned)


def test_an_empty_shard_is_a_shard(tmp_path, container):
    location = str(tmp_path / "st")
    with store.create(location, store_push.header(container)) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 2))
        with writer.begin("0001-000000", planned) as attempt:
            attempt.commit(
                statistics=merge([]),
                quarantined=[Quarantined(sample_key="a@0", reason="teacher-nonfinite")],
            )
        store_push.commit_shard(writer, planned, "0001-000001")
        writer.seal()
    opened = store.open(location)
    assert opened.locate(0) == (1, 0, 0)
    assert opened.commit(0).quarantined[0].sample_key == "a@0"
    assert store.verify(location, full=True).ok


def test_resuming_reads_no_commit(tmp_path, monkeypatch):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", seal=False)
    writer = store.append(location)
    opened = []
    original = type(writer._backend)._open
    monkeypatch.setattr(
        type(writer._backend),
        "_open",
        lambda self, path: opened.append(path) or original(self, path),
    )
    assert writer.committed() == {f"0001-{i:06d}": 1 for i in range(3)}
    assert opened == []


def test_the_import_loads_neither_torch_nor_arrow_nor_zarr_nor_obstore():
    code = (
        "import sys, logitstore.store; print({'torch','pyarrow','zarr','obstore'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_commit_of_a_sealed_store_is_named(sealed, tmp_path):
    (tmp_path / "st" / "commits" / "0001-000001.1.json").unlink()
    opened = store.open(sealed)
    with pytest.raises(IntegrityError, match="document-missing"):
        opened.sample(8)
    assert opened.sample(0).num_samples == 1
