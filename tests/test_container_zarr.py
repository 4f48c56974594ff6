"""The zarr container: read by stock zarr-python too, and hostile chunks are refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs import zstd
from pcodec import ChunkConfig, standalone

from logitstore.containers import container
from logitstore.containers.codecs import pco_decode
from logitstore.containers.protocol import crc32c
from logitstore.containers.stored_zip import local_entry, split_entries
from logitstore.containers.zarr_layout import stored_arrays
from logitstore.record import Record
from logitstore.spec.errors import FormatError
from logitstore.spec.schema import Schema
from tests.container_contract import ContainerContract, chunk_bytes, recommitted
from tests.shard_records import SCHEMAS, random_record


class TestZarr(ContainerContract):
    name = "zarr"

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    def test_stock_zarr_reads_the_same_values(self, schema_name: str, tmp_path: Path) -> None:
        schema = SCHEMAS[schema_name]
        records = [random_record(schema, part, seed=13) for part in ([9, 30], [20, 3, 8])]
        data, _, _ = self.shard(schema, records)
        path = tmp_path / "shard.zarr.zip"
        path.write_bytes(data)
        merged_groups = {g.name: g for g in schema.groups if g.pairs}
        counted = {g.count_column for g in schema.groups if g.pairs}
        with zarr.storage.ZipStore(path, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            stride = next(
                group[c.name].shape[1]
                for c in schema.columns
                if c.axis == "position" and c.name not in counted
            )
            for number, record in enumerate(records):
                for column in schema.columns:
                    expected = record[column.name]
                    by_id = slice(None)
                    merged = merged_groups.get(column.axis)
                    if merged is not None:
                        owner = np.repeat(
                            np.arange(record.num_positions), record[merged.count_column]
                        )
                        by_id = np.lexsort((owner, record[merged.id_column]))
                        expected = expected[by_id]
                    if merged is not None and column.name == merged.id_column:
                        used = int(group[f"num_{merged.pairs}"][number])
                        values = group[merged.pairs][number]
                        ids, position = np.divmod(values[:used], stride)
                        np.testing.assert_array_equal(ids, expected)
                        np.testing.assert_array_equal(position, owner[by_id])
                        assert (values[used:] == values[used - 1]).all()
                    elif column.name not in counted:
                        values = group[column.name][number][: len(expected)]
                        assert values.dtype == expected.dtype
                        np.testing.assert_array_equal(values, expected, err_msg=column.name)

    def test_the_zip_is_plain(self) -> None:
        schema = SCHEMAS["threshold"]
        records = [random_record(schema, part, seed=14) for part in ([9, 30], [20, 3, 8])]
        data, commit, _ = self.shard(schema, records)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            entries = archive.infolist()
            assert {e.date_time for e in entries} == {(1980, 1, 1, 0, 0, 0)}
            assert {e.compress_type for e in entries} == {zipfile.ZIP_STORED}
            chunks = [e.filename.split("/")[2] for e in entries if "/c/" in e.filename]
            assert chunks == sorted(chunks)
            assert entries[-1].filename == "zarr.json"
            assert entries[0].header_offset == commit.chunks[0].offset == 0

    def test_a_pco_bomb_is_bounded_by_the_committed_size(self, tmp_path: Path) -> None:
        self.bomb(tmp_path, "tokens", pco_of(np.zeros(100_000_000, np.uint32)))

    @pytest.mark.parametrize("first_bytes", [None, 64])
    def test_a_zstd_bomb_is_refused_before_it_is_inflated(
        self, tmp_path: Path, first_bytes: int | None
    ) -> None:
        coded = zstd.compress(bytes(1 << 29), 3, True)
        if first_bytes is not None:
            coded = zstd.compress(bytes(first_bytes), 3, True) + coded
        self.bomb(tmp_path, "loss_mask", coded)

    def bomb(self, folder: Path, array: str, coded: bytes) -> None:
        """Decodes in a process of its own, whose memory nothing else has enlarged before."""
        schema = SCHEMAS["fixed-k"]
        record = random_record(schema, [30, 5], seed=15)
        data, commit, head = self.shard(schema, [record])
        part = replace_entry(bytes(chunk_bytes(data, commit, 0)), f"{array}/c/0/0", coded)
        (folder / "part").write_bytes(part)
        (folder / "header").write_bytes(head.encode())
        (folder / "commit").write_bytes(recommitted(commit, 0, part).encode())
        done = subprocess.run(
            [sys.executable, "-c", _DECODE_AND_MEASURE, str(folder)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak_kib, message = done.stdout.split(" ", 1)
        assert f"array {array}" in message
        assert int(peak_kib) < 64 << 10

    @pytest.mark.parametrize(
        "update",
        [
            {"positions": 2**40},
            {"samples": 2**40},
            {"entries": {"sample_key": 2**40}},
            {"entries": {}},
            {"entries": {"sample_key": 64, "more": 1}},
        ],
    )
    def test_a_layout_beyond_all_limits_is_refused_before_allocating(self, update: dict) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=16)])
        assert commit.layout is not None
        lie = commit.model_copy(update={"layout": commit.layout.model_copy(update=update)})
        with pytest.raises(FormatError, match="chunk-malformed"):
            self.decode(data, lie, head, 0)

    def test_ids_must_ascend_inside_a_position_of_a_pairs_group(self) -> None:
        schema = SCHEMAS["sampled"]
        record = random_record(schema, [30], seed=17)
        arrays = dict(record.arrays)
        arrays["ids"] = arrays["ids"][::-1].copy()
        with pytest.raises(FormatError, match="ascend"):
            self.shard(schema, [Record(schema, arrays)])

    @pytest.mark.parametrize("flaw", ["position", "id", "order"])
    def test_pairs_that_no_record_has_are_refused(self, flaw: str) -> None:
        schema = SCHEMAS["sampled"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=17)])
        assert commit.layout is not None
        stride = commit.layout.positions
        arrays = stored_arrays(schema, "uint32")
        names = [array.key(0) for array in arrays]
        contents = dict(zip(names, split_entries(chunk_bytes(data, commit, 0), names), strict=True))
        (array,) = [array for array in arrays if array.role == "pairs"]
        pairs = pco_decode(contents[array.key(0)][:-4], commit.layout.entries["ids"], "uint32")
        pairs = pairs.copy()
        if flaw == "position":
            pairs[0] = pairs[0] // stride * stride + 35
        elif flaw == "id":
            pairs[-1] = head.vocab_size * stride
        else:
            pairs[:2] = pairs[1::-1]
        coded = pco_of(pairs)
        contents[array.key(0)] = memoryview(coded + crc32c(coded).to_bytes(4, "little"))
        part = b"".join(local_entry(name, bytes(contents[name]), 0)[0] for name in names)
        with pytest.raises(FormatError, match="no ascending pairs of its chunk"):
            self.decode(part, recommitted(commit, 0, part), head, 0)

    def test_values_between_the_steps_are_refused(self) -> None:
        schema = SCHEMAS["nucleus"]
        record = random_record(schema, [30], seed=18)
        for bad in (-1 / 32, 0.5, -np.inf, np.nan):
            arrays = record.arrays | {"logprobs": record["logprobs"].copy()}
            arrays["logprobs"][3] = bad
            with pytest.raises(FormatError, match="multiples"):
                self.shard(schema, [Record(schema, arrays)])

    def test_a_directory_that_points_elsewhere_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [8, 8], seed=25)] * 2)
        directory = data.rindex(b"ids/c/1/0/0") - 46
        (offset,) = struct.unpack_from("<I", data, directory + 42)
        for wrong in (offset + 1, commit.chunks[0].offset, commit.chunks[1].offset):
            hostile = bytearray(data)
            struct.pack_into("<I", hostile, directory + 42, wrong)
            with pytest.raises(FormatError, match="where it belongs"):
                container("zarr").validate_object(io.BytesIO(hostile), head, commit)

    def test_codecs_outside_the_list_are_named(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=19)])
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                body = old.read(entry)
                if entry.filename == "tokens/zarr.json":
                    body = body.replace(b"numcodecs.pcodec", b"numcodecs.pickle")
                new.writestr(entry, body)
        with pytest.raises(FormatError, match=r"numcodecs\.pickle"):
            container("zarr").validate_object(file, head, commit)

    def test_more_than_65535_entries_use_zip64(self) -> None:
        schema = Schema(columns=SCHEMAS["every-type"].columns[:1])
        records = [Record(schema, {"sample_lengths": np.ones(1, np.uint32)})] * 65_600
        data, commit, head = self.shard(schema, records)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert len(archive.infolist()) == 65_602
        container("zarr").validate_object(io.BytesIO(data), head, commit)
        assert self.decode(data, commit, head, 65_599).num_samples == 1


def pco_of(values: np.ndarray) -> bytes:
    return bytes(standalone.simple_compress(values, ChunkConfig()))


def replace_entry(part: bytes, name: str, coded: bytes) -> bytes:
    """A chunk's range with the content of one ZIP entry replaced."""
    at = part.index(name.encode()) - 30
    (size,) = struct.unpack_from("<I", part, at + 18)
    start = at + 30 + len(name)
    coded += bytes(4)
    new = part[: at + 14] + struct.pack("<3I", 0, len(coded), len(coded)) + part[at + 26 : start]
    return new + coded + part[start + size :]


_DECODE_AND_MEASURE = """
import resource, sys
from pathlib import Path
from logitstore.containers import container
from logitstore.spec.commit import Commit
from logitstore.spec.errors import FormatError
from logitstore.spec.header import Header

folder = Path(sys.argv[1])
head = Header.decode((folder / "header").read_bytes(), where="header")
commit = Commit.decode((folder / "commit").read_bytes(), where="commit")
part = (folder / "part").read_bytes()
zarr = container("zarr")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    zarr.decode(part, head, commit, 0)
except FormatError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
