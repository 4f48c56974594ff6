"""The zarr container: a stored ZIP that holds a plain Zarr v3 group, chunk after chunk.

Stock zarr-python opens the object through ZipStore. The data path reads one contiguous range and
decodes its entries directly; it needs neither the ZIP's directory nor any zarr.json.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from logitstore.containers import codecs
from logitstore.containers.protocol import (
    MAX_ARRAY_BYTES,
    ShardSummary,
    check_chunk,
    check_header,
    check_record,
    check_values,
    column_set,
    crc32c,
    malformed,
)
from logitstore.containers.stored_zip import (
    Entry,
    central_directory,
    local_entry,
    local_entry_bytes,
    split_entries,
)
from logitstore.containers.zarr_layout import (
    ALLOWED_CODECS,
    StoredArray,
    array_metadata,
    group_metadata,
    pairs_dtype,
    stored_arrays,
)
from logitstore.record.record import Record
from logitstore.spec.commit import ChunkRow, Commit, Layout
from logitstore.spec.header import Header
from logitstore.spec.schema import DType, Group

__all__ = ["ZarrContainer"]

_METADATA = "zarr.json"
_CRC_BYTES = 4
_ITEM_BYTES = {name: np.dtype(name).itemsize for name in get_args(DType)}


class ZarrContainer:
    """Small, standard and decoded fast; the default."""

    name = "zarr"
    suffix = ".zarr.zip"

    def writer(self, file: BinaryIO, header: Header) -> _Writer:
        """See `Container.writer`. Compresses in `add`, writes in `finish`."""
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
        """See `Container.decode`."""
        row, where = check_chunk(data, commit, chunk, verified=verified)
        layout = _checked_layout(header, commit, row, where)
        arrays = _arrays(header, layout)
        try:
            contents = split_entries(memoryview(data), [a.key(chunk) for a in arrays])
        except ValueError as error:
            raise malformed(where, str(error)) from None
        coded = dict(zip((a.name for a in arrays), contents, strict=True))
        return _Decoder(header, layout, row, where, arrays, coded).record(columns)

    def validate_object(self, file: BinaryIO, header: Header, commit: Commit) -> None:
        """See `Container.validate_object`: entries by name, order, place, and every zarr.json."""
        where = commit.object.name
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise malformed(where, f"not a ZIP: {error}") from None
        with archive:
            expected: dict[str, bytes | None] = {}
            offsets: dict[str, int] = {}
            if commit.chunks:
                longest = max(row.positions for row in commit.chunks)
                most = max(row.samples for row in commit.chunks)
                layout = _checked_layout(header, commit, commit.chunks[0], where)
                if (layout.samples, layout.positions) != (most, _capacity(header, longest)):
                    raise malformed(where, "layout is not that of the chunk table", got=layout)
                arrays = _arrays(header, layout)
                for number, row in enumerate(commit.chunks):
                    offsets[arrays[0].key(number)] = row.offset
                    expected |= {a.key(number): None for a in arrays}
                for array in arrays:
                    metadata = array_metadata(array, layout, len(commit.chunks))
                    expected[f"{array.name}/{_METADATA}"] = metadata
            expected[_METADATA] = group_metadata()
            entries = archive.infolist()
            if [e.filename for e in entries] != list(expected):
                raise malformed(
                    where,
                    "entries are not those of the header's arrays, in chunk order",
                    got=f"{len(entries)} entries",
                    expected=f"{len(expected)}",
                )
            end = 0
            for entry in entries:
                # A directory could as well point into the middle of another entry.
                if not end == entry.header_offset == offsets.get(entry.filename, end):
                    raise malformed(where, f"entry {entry.filename} is not where it belongs")
                end += local_entry_bytes(entry.filename, entry.file_size)
                plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits
                if not plain or entry.file_size != entry.compress_size:
                    raise malformed(where, f"entry {entry.filename} is not plainly stored")
                metadata_json = expected[entry.filename]
                if metadata_json is not None:
                    _check_metadata(archive, entry, metadata_json, where)
            if archive.start_dir != end:
                raise malformed(where, "bytes between the last entry and the directory")


@dataclass(frozen=True)
class _Part:
    """One array of one chunk, without padding: pco chunks, or the values where zstd codes them."""

    coded: bytes | NDArray[Any]
    count: int
    pad: int


@dataclass(frozen=True)
class _PendingChunk:
    samples: int
    positions: int
    parts: dict[str, _Part]


class _Writer:
    def __init__(self, file: BinaryIO, header: Header) -> None:
        check_header(header)
        self._file = file
        self._header = header
        self._chunks: list[_PendingChunk] = []
        self._positions = header.chunk_positions
        self._entries: list[Entry] = []
        self._offset = 0

    def add(self, chunk: Record) -> None:
        """See `ShardWriter.add`. Keeps the compressed chunk: common sizes are known at the end."""
        schema = self._header.schema_
        check_record(chunk, self._header)
        if chunk.num_positions > self._positions:
            self._widen(chunk.num_positions)
        orders = {g.name: self._pair_order(chunk, g) for g in schema.groups if g.pairs is not None}
        parts = {}
        for array in stored_arrays(schema, self._pairs):
            if array.role == "pairs":
                pairs = self._pair_values(chunk, array, orders[array.axis])
                parts[array.name] = _pairs_part(pairs, array.pco_level)
                continue
            values = self._values(chunk, array)
            if array.axis in orders:
                values = values[orders[array.axis]]
            flat = values.ravel()
            coded = codecs.pco_chunks(flat, array.pco_level) if array.is_pco else flat
            parts[array.name] = _Part(coded, values.size, 0)
        self._chunks.append(_PendingChunk(chunk.num_samples, chunk.num_positions, parts))

    def finish(self) -> ShardSummary:
        """See `ShardWriter.finish`."""
        header, chunks = self._header, self._chunks
        rows: list[ChunkRow] = []
        column_bytes: dict[str, int] = {}
        layout = self._layout() if chunks else None
        if layout is not None:
            arrays = _arrays(header, layout)
            for number, chunk in enumerate(chunks):
                start, parts = self._offset, []
                for array in arrays:
                    data = _encode(array, chunk.parts[array.name], layout)
                    parts.append(self._entry(array.key(number), data))
                    column_bytes[array.name] = column_bytes.get(array.name, 0) + len(parts[-1])
                data = b"".join(parts)
                rows.append(
                    ChunkRow(
                        offset=start,
                        bytes=len(data),
                        samples=chunk.samples,
                        positions=chunk.positions,
                        crc32c=crc32c(data),
                    )
                )
                self._file.write(data)
            for array in arrays:
                metadata = array_metadata(array, layout, len(chunks))
                self._file.write(self._entry(f"{array.name}/{_METADATA}", metadata))
        self._file.write(self._entry(_METADATA, group_metadata()))
        end = central_directory(self._entries, self._offset)
        self._file.write(end)
        column_bytes["container"] = self._offset + len(end) - sum(column_bytes.values())
        return ShardSummary(
            chunks=tuple(rows),
            layout=layout,
            column_bytes=column_bytes,
            samples=sum(c.samples for c in chunks),
            positions=sum(c.positions for c in chunks),
        )

    def _values(self, record: Record, array: StoredArray) -> NDArray[Any]:
        if array.role == "column":
            values = record[array.name]
            if array.step is None:
                return values
            try:
                return codecs.steps_of(values, array.step)
            except ValueError as error:
                raise malformed(f"column {array.name}", str(error)) from None
        assert array.group is not None
        return np.array([record[array.group.count_column].sum(dtype=np.int64)], np.uint32)

    def _pair_order(self, record: Record, group: Group) -> NDArray[np.intp]:
        """Entries of a group with pairs by ascending id, equal ids by position."""
        assert group.id_column is not None
        ids = record[group.id_column]
        first = np.zeros(len(ids) + 1, np.bool_)
        first[record.group_offsets(group)] = True
        ascending = np.all((ids[1:] > ids[:-1]) | first[1:-1])
        if not ascending or (len(ids) and int(ids.max()) >= self._header.vocab_size):
            raise malformed(
                f"column {group.id_column}",
                "ids must ascend inside a position and be below the vocabulary size",
            )
        return np.argsort(ids, kind="stable")

    def _pair_values(
        self, record: Record, array: StoredArray, order: NDArray[np.intp]
    ) -> NDArray[Any]:
        group = array.group
        assert group is not None
        assert group.id_column is not None
        position = np.repeat(
            np.arange(record.num_positions, dtype=self._pairs), record[group.count_column]
        )
        pairs = record[group.id_column].astype(self._pairs) * position.dtype.type(self._positions)
        return (pairs + position)[order]

    @property
    def _pairs(self) -> str:
        return pairs_dtype(self._positions, self._header.vocab_size)

    def _widen(self, positions: int) -> None:
        """A sample longer than a chunk gives the pairs of the chunks before it another stride."""
        old_stride, old_dtype, arrays = self._positions, self._pairs, self._header.schema_
        self._positions = positions
        for array in stored_arrays(arrays, old_dtype):
            if array.role != "pairs":
                continue
            for chunk in self._chunks:
                old = chunk.parts[array.name]
                assert isinstance(old.coded, bytes)
                file = memoryview(codecs.pco_file([old.coded], old.count))
                ids, position = np.divmod(codecs.pco_decode(file, old.count, old_dtype), old_stride)
                pairs = ids.astype(self._pairs) * np.array(positions, self._pairs) + position
                chunk.parts[array.name] = _pairs_part(pairs.astype(self._pairs), array.pco_level)

    def _layout(self) -> Layout:
        schema = self._header.schema_
        entries = {}
        for array in stored_arrays(schema, self._pairs):
            if schema.group(array.axis) is not None:
                width = math.prod(array.inner)
                longest = max(chunk.parts[array.name].count // width for chunk in self._chunks)
                # Zarr has no chunks of size 0.
                entries[array.axis] = max(longest, 1)
        return Layout(
            samples=max(chunk.samples for chunk in self._chunks),
            positions=_capacity(self._header, max(chunk.positions for chunk in self._chunks)),
            entries=entries,
        )

    def _entry(self, name: str, data: bytes) -> bytes:
        block, entry = local_entry(name, data, self._offset)
        self._entries.append(entry)
        self._offset += len(block)
        return block


def _pairs_part(pairs: NDArray[Any], level: int) -> _Part:
    coded = codecs.pco_chunks(pairs, level, codecs.PAIRS_SEGMENT)
    return _Part(coded, len(pairs), int(pairs[-1]) if len(pairs) else 0)


def _encode(array: StoredArray, part: _Part, layout: Layout) -> bytes:
    """One chunk of an array, padded to the shard's sizes, and the crc32c that ends its codecs."""
    total = math.prod(array.size(layout))
    if isinstance(part.coded, bytes):
        padding = np.full(total - part.count, part.pad, array.stored_dtype)
        data = codecs.pco_file([part.coded, codecs.pco_chunks(padding, array.pco_level)], total)
    else:
        values = np.zeros(total, array.stored_dtype)
        values[: part.count] = part.coded
        data = codecs.zstd_encode(values)
    return data + crc32c(data).to_bytes(_CRC_BYTES, "little")


