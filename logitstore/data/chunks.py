"""Decoded chunks: where their samples lie, a bounded cache of them, and gathering samples of many.

Letters: S samples of a chunk, B samples gathered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from logitstore.record import Record

__all__ = ["Chunk", "ChunkCache", "Row", "gather"]

# What a chunk costs beside its arrays: Python objects, and numbers in lists.
_OVERHEAD_BYTES = 8_192
_BYTES_PER_BOUND = 40


class Chunk:
    """One decoded chunk, with the bounds of every sample on every axis.

    Attributes:
        record: its columns.
        bounds: axis ("sample", "position" or a group) -> S + 1 offsets; sample i holds entries
            bounds[i] to bounds[i + 1]. Lists, because single look-ups in them are much cheaper than
            in arrays, and there is one for every sample read.
    """

    __slots__ = ("bounds", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        positions = record.sample_offsets()
        self.bounds = {
            "sample": list(range(record.num_samples + 1)),
            "position": positions.tolist(),
        }
        for group in record.schema.groups:
            if group.count_column in record:
                offsets = record.group_offsets(group)
                if group.owner == "position":
                    offsets = offsets[positions]
                self.bounds[group.name] = offsets.tolist()

    def sample_key(self, row: int) -> str | None:
        """The sample's stable name, or None where the store keeps none."""
        data = self.record.get("sample_key")
        if data is None:
            return None
        bounds = self.bounds["sample_key"]
        return data[bounds[row] : bounds[row + 1]].tobytes().decode()


class Row(NamedTuple):
    """One sample of a decoded chunk."""

    chunk: Chunk
    row: int


class ChunkCache:
    """The chunks used last, as long as they fit.

    It holds no lock and no handle, so that a forked child simply goes on with what the parent had.

    Args:
        limit_bytes: decoded bytes to keep; the chunk in use is kept even when it alone is larger.
        mapped: chunks are views of mapped files: what is kept is that they were checked, and the
            page cache keeps the bytes.
    """

    def __init__(self, limit_bytes: int, *, mapped: bool = False) -> None:
        self.limit_bytes, self.mapped = limit_bytes, mapped
        self._bytes = 0
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._chunks

    def get(self, key: tuple[int, int], read: Callable[[], Record]) -> Chunk:
        """The chunk of that (shard, chunk) number, read when it is not here."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._chunks.move_to_end(key)
            return chunk
        chunk = self._chunks[key] = Chunk(read())
        self._bytes += self._size(chunk)
        while self._bytes > self.limit_bytes and len(self._chunks) > 1:
            _, dropped = self._chunks.popitem(last=False)
            self._bytes -= self._size(dropped)
        return chunk

    def _size(self, chunk: Chunk) -> int:
        bounds = sum(len(offsets) for offsets in chunk.bounds.values())
        own = 0 if self.mapped else chunk.record.nbytes
        return own + _OVERHEAD_BYTES + _BYTES_PER_BOUND * bounds


def gather(rows: Sequence[Row]) -> Record:
    """The samples of `rows` one after another, in memory of their own.

    Rows that follow each other in one chunk are copied as one piece.
    """
    runs: list[tuple[Chunk, int, int]] = []
    for chunk, row in rows:
        if runs and runs[-1][0] is chunk and runs[-1][2] == row:
            runs[-1] = (chunk, runs[-1][1], row + 1)
        else:
            runs.append((chunk, row, row + 1))
    schema = rows[0].chunk.record.schema
    arrays = {}
    for name in rows[0].chunk.record.arrays:
        column = schema.column(name)
        assert column is not None
        axis = column.axis
        pieces = []
        for chunk, start, stop in runs:
            bounds = chunk.bounds[axis]
            pieces.append(chunk.record.arrays[name][bounds[start] : bounds[stop]])
        arrays[name] = np.concatenate(pieces)
    return Record(schema, arrays)
