"""What every container must do: what goes in comes out, in the same bytes each time, and nothing
hostile gets by."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.containers import container
from logitstore.containers.protocol import crc32c
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
