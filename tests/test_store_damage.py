"""Damage is named, never served: flipped bits, torn writes, files cut, removed or swapped."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from logitstore import store
from logitstore.record.record import Record
from logitstore.spec.errors import FormatError, IntegrityError, LogitstoreError
from tests import store_push
from tests.store_report import report

FLIPS = 250  # in each container
BLOCK_BYTES = 4096


@pytest.fixture(params=["zarr", "arrow"])
def container(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sealed(tmp_path, container) -> Path:
    store_push.push(str(tmp_path / "st"), container, 2)
    return tmp_path / "st"


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def values_of(root: Path) -> list[Record]:
    """Everything a reader can read."""
    with store.open(root) as opened:
        opened.table("tokenizer.json")
        assert opened.plans()
        return [
            opened.read_chunk(shard, chunk)
            for shard in range(len(opened.shards))
            for chunk in range(len(opened.commit(shard).chunks))
        ]


def same(a: list[Record], b: list[Record]) -> bool:
    return len(a) == len(b) and all(
        x.arrays.keys() == y.arrays.keys()
        and all(np.array_equal(x[name], y[name]) for name in x.arrays)
        for x, y in zip(a, b, strict=True)
    )


class Damage:
    """Counts what verification and reading say about one damaged store after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole = values_of(root)
        self.cases = self.detected = self.read_refused = self.read_unharmed = 0

    def check(self, name: str) -> list[str]:
        """Verification must name a problem; a reader must refuse or return the written values."""
        self.cases += 1
        found = store.verify(self.root, full=True)
        kinds = [problem["kind"] for problem in found.problems]
        assert kinds, f"{name}: not noticed"
        assert all(problem["what"] for problem in found.problems)
        self.detected += 1
        try:
            values = values_of(self.root)
        except LogitstoreError:
            self.read_refused += 1
        else:
            assert same(values, self.whole), f"{name}: other values were served"
            self.read_unharmed += 1
        return kinds

    def line(self, what: str) -> str:
        return (
            f"{what}: {self.cases} injected, {self.detected} named by verify --full, 0 silent; "
            f"reader: {self.read_refused} refused, {self.read_unharmed} outside what it reads, "
            "0 served"
        )


def test_every_flipped_bit_is_noticed(sealed, container):
    damage = {"objects": Damage(sealed), "documents": Damage(sealed)}
    rng = random.Random(0)
    files = files_of(sealed)
    for number in range(FLIPS):
        # Half in objects, half in documents and tables, bytes of each half alike.
        part = ("objects", "documents")[number % 2]
        chosen = [p for p in files if (p.parent.name == "shards") == (part == "objects")]
        sizes = [p.stat().st_size for p in chosen]
        path = rng.choices(chosen, sizes)[0]
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        torn = bytearray(whole)
        torn[bit // 8] ^= 1 << bit % 8
        path.write_bytes(torn)
        damage[part].check(f"bit {bit} of {path.name}")
        path.write_bytes(whole)
    assert store.verify(sealed, full=True).ok
    report(f"bit-flips-{container}", *(d.line(f"{part}, bit flips") for part, d in damage.items()))


def test_every_torn_write_is_noticed(tmp_path, container):
    root = tmp_path / "st"
    with store.create(root, store_push.header(container), store_push.tables()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 1))
        store_push.commit_shard(writer, planned, "0001-000000", chunks=40)
        writer.seal()
    damage = Damage(root)
    for path in files_of(root):
        whole = path.read_bytes()
        for end in range(0, len(whole), BLOCK_BYTES):
            # What a power cut may leave of an unflushed write: a prefix, or zeros behind it.
            for torn in (whole[:end], whole[:end] + bytes(len(whole) - end)):
                path.write_bytes(torn)
                damage.check(f"{path.name} torn at {end}")
        path.write_bytes(whole)
    assert store.verify(root, full=True).ok
    report(f"torn-writes-{container}", damage.line("torn writes"))