@dataclass(frozen=True)
class _Decoder:
    """Decodes wanted columns of one chunk."""

    header: Header
    layout: Layout
    row: ChunkRow
    where: str
    arrays: tuple[StoredArray, ...]
    coded: dict[str, memoryview]

    def record(self, columns: Collection[str] | None) -> Record:
        schema = self.header.schema_
        wanted = column_set(schema, columns)
        values: dict[str, NDArray[Any]] = {}
        # Counts come first: they say how much of the padded arrays is real.
        used = {"sample": self.row.samples, "position": self.row.positions}
        by_name = {array.name: array for array in self.arrays}
        for group in schema.groups:
            if group.count_column not in wanted:
                continue
            if group.pairs is None:
                counts = self._column(by_name[group.count_column], used[group.owner])
                values[group.count_column] = counts
                used[group.name] = int(counts.sum(dtype=np.int64))
            else:
                used[group.name] = int(self._whole(by_name[f"num_{group.pairs}"])[0])
            if used[group.name] > self.layout.entries[group.name]:
                raise malformed(
                    self.where,
                    f"group {group.name} counts more entries than it can hold",
                    got=used[group.name],
                    expected=f"at most {self.layout.entries[group.name]}",
                )
        orders: dict[str, NDArray[np.intp]] = {}
        for array in self.arrays:
            if array.role == "pairs" and array.axis in used:
                pairs = self._whole(array)[: used[array.axis]]
                split, orders[array.axis] = self._split_pairs(array, pairs)
                values |= split
        for array in self.arrays:
            if array.role == "column" and array.name in wanted and array.name not in values:
                column = self._column(array, used[array.axis])
                order = orders.get(array.axis)
                values[array.name] = column if order is None else column[order]
        in_order = {c.name: values[c.name] for c in schema.columns if c.name in wanted}
        record = Record(schema, in_order)
        check_values(record, self.header, self.where)
        if record.num_positions != self.row.positions:
            raise malformed(
                self.where,
                "sample lengths do not add up",
                got=record.num_positions,
                expected=self.row.positions,
            )
        return record

    def _column(self, array: StoredArray, used: int) -> NDArray[Any]:
        values = self._whole(array).reshape(array.size(self.layout))[:used]
        if array.step is not None:
            return codecs.from_steps(values, array.step, array.dtype)
        return values

    def _whole(self, array: StoredArray) -> NDArray[Any]:
        count = math.prod(array.size(self.layout))
        decode = codecs.pco_decode if array.is_pco else codecs.zstd_decode
        try:
            return decode(self.coded[array.name][:-_CRC_BYTES], count, array.stored_dtype)
        except ValueError as error:
            raise malformed(self.where, f"array {array.name}: {error}") from None

    def _split_pairs(
        self, array: StoredArray, pairs: NDArray[Any]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.intp]]:
        """Count and id columns of a group from its id * P + position, and the order of its entries:
        position by position, as records hold them."""
        group, schema, stride = array.group, self.header.schema_, self.layout.positions
        assert group is not None
        assert group.id_column is not None
        ids = pairs // stride
        position = pairs - ids * pairs.dtype.type(stride)
        # numpy sorts 16-bit keys by radix, several times faster than wider ones
        position = position.astype(np.uint16 if stride <= 1 << 16 else np.uint32)
        ascending = bool(np.all(pairs[1:] > pairs[:-1]))
        if len(pairs) and not (
            ascending
            and int(ids[-1]) < self.header.vocab_size
            and int(position.max()) < self.row.positions
        ):
            raise malformed(self.where, f"array {array.name} holds no ascending pairs of its chunk")
        order = np.argsort(position, kind="stable")
        columns = {
            group.count_column: np.bincount(position, minlength=self.row.positions),
            group.id_column: ids[order],
        }
        for name, values in columns.items():
            column = schema.column(name)
            assert column is not None
            if len(values) and int(values.max()) > np.iinfo(column.dtype).max:
                raise malformed(self.where, f"column {name} cannot hold its values")
            columns[name] = values.astype(column.dtype, copy=False)
        return columns, order


