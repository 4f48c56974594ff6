"""Frequency ranks in place of token ids inside objects (reader feature `rank-ids`).

An id says little about how frequent its token is. Numbered by falling frequency the same ids lie
denser, so the codecs need fewer bits for them: measured on real rows in `benchmarks/bytes.py`. The
store keeps the order in a table; the wrapper here stands around either container, so that records
hold true ids on both of its sides.

Letters: V vocabulary, P positions, E entries of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitstore.containers.protocol import (
    Container,
    ShardSummary,
    ShardWriter,
    check_values,
    column_set,
)
from logitstore.record.record import Record
from logitstore.spec.commit import Commit
from logitstore.spec.errors import FormatError
from logitstore.spec.header import Header
from logitstore.spec.id_ranks import RANKED_COLUMNS, RANKS_FEATURE, RANKS_TABLE
from logitstore.spec.schema import Group, Schema

__all__ = ["IdRanks", "count_ids", "ranked", "uses_ranks"]


@dataclass(frozen=True)
class IdRanks:
    """An order of the vocabulary.

    Attributes:
        id_of_rank, rank_of_id: uint32 [V], inverse permutations.
    """

    id_of_rank: NDArray[np.uint32]
    rank_of_id: NDArray[np.uint32]

    @classmethod
    def by_frequency(cls, counts_V: ArrayLike) -> Self:
        """By falling count, equal counts by ascending id."""
        return cls._of(np.argsort(-np.asarray(counts_V, np.float64), kind="stable"))

    @classmethod
    def decode(cls, data: bytes, vocab_size: int, *, where: str) -> Self:
        """From the table's bytes.

        Raises: FormatError document-invalid unless they hold every id once.
        """
        ids = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
        whole = len(data) == 4 * vocab_size
        if not whole or not np.array_equal(np.sort(ids), np.arange(vocab_size)):
            raise FormatError(
                "document-invalid",
                "not an order of the vocabulary",
                where=where,
                got=f"{len(data)} bytes" if not whole else "ids missing or repeated",
                expected=f"{vocab_size} little-endian uint32, every id once",
            )
        return cls._of(ids)

    def encode(self) -> bytes:
        """The table: little-endian uint32, the id of every rank."""
        return self.id_of_rank.astype("<u4").tobytes()

    @classmethod
    def _of(cls, id_of_rank: NDArray[Any]) -> Self:
        ranks = np.empty(len(id_of_rank), np.uint32)
        ranks[id_of_rank] = np.arange(len(id_of_rank), dtype=np.uint32)
        return cls(id_of_rank.astype(np.uint32), ranks)


def uses_ranks(header: Header) -> bool:
    """Whether the store's objects hold ranks."""
    return RANKS_FEATURE in header.reader_features


def count_ids(record: Record, vocab_size: int) -> NDArray[np.int64]:
    """int64 [V]: how often each id stands in the columns that become ranks."""
    counts = np.zeros(vocab_size, np.int64)
    for name in RANKED_COLUMNS:
        if name in record:
            counts += np.bincount(record[name].ravel(), minlength=vocab_size)
    return counts


def ranked(inner: Container, header: Header, table: Callable[[str], bytes]) -> Container:
    """`inner`, or around it what turns ids into ranks and back when the store asks for that.

    Args:
        table: reads a table of the store by name.
    """
    if not uses_ranks(header):
        return inner
    ranks = IdRanks.decode(table(RANKS_TABLE), header.vocab_size, where=f"tables/{RANKS_TABLE}")
    return _RankedContainer(inner, ranks)


class _RankedContainer:
    def __init__(self, inner: Container, ranks: IdRanks) -> None:
        self.name, self.suffix = inner.name, inner.suffix
        self._inner = inner
        self._ranks = ranks

    def writer(self, file: BinaryIO, header: Header) -> _RankedWriter:
        """See `Container.writer`."""
        return _RankedWriter(self._inner.writer(file, header), header, self._ranks)

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
        schema = header.schema_
        wanted = column_set(schema, columns)
        read = wanted | {
            group.id_column
            for group in _ranked_groups(schema)
            if group.id_column
            and any(c.axis == group.name and c.name in wanted for c in schema.columns)
        }
        stored = self._inner.decode(data, header, commit, chunk, read, verified=verified)
        return _renumbered(stored, self._ranks.id_of_rank).select(wanted)

    def validate_object(self, file: BinaryIO, header: Header, commit: Commit) -> None:
        """See `Container.validate_object`."""
        self._inner.validate_object(file, header, commit)


class _RankedWriter:
    def __init__(self, inner: ShardWriter, header: Header, ranks: IdRanks) -> None:
        self._inner = inner
        self._header = header
        self._ranks = ranks

    def add(self, chunk: Record) -> None:
        """See `ShardWriter.add`."""
        check_values(chunk, self._header, "record to be written")
        self._inner.add(_renumbered(chunk, self._ranks.rank_of_id))

    def finish(self) -> ShardSummary:
        """See `ShardWriter.finish`."""
        return self._inner.finish()


def _ranked_groups(schema: Schema) -> list[Group]:
    return [group for group in schema.groups if group.id_column in RANKED_COLUMNS]


def _renumbered(record: Record, new_number_V: NDArray[np.uint32]) -> Record:
    """The record with other numbers for its ids; entries of sets ascend in them again."""
    arrays = dict(record.arrays)
    for name in RANKED_COLUMNS:
        if name in arrays:
            arrays[name] = new_number_V[arrays[name]]
    for group in _ranked_groups(record.schema):
        if group.id_column not in arrays:
            continue
        order = _by_position_then_id(arrays[group.id_column], arrays[group.count_column])
        for column in record.schema.columns:
            if column.axis == group.name and column.name in arrays:
                arrays[column.name] = arrays[column.name][order]
    return Record(record.schema, arrays)


def _by_position_then_id(ids_E: NDArray[np.uint32], counts_P: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [E]: the order in which ids ascend inside each position."""
    owner = np.repeat(np.arange(len(counts_P), dtype=np.uint64), counts_P)
    bits_of_entry = max(len(ids_E) - 1, 0).bit_length()
    if len(counts_P).bit_length() + 32 + bits_of_entry > 64:
        return np.lexsort((ids_E, owner))
    # One sort of plain numbers with the place in their last bits is several times faster.
    shift = np.uint64(bits_of_entry)
    keys = (owner << np.uint64(32) | ids_E) << shift | np.arange(len(ids_E), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64((1 << bits_of_entry) - 1)).astype(np.int64)