def _remove(path: Path, other: Path) -> None:
    path.unlink()


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _cut_last_byte(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _append_byte(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _swap(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _duplicate(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


WRONG = {
    # (folder, what is done to its first file) -> the kind that verification must name
    ("shards", _remove): "object-missing",
    ("shards", _empty): "object-size-mismatch",
    ("shards", _cut_last_byte): "object-size-mismatch",
    ("shards", _append_byte): "object-size-mismatch",
    ("shards", _swap): "object-",
    ("shards", _duplicate): "object-",
    ("commits", _remove): "document-missing",
    ("commits", _empty): "document-malformed",
    ("commits", _cut_last_byte): "document-malformed",
    ("commits", _append_byte): "document-malformed",
    ("commits", _swap): "document-mismatch",
    ("commits", _duplicate): "document-mismatch",
    ("plans", _remove): "document-missing",
    ("plans", _empty): "document-malformed",
    ("tables", _remove): "document-missing",
    ("tables", _append_byte): "table-hash-mismatch",
    (".", _empty): "document-malformed",
    (".", _swap): "document-invalid",
}


def test_removed_cut_swapped_and_copied_files_are_named(sealed, container, tmp_path):
    damage = Damage(sealed)
    for (folder, change), expected in WRONG.items():
        files = sorted(p for p in (sealed / folder).iterdir() if p.is_file())
        kept = {path: path.read_bytes() for path in files}
        change(files[0], files[-1])
        kinds = damage.check(f"{folder} {change.__name__}")
        assert any(kind.startswith(expected) for kind in kinds), (folder, change, kinds)
        for path, data in kept.items():
            path.write_bytes(data)
    assert store.verify(sealed, full=True).ok
    report(f"files-{container}", damage.line("files removed, cut, extended, swapped, copied"))


def test_a_chunk_of_another_place_is_not_served(tmp_path):
    """Two objects of equal size, swapped: only checksums can tell."""
    root = tmp_path / "st"
    with store.create(root, store_push.header("arrow")) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 2))
        for shard in ("0001-000000", "0001-000001"):
            with writer.begin(shard, planned) as attempt:
                each = store_push.record(writer.header, "0001-000000", 0)
                each.arrays["tokens"] = each.arrays["tokens"].copy()
                each.arrays["tokens"][0] = int(shard[-1])
                attempt.add(each)
                attempt.commit(statistics=store_push.statistics_of(each))
    one, two = sorted((root / "shards").iterdir())
    assert one.stat().st_size == two.stat().st_size
    _swap(one, two)
    with pytest.raises(IntegrityError, match="chunk-checksum-mismatch"):
        store.open(root).read_chunk(0, 0)
    assert store.verify(root).ok, "sizes alone cannot tell"
    assert {p["kind"] for p in store.verify(root, full=True).problems} == {
        "chunk-checksum-mismatch",
        "object-hash-mismatch",
    }


def test_every_problem_is_listed_at_once(sealed):
    objects = sorted((sealed / "shards").iterdir())
    objects[0].unlink()
    objects[1].write_bytes(objects[1].read_bytes()[:-1])
    (sealed / "tables" / "tokenizer.json").write_bytes(b"x")
    found = store.verify(sealed)
    assert [p["kind"] for p in found.problems] == [
        "table-hash-mismatch",
        "object-missing",
        "object-size-mismatch",
    ]
    assert [p.get("shard") for p in found.problems] == [None, "0001-000000", "0001-000001"]


def test_damage_in_all_chunks_is_listed_by_chunk(sealed):
    path = sorted((sealed / "shards").iterdir())[0]
    data = bytearray(path.read_bytes())
    for chunk in store.open(sealed).commit(0).chunks:
        data[chunk.offset + chunk.bytes // 2] ^= 1
    path.write_bytes(data)
    kinds = [p["kind"] for p in store.verify(sealed, full=True).problems]
    assert kinds == ["chunk-checksum-mismatch"] * 2 + ["object-hash-mismatch"]


def test_a_file_that_shrinks_under_an_open_store_is_named(sealed):
    opened = store.open(sealed)
    opened.read_chunk(0, 0)
    path = sorted((sealed / "shards").iterdir())[0]
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(IntegrityError, match="object-size-mismatch"):
        opened.read_chunk(0, 1)


def test_documents_of_another_store_are_refused(sealed, tmp_path, container):
    other = tmp_path / "other"
    store_push.push(str(other), container, 2)
    for key in ("index.json", "plans/000001.json", "commits/0001-000000.1.json"):
        whole = (sealed / key).read_bytes()
        shutil.copyfile(other / key, sealed / key)
        kinds = {p["kind"] for p in store.verify(sealed).problems}
        assert kinds & {"document-mismatch", "index-mismatch"}, key
        with pytest.raises(IntegrityError):
            values_of(sealed)
        (sealed / key).write_bytes(whole)


def test_a_commit_the_index_does_not_know_is_named(sealed, container):
    (sealed / "index.json").rename(sealed / "kept")
    with store.append(sealed) as writer:
        planned = writer.add_push_plan()
        store_push.commit_shard(writer, planned, "0002-000000")
    (sealed / "kept").rename(sealed / "index.json")
    assert [p["kind"] for p in store.verify(sealed).problems] == ["index-mismatch"]
    assert len(store.open(sealed)) == 12


def test_links_do_not_lead_out_of_the_store(sealed, tmp_path):
    for folder in ("shards", "commits"):
        path = sorted((sealed / folder).iterdir())[0]
        outside = tmp_path / path.name
        path.rename(outside)
        path.symlink_to(outside)
        kinds = {p["kind"] for p in store.verify(sealed, full=True).problems}
        assert "path-not-allowed" in kinds
        with pytest.raises(FormatError, match="path-not-allowed"):
            values_of(sealed)
        path.unlink()
        outside.rename(path)
    # The store as a whole may be reached through a link.
    (tmp_path / "link").symlink_to(sealed)
    assert store.verify(tmp_path / "link", full=True).ok


def test_a_named_pipe_is_refused_and_does_not_hang(sealed):
    path = sorted((sealed / "shards").iterdir())[0]
    path.unlink()
    subprocess.run(["mkfifo", str(path)], check=True)
    assert store.verify(sealed, full=True).problems
    assert sys.exc_info() == (None, None, None)


def test_an_enormous_document_is_not_read(tmp_path):
    with open(tmp_path / "store.json", "wb") as file:
        file.truncate(1 << 40)  # takes no space
    with pytest.raises(FormatError, match="document-too-large"):
        store.open(tmp_path)
