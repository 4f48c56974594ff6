"""The arrow container: an uncompressed Arrow IPC file; one record batch a chunk, one row a sample.

Typed columns that any Arrow reader opens, and the zero-copy option: decoded arrays are views of the
range given. Position columns are lists, ragged groups lists of lists; their lengths are the list
offsets, so the count columns of groups are not stored.

Source: Apache Arrow Columnar Format 1.5, "Encapsulated message format" and "IPC File Format".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.containers.arrow_message import record_batch_ranges, refuse_compression
from logitstore.containers.protocol import (
    ShardSummary,
    check_chunk,
    check_header,
    check_record,
    check_values,
    column_set,
    crc32c,
    malformed,
)
from logitstore.record.record import Record
from logitstore.spec.commit import ChunkRow, Commit
from logitstore.spec.header import Header
from logitstore.spec.schema import Column, Group, Schema

__all__ = ["ArrowContainer", "batch_columns", "column_types", "record_batch"]

_MAGIC = b"ARROW1\0\0"


class ArrowContainer:
    """Larger, standard and decoded by looking; for local disks and other tools."""

    name = "arrow"
    suffix = ".arrow"

    def writer(self, file: BinaryIO, header: Header) -> _Writer:
        """See `Container.writer`. Writes each chunk in `add`."""
        return _Writer(file, header)

    def decode(
        self,
        data: bytes | memoryview,
        header: Header,
        commit: Commit,
        chunk: int,
        columns: Collection[str] | None = None,
        *,
        verified: bool = False,
    ) -> Record:
        """See `Container.decode`. The arrays are read-only views of `data`, bit masks excepted."""
        row, where = check_chunk(data, commit, chunk, verified=verified)
        schema = header.schema_
        try:
            refuse_compression(memoryview(data))
            message = pa.ipc.read_message(pa.py_buffer(data))
            batch = pa.ipc.read_record_batch(message, _arrow_schema(schema))
            # Offsets and lengths are taken on trust by everything that touches the arrays later.
            batch.validate(full=True)
        except (pa.ArrowException, struct.error, ValueError, OSError) as error:
            raise malformed(where, f"not a valid record batch: {error}") from None
        if batch.num_rows != row.samples:
            raise malformed(
                where, "chunk has another number of rows", got=batch.num_rows, expected=row.samples
            )
        try:
            record = _to_record(batch, schema, column_set(schema, columns))
        except ValueError as error:
            raise malformed(where, str(error)) from None
        check_values(record, header, where)
        if record.num_positions != row.positions:
            raise malformed(
                where,
                "sample lengths do not add up",
                got=record.num_positions,
                expected=row.positions,
            )
        return record

    def validate_object(self, file: BinaryIO, header: Header, commit: Commit) -> None:
        """See `Container.validate_object`: schema and list of batches of the IPC file."""
        where = commit.object.name
        try:
            reader = pa.ipc.open_file(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise malformed(where, f"not an Arrow IPC file: {error}") from None
        expected = _arrow_schema(header.schema_)
        if not reader.schema.equals(expected, check_metadata=True):
            raise malformed(
                where,
                "Arrow schema is not that of the header",
                got=reader.schema.to_string(),
                expected=expected.to_string(),
            )
        try:
            ranges = record_batch_ranges(file)
        except (struct.error, ValueError) as error:
            raise malformed(where, f"no valid footer: {error}") from None
        if ranges != [(row.offset, row.bytes) for row in commit.chunks]:
            raise malformed(
                where,
                "footer does not list the chunks",
                got=f"{len(ranges)} record batches",
                expected=f"{len(commit.chunks)}, where the chunk table has them",
            )


class _Writer:
    def __init__(self, file: BinaryIO, header: Header) -> None:
        check_header(header)
        self._header = header
        self._sink = _Sink(file)
        self._schema = _arrow_schema(header.schema_)
        options = pa.ipc.IpcWriteOptions(compression=None)
        self._writer = pa.ipc.new_file(self._sink, self._schema, options=options)
        # pyarrow writes magic and schema together with the first batch.
        self._next_offset = len(_MAGIC) + self._schema.serialize().size
        self._rows: list[ChunkRow] = []
        self._column_bytes = dict.fromkeys(self._schema.names, 0)

    def add(self, chunk: Record) -> None:
        """See `ShardWriter.add`."""
        check_record(chunk, self._header)
        batch = _to_batch(chunk, self._schema)
        before = self._sink.size
        self._writer.write_batch(batch)
        data = self._sink.take()[self._next_offset - before :]
        self._rows.append(
            ChunkRow(
                offset=self._next_offset,
                bytes=len(data),
                samples=chunk.num_samples,
                positions=chunk.num_positions,
                crc32c=crc32c(data),
            )
        )
        self._next_offset += len(data)
        for name in self._schema.names:
            self._column_bytes[name] += batch.column(name).nbytes

    def finish(self) -> ShardSummary:
        """See `ShardWriter.finish`."""
        self._writer.close()
        rest = self._sink.size - sum(self._column_bytes.values())
        return ShardSummary(
            chunks=tuple(self._rows),
            layout=None,
            column_bytes=self._column_bytes | {"container": rest},
            samples=sum(row.samples for row in self._rows),
            positions=sum(row.positions for row in self._rows),
        )


class _Sink:
    """A file for pyarrow that hands on what is written and remembers it for the checksum."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._recent: list[bytes] = []
        self.size = 0

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._file.write(part)
        self._recent.append(part)
        self.size += len(part)
        return len(part)

    def take(self) -> bytes:
        """What was written since the last call."""
        recent, self._recent = b"".join(self._recent), []
        return recent

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """The caller flushes."""

    def close(self) -> None:
        """The caller closes."""


