"""Both containers: what goes in comes out, in the same bytes each time; nothing hostile gets by."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from pcodec import ChunkConfig, standalone

from logitstore.containers import CONTAINERS, container
from logitstore.containers.codecs import pco_decode
from logitstore.containers.protocol import crc32c
from logitstore.containers.stored_zip import local_entry, split_entries
from logitstore.containers.zarr_layout import stored_arrays
from logitstore.record import Record, build_schema
from logitstore.spec.commit import Commit
from logitstore.spec.errors import FormatError, IntegrityError, UsageError
from logitstore.spec.header import Header
from logitstore.spec.schema import Schema
from logitstore.spec.signals import DenseSpec
from tests.shard_records import SCHEMAS, header, random_record, write_shard

chunk_lengths = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4
)


def assert_same(got: Record, expected: Record) -> None:
    assert list(got.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def chunk_bytes(data: bytes, commit: Commit, chunk: int) -> memoryview:
    row = commit.chunks[chunk]
    return memoryview(data)[row.offset : row.offset + row.bytes]


def recommitted(commit: Commit, chunk: int, data: bytes) -> Commit:
    """The commit as an attacker would write it, who can also give hostile bytes their checksum."""
    rows = list(commit.chunks)
    rows[chunk] = rows[chunk].model_copy(update={"bytes": len(data), "crc32c": crc32c(data)})
    large_enough = commit.object.model_copy(update={"bytes": commit.object.bytes + len(data)})
    return commit.model_copy(update={"chunks": tuple(rows), "object": large_enough})


class ContainerContract:
    """What every container must do; subclasses name one."""

    name: str

    def shard(
        self, schema: Schema, records: list[Record], **options: int
    ) -> tuple[bytes, Commit, Header]:
        head = header(schema, container=self.name, **options)
        data, commit = write_shard(head, records)
        return data, commit, head

    def decode(self, data: bytes, commit: Commit, head: Header, chunk: int, **options) -> Record:
        part = chunk_bytes(data, commit, chunk)
        return container(self.name).decode(part, head, commit, chunk, **options)

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    @settings(max_examples=25)
    @given(lengths=chunk_lengths, entries=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
    def test_records_come_back(
        self, schema_name: str, lengths: list[list[int]], entries: int, seed: int
    ) -> None:
        schema = SCHEMAS[schema_name]
        records = [
            random_record(schema, part, seed=seed + i, entries=entries)
            for i, part in enumerate(lengths)
        ]
        data, commit, head = self.shard(schema, records)
        for number, record in enumerate(records):
            assert_same(self.decode(data, commit, head, number), record)

    @pytest.mark.parametrize("vocab_size", [2, 255, 65_536, 65_537, 262_144, 2**32])
    @pytest.mark.parametrize("schema_name", ["fixed-k", "sampled"])
    def test_ids_of_any_width(self, schema_name: str, vocab_size: int) -> None:
        schema = SCHEMAS[schema_name]
        record = random_record(schema, [50, 7], seed=1, vocab_size=vocab_size)
        data, commit, head = self.shard(schema, [record], vocab_size=vocab_size)
        assert_same(self.decode(data, commit, head, 0), record)

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    def test_a_sample_longer_than_a_chunk_gets_its_own(self, schema_name: str) -> None:
        schema = SCHEMAS[schema_name]
        records = [random_record(schema, part, seed=3) for part in ([20, 30], [500], [1])]
        data, commit, head = self.shard(schema, records)
        for number, record in enumerate(records):
            assert_same(self.decode(data, commit, head, number), record)

    def test_a_long_sample_may_need_wider_pairs_than_earlier_chunks(self) -> None:
        schema, vocab_size = SCHEMAS["sampled"], 2**26
        records = [
            random_record(schema, part, seed=4, vocab_size=vocab_size) for part in ([20, 30], [300])
        ]
        data, commit, head = self.shard(schema, records, vocab_size=vocab_size)
        for number, record in enumerate(records):
            assert_same(self.decode(data, commit, head, number), record)

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    def test_same_records_same_bytes(self, schema_name: str) -> None:
        schema = SCHEMAS[schema_name]
        lengths = ([20, 30], [60], [1])
        first = [random_record(schema, part, seed=5) for part in lengths]
        again = [random_record(schema, part, seed=5) for part in lengths]
        assert self.shard(schema, first)[0] == self.shard(schema, again)[0]

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    def test_any_selection_of_columns(self, schema_name: str) -> None:
        schema = SCHEMAS[schema_name]
        record = random_record(schema, [20, 30], seed=6)
        data, commit, head = self.shard(schema, [record])
        for column in schema.columns:
            selected = self.decode(data, commit, head, 0, columns=[column.name])
            assert_same(selected, record.select([column.name]))

    def test_an_unknown_column_is_named(self) -> None:
        record = random_record(SCHEMAS["fixed-k"], [3], seed=0)
        data, commit, head = self.shard(SCHEMAS["fixed-k"], [record])
        with pytest.raises(FormatError, match="nonsense"):
            self.decode(data, commit, head, 0, columns=["nonsense"])

    def test_chunks_tile_the_object_and_bytes_add_up(self) -> None:
        schema = SCHEMAS["threshold"]
        records = [random_record(schema, part, seed=7) for part in ([9], [20, 3], [44])]
        data, commit, _ = self.shard(schema, records)
        assert sum(commit.column_bytes.values()) == len(data)
        for before, after in zip(commit.chunks, commit.chunks[1:], strict=False):
            assert after.offset == before.offset + before.bytes
        for number, row in enumerate(commit.chunks):
            assert crc32c(chunk_bytes(data, commit, number)) == row.crc32c
            assert (row.samples, row.positions) == (
                records[number].num_samples,
                records[number].num_positions,
            )

    def test_an_object_without_chunks(self) -> None:
        data, commit, head = self.shard(SCHEMAS["fixed-k"], [])
        assert commit.chunks == ()
        container(self.name).validate_object(io.BytesIO(data), head, commit)

    def test_the_writer_only_appends(self) -> None:
        class Appended(io.RawIOBase):
            data = b""

            def writable(self) -> bool:
                return True

            def write(self, part) -> int:
                self.data += bytes(part)
                return len(part)

        schema = SCHEMAS["nucleus"]
        record = random_record(schema, [9, 5], seed=8)
        head = header(schema, container=self.name)
        file = Appended()
        writer = container(self.name).writer(file, head)
        writer.add(record)
        writer.finish()
        assert not file.closed
        assert file.data == write_shard(head, [record])[0]

    def test_refuses_records_that_a_chunk_cannot_hold(self) -> None:
        schema = SCHEMAS["fixed-k"]
        head = header(schema, container=self.name)
        writer = container(self.name).writer(io.BytesIO(), head)
        with pytest.raises(FormatError, match="lacks columns"):
            writer.add(random_record(schema, [4], seed=0).select(["tokens"]))
        with pytest.raises(FormatError, match="another schema"):
            writer.add(random_record(SCHEMAS["sampled"], [4], seed=0))
        with pytest.raises(FormatError, match="at least one sample"):
            writer.add(random_record(schema, [], seed=0))

    @pytest.mark.parametrize(
        ("text", "counts"), [(b"\xff" * 4, [2, 2]), ("aéé".encode(), [2, 3]), (b"abc\xc3", [2, 2])]
    )
    def test_text_must_be_utf_8_in_each_string(self, text: bytes, counts: list[int]) -> None:
        schema = SCHEMAS["fixed-k"]
        record = random_record(schema, [4, 5], seed=26)
        broken = Record(
            schema,
            record.arrays
            | {
                "num_sample_key": np.array(counts, np.uint16),
                "sample_key": np.frombuffer(text, np.uint8),
            },
        )
        writer = container(self.name).writer(io.BytesIO(), header(schema, container=self.name))
        with pytest.raises(FormatError, match="sample_key"):
            writer.add(broken)

    @pytest.mark.parametrize("name", ["tokens", "ids"])
    def test_ids_must_lie_in_the_vocabulary(self, name: str) -> None:
        schema = SCHEMAS["fixed-k"]
        record = random_record(schema, [4, 5], seed=27)
        head = header(schema, container=self.name)
        record[name].flat[3] = 1000
        with pytest.raises(FormatError, match=f"column {name} .*outside the vocabulary"):
            write_shard(head, [record])
        wider = header(schema, container=self.name, vocab_size=1001)
        data, commit = write_shard(wider, [record])
        with pytest.raises(FormatError, match=f"column {name} .*outside the vocabulary"):
            self.decode(data, commit, head, 0)

    def test_refuses_chunks_too_large_before_anything_is_captured(self) -> None:
        schema = build_schema(
            DenseSpec(dtype="float32"), vocab_size=262_144, sample_kind="sequence", aux=()
        )
        kind = container(self.name)
        small = header(schema, container=self.name, vocab_size=262_144, chunk_positions=1024)
        kind.writer(io.BytesIO(), small)
        large = header(schema, container=self.name, vocab_size=262_144, chunk_positions=1025)
        with pytest.raises(UsageError, match="at most 1024 positions"):
            kind.writer(io.BytesIO(), large)

    def test_every_flipped_bit_of_a_chunk_is_noticed(self) -> None:
        schema = SCHEMAS["sampled"]
        record = random_record(schema, [30], seed=9)
        data, commit, head = self.shard(schema, [record])
        part = bytes(chunk_bytes(data, commit, 0))
        rng = random.Random(0)
        for _ in range(300):
            damaged = bytearray(part)
            damaged[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
            with pytest.raises(IntegrityError) as caught:
                container(self.name).decode(bytes(damaged), head, commit, 0)
            assert caught.value.kind == "chunk-checksum-mismatch"

    def test_another_length_or_chunk_is_noticed(self) -> None:
        schema = SCHEMAS["fixed-k"]
        records = [random_record(schema, [30], seed=i) for i in range(2)]
        data, commit, head = self.shard(schema, records)
        decode = container(self.name).decode
        for part in (
            chunk_bytes(data, commit, 0)[:-1],
            b"",
            bytes(chunk_bytes(data, commit, 0)) + b"x",
            chunk_bytes(data, commit, 1),
        ):
            with pytest.raises(IntegrityError, match="chunk-checksum-mismatch"):
                decode(part, head, commit, 0)
        with pytest.raises(FormatError, match="no such chunk"):
            decode(b"", head, commit, 2)

    @pytest.mark.parametrize("schema_name", SCHEMAS)
    def test_hostile_bytes_with_a_right_checksum_give_a_named_error_or_a_record(
        self, schema_name: str
    ) -> None:
        schema = SCHEMAS[schema_name]
        record = random_record(schema, [30, 5], seed=10)
        data, commit, head = self.shard(schema, [record])
        part = bytes(chunk_bytes(data, commit, 0))
        rng = random.Random(1)
        refused = 0
        for _ in range(400):
            damaged = bytearray(part)
            for _ in range(rng.choice([1, 1, 4])):
                damaged[rng.randrange(len(part))] = rng.randrange(256)
            if rng.random() < 0.1:
                del damaged[rng.randrange(len(damaged)) :]
            hostile = recommitted(commit, 0, bytes(damaged))
            try:
                got = container(self.name).decode(bytes(damaged), head, hostile, 0)
            except FormatError as error:
                refused += error.kind == "chunk-malformed"
            else:
                assert got.num_samples == record.num_samples
                assert got.num_positions == record.num_positions
        assert refused > 20

    def test_a_commit_that_claims_other_rows_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=11)])
        for update in ({"samples": 1}, {"positions": 34}):
            row = commit.chunks[0].model_copy(update=update)
            lie = commit.model_copy(update={"chunks": (row,)})
            with pytest.raises(FormatError, match="chunk-malformed"):
                self.decode(data, lie, head, 0)

    def test_the_object_is_what_header_and_commit_say(self) -> None:
        schema = SCHEMAS["threshold"]
        records = [random_record(schema, part, seed=12) for part in ([9], [20, 3])]
        data, commit, head = self.shard(schema, records)
        validate = container(self.name).validate_object
        validate(io.BytesIO(data), head, commit)
        with pytest.raises(FormatError, match="chunk-malformed"):
            validate(io.BytesIO(data), header(SCHEMAS["sampled"], container=self.name), commit)
        with pytest.raises(FormatError, match="chunk-malformed"):
            validate(io.BytesIO(data[:-30]), head, commit)
        for size in range(0, len(data), 4096):
            with pytest.raises(FormatError, match="chunk-malformed"):
                validate(io.BytesIO(data[:size]), head, commit)
        other, _, _ = self.shard(schema, [*records, records[0]])
        with pytest.raises(FormatError, match="chunk-malformed"):
            validate(io.BytesIO(other), head, commit)


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


class TestArrow(ContainerContract):
    name = "arrow"

    @pytest.fixture
    def file(self, tmp_path: Path) -> tuple[Path, list[Record]]:
        schema = SCHEMAS["threshold"]
        records = [random_record(schema, part, seed=20) for part in ([9, 30], [20, 3, 8])]
        data, _, _ = self.shard(schema, records)
        path = tmp_path / "shard.arrow"
        path.write_bytes(data)
        return path, records

    def test_stock_pyarrow_polars_pandas_duckdb_and_datasets_read_it(
        self, file: tuple[Path, list[Record]]
    ) -> None:
        import datasets
        import duckdb
        import polars

        path, records = file
        shard = pa.ipc.open_file(path).read_all()
        shard.validate(full=True)
        last = records[-1]
        tokens = last.sample(2)["tokens"].tolist()
        counts = last.sample(2)["num_tail"].tolist()
        keys = [key for record in records for key in record.sample_keys()]
        assert shard.column("sample_key").to_pylist() == keys
        assert shard.column("tokens")[4].as_py() == tokens
        assert [len(ids) for ids in shard.column("tail_ids")[4].as_py()] == counts
        logprobs = shard.column("head_logprobs")[4].as_py()

        frame = polars.read_ipc(path)
        assert frame["tokens"][4].to_list() == tokens
        assert frame["head_logprobs"][4].to_list() == logprobs
        pandas_frame = shard.to_pandas()
        assert pandas_frame["tokens"][4].tolist() == tokens
        # DuckDB knows no half floats: they are widened on the way in.
        single = pa.schema(
            [
                pa.field(f.name, pa.list_(pa.list_(pa.float32())))
                if f.name == "head_logprobs"
                else pa.field(f.name, pa.list_(pa.float32()))
                if f.name == "label_logprob"
                else f
                for f in shard.schema
            ]
        )
        with duckdb.connect() as connection:
            connection.register("shard", shard.cast(single))
            [row] = connection.sql(
                "select tokens, len(tail_ids), sample_key, head_logprobs from shard offset 4"
            ).fetchall()
        assert list(row[0]) == tokens
        assert row[1:3] == (len(tokens), keys[4])
        assert [list(part) for part in row[3]] == logprobs
        dataset = datasets.Dataset(shard)
        assert dataset[4]["tokens"] == tokens

    def test_arrays_are_views_of_the_range(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30], seed=21)])
        part = np.frombuffer(chunk_bytes(data, commit, 0), np.uint8)
        got = container("arrow").decode(part.data, head, commit, 0)
        for name in ("tokens", "ids", "logprobs", "lse"):
            assert np.shares_memory(got[name], part), name
            assert not got[name].flags.writeable

    def test_compressed_batches_are_refused_before_they_are_inflated(self) -> None:
        schema = SCHEMAS["fixed-k"]
        record = random_record(schema, [30], seed=22)
        data, commit, head = self.shard(schema, [record])
        batch = pa.ipc.open_file(data).get_batch(0)
        for codec in ("zstd", "lz4"):
            options = pa.ipc.IpcWriteOptions(compression=codec)
            stream = io.BytesIO()
            with pa.ipc.new_stream(stream, batch.schema, options=options) as writer:
                writer.write_batch(batch)
            part = stream.getvalue()[batch.schema.serialize().size : -8]
            with pytest.raises(FormatError, match="compressed"):
                container("arrow").decode(part, head, recommitted(commit, 0, part), 0)

    def test_a_footer_that_points_elsewhere_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        records = [random_record(schema, [8, 8], seed=i) for i in range(2)]
        data, commit, head = self.shard(schema, records)
        first, second = (struct.pack("<q", row.offset) for row in commit.chunks)
        footer = data.rindex(second)
        swapped = data[:footer] + first + data[footer + 8 :]
        with pytest.raises(FormatError, match="footer"):
            container("arrow").validate_object(io.BytesIO(swapped), head, commit)

    def test_an_offset_that_points_outside_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=23)])
        part = bytes(chunk_bytes(data, commit, 0))
        offsets = struct.pack("<3i", 0, 30, 35)
        assert offsets in part
        hostile = part.replace(offsets, struct.pack("<3i", 0, 2_000_000_000, 35))
        with pytest.raises(FormatError, match="chunk-malformed"):
            container("arrow").decode(hostile, head, recommitted(commit, 0, hostile), 0)


def test_names() -> None:
    assert [container(name).name for name in CONTAINERS] == list(CONTAINERS)
    with pytest.raises(UsageError, match="no such container"):
        container("parquet")


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


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3:UserWarning")
def test_the_page_about_other_tools_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = random_record(SCHEMAS["threshold"], [9, 30], seed=24)
    for name in CONTAINERS:
        data, _ = write_shard(header(SCHEMAS["threshold"], container=name), [record])
        (tmp_path / f"shard{container(name).suffix}").write_bytes(data)
    page = Path(__file__).resolve().parent.parent / "docs" / "stock-readers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
    assert str([(key, n) for key, n in zip(record.sample_keys(), (9, 30), strict=True)]) in (
        capsys.readouterr().out
    )