def _arrays(header: Header, layout: Layout) -> tuple[StoredArray, ...]:
    return stored_arrays(header.schema_, pairs_dtype(layout.positions, header.vocab_size))


def _capacity(header: Header, longest: int) -> int:
    """P: positions every chunk is padded to."""
    return max(header.chunk_positions, longest)


def _checked_layout(header: Header, commit: Commit, row: ChunkRow, where: str) -> Layout:
    """The commit's layout, once a chunk of it fits the limits.

    Raises: FormatError chunk-malformed.
    """
    layout = commit.layout
    if layout is None:
        raise malformed(where, "commit has no layout")
    if row.samples > layout.samples or row.positions > layout.positions:
        raise malformed(where, "layout is too small for the chunk", got=layout, expected=row)
    if layout.entries.keys() != {group.name for group in header.schema_.groups}:
        raise malformed(
            where, "layout.entries names other groups than the header", got=sorted(layout.entries)
        )
    for array in _arrays(header, layout):
        chunk_bytes = math.prod(array.size(layout)) * _ITEM_BYTES[array.dtype]
        if not 1 <= chunk_bytes <= MAX_ARRAY_BYTES:
            raise malformed(
                where,
                f"array {array.name} has an impossible size",
                got=f"{array.size(layout)} {array.dtype}",
                expected=f"1 to {MAX_ARRAY_BYTES} bytes a chunk",
            )
    return layout