@lru_cache(maxsize=64)
def _arrow_schema(schema: Schema) -> pa.Schema:
    return column_types(schema, batch_columns(schema))


def batch_columns(schema: Schema) -> list[str]:
    """Names of the columns that a record batch of whole records has."""
    return [column.name for column in _stored_columns(schema)]


def column_types(schema: Schema, names: Collection[str]) -> pa.Schema:
    """Arrow types of the columns of a record batch that holds only these."""
    held = [column for column in _stored_columns(schema) if column.name in names]
    return pa.schema([pa.field(column.name, _type(schema, column)) for column in held])


def record_batch(record: Record) -> pa.RecordBatch:
    """One row a sample, in this container's types, of the columns that the record holds.

    List lengths stand for the counts of groups that have columns.
    """
    return _to_batch(record, column_types(record.schema, record.arrays))


def _stored_columns(schema: Schema) -> list[Column]:
    """All but the counts of groups that have columns: list offsets say the same."""
    axes = {column.axis for column in schema.columns}
    derived = {group.count_column for group in schema.groups if group.name in axes}
    return [column for column in schema.columns if column.name not in derived]


def _type(schema: Schema, column: Column) -> pa.DataType:
    group = schema.group(column.axis)
    if group is not None and group.text:
        return pa.utf8()
    kind = pa.from_numpy_dtype(np.dtype(column.dtype))
    for size in reversed(column.inner):
        kind = pa.list_(kind, size)
    if column.axis == "sample":
        return kind
    if group is not None and group.owner == "position":
        kind = pa.list_(kind)
    return pa.list_(kind)


def _to_batch(record: Record, arrow_schema: pa.Schema) -> pa.RecordBatch:
    schema = record.schema
    samples = pa.array(record.sample_offsets().astype(np.int32))
    arrays = []
    for name in arrow_schema.names:
        column = _known(schema, name)
        group = schema.group(column.axis)
        values = record[name]
        if group is not None and group.text:
            arrays.append(_text(record, group, values))
            continue
        array = pa.array(values.ravel())
        for size in reversed(column.inner):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        if group is not None:
            offsets = pa.array(record.group_offsets(group).astype(np.int32))
            array = pa.ListArray.from_arrays(offsets, array)
        if column.axis == "position" or (group is not None and group.owner == "position"):
            array = pa.ListArray.from_arrays(samples, array)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema)


def _text(record: Record, group: Group, values: NDArray[Any]) -> pa.Array:
    offsets = record.group_offsets(group).astype(np.int32)
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), data)


def _to_record(batch: pa.RecordBatch, schema: Schema, wanted: set[str]) -> Record:
    """Raises: ValueError for nulls, and for lengths that differ between columns."""
    values: dict[str, NDArray[Any]] = {}
    # axis -> list offsets that its columns must share
    offsets: dict[str, NDArray[np.int32]] = {}

    def shared(axis: str, found: NDArray[np.int32]) -> None:
        if not np.array_equal(offsets.setdefault(axis, found), found):
            raise ValueError(f"columns disagree about the lengths of {axis}")

    for column in _stored_columns(schema):
        group = schema.group(column.axis)
        if column.name not in wanted and not (group and group.count_column in wanted):
            continue
        array = _no_nulls(batch.column(column.name))
        if group is not None and group.text:
            found, values[column.name] = _text_bytes(array)
            shared(group.name, found)
            continue
        if column.axis == "position" or (group is not None and group.owner == "position"):
            found, array = _unlist(array)
            shared("position", found)
        if group is not None:
            found, array = _unlist(array)
            shared(group.name, found)
        for size in column.inner:
            array = _no_nulls(array).values[: len(array) * size]
        flat = _no_nulls(array).to_numpy(zero_copy_only=column.dtype != "bool")
        length = len(flat) // math.prod(column.inner)
        values[column.name] = flat.reshape(length, *column.inner)
    if "position" in offsets:
        shared("position", _cumulative(values["sample_lengths"]))
    for group in schema.groups:
        if group.count_column in wanted and group.count_column not in values:
            column = _known(schema, group.count_column)
            counts = np.diff(offsets[group.name])
            if len(counts) and int(counts.max()) > np.iinfo(column.dtype).max:
                raise ValueError(f"column {column.name} cannot hold its values")
            values[column.name] = counts.astype(column.dtype)
    return Record(schema, {c.name: values[c.name] for c in schema.columns if c.name in wanted})


def _known(schema: Schema, name: str) -> Column:
    column = schema.column(name)
    assert column is not None
    return column


def _unlist(array: pa.ListArray) -> tuple[NDArray[np.int32], pa.Array]:
    """Offsets from 0 and the values they divide, all of them."""
    offsets = array.offsets.to_numpy()
    values = array.values
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError("list offsets do not cover their values")
    return offsets, _no_nulls(values)


def _text_bytes(array: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, np.int32, len(array) + 1)
    if ends[0] != 0:
        raise ValueError("text offsets do not start at 0")
    return ends, np.frombuffer(data or b"", np.uint8)[: ends[-1]]


def _no_nulls(array: pa.Array) -> pa.Array:
    if array.null_count or array.offset:
        raise ValueError("nulls and slices are not allowed")
    return array


def _cumulative(lengths: NDArray[Any]) -> NDArray[np.int32]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