def _check_metadata(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, expected: bytes, where: str
) -> None:
    """A zarr.json must say what ours would; codecs outside the list are named."""
    if entry.file_size > 4 * len(expected) + 4096:
        raise malformed(where, f"{entry.filename} is too long", got=f"{entry.file_size} bytes")
    try:
        found = json.loads(archive.read(entry))
    except (ValueError, RecursionError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise malformed(where, f"{entry.filename} is not JSON: {error}") from None
    wanted = json.loads(expected)
    if _without_levels(found) == _without_levels(wanted):
        return
    names = [c.get("name") if isinstance(c, dict) else c for c in _list(found, "codecs")]
    unknown = [name for name in names if name not in ALLOWED_CODECS]
    if unknown:
        raise malformed(
            where,
            f"{entry.filename} asks for codecs that are not allowed",
            got=", ".join(map(str, unknown)),
            expected=", ".join(sorted(ALLOWED_CODECS)),
        )
    raise malformed(
        where,
        f"{entry.filename} disagrees with header and commit",
        got=found,
        expected=wanted,
    )


def _without_levels(metadata: Any) -> Any:
    """How hard a writer compressed is its own affair."""
    if isinstance(metadata, dict):
        return {key: _without_levels(value) for key, value in metadata.items() if key != "level"}
    return [_without_levels(v) for v in metadata] if isinstance(metadata, list) else metadata


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key, []) if isinstance(value, dict) else []
    return found if isinstance(found, list) else [found]
