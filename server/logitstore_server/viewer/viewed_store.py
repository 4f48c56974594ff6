"""A store as pages see it: decoded chunks held for a while, glyphs of its ids, damage found so
far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from logitstore.display.glyphs import Glyphs, header_glyphs
from logitstore.record import Record
from logitstore.spec.errors import LogitstoreError
from logitstore.spec.plan import CorpusInfo
from logitstore.spec.statistics import Statistics
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["ShardState", "ViewedStore"]

# Decoded chunks held per store; a chunk of top-64 records takes about 0.8 MB.
_CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class ShardState:
    """What reading found about a shard's bytes.

    Attributes:
        state: "unread", "checked" (every chunk has its committed checksum) or "damaged".
        problem: the error of a damaged one, as `LogitstoreError.as_dict` gives it.
    """

    state: str = "unread"
    problem: dict[str, object] | None = None


class ViewedStore:
    """One store, one name.

    Attributes:
        name: in URLs.
        store: the open store.
    """

    def __init__(self, name: str, store: Store) -> None:
        self.name = name
        self.store = store
        self.header = store.header
        self._states: dict[int, ShardState] = {}
        self._chunks: dict[tuple[int, int], Record] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()

    @cached_property
    def table(self) -> TokenizerTable | None:
        """The bytes of every id, None when the store keeps none.

        Raises: IntegrityError, FormatError, StorageError.
        """
        tokenizer = self.header.tokenizer
        if tokenizer is None or tokenizer.table is None:
            return None
        where = f"{self.store.location}/tables/{tokenizer.table}"
        return TokenizerTable.decode(self.store.table(tokenizer.table), where=where)

    @cached_property
    def table_problem(self) -> LogitstoreError | None:
        """Why the table cannot be read; pages go on with numbers."""
        try:
            _ = self.table
        except LogitstoreError as error:
            return error
        return None

    @cached_property
    def corpus(self) -> CorpusInfo | LogitstoreError | None:
        """What the first plan says of the corpus, or why it cannot be read."""
        try:
            plan = next(iter(self.store.plans()), None)
        except LogitstoreError as error:
            return error
        return None if plan is None else plan.corpus

    @cached_property
    def glyphs(self) -> Callable[[int], Glyphs]:
        """id -> what is shown for it."""
        return header_glyphs(self.header, None if self.table_problem is not None else self.table)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the whole snapshot, from commits or the index.

        Raises: what `Store.statistics` raises.
        """
        return self.store.statistics()

    @cached_property
    def column_bytes(self) -> dict[str, int]:
        """Of the whole snapshot, from commits or the index."""
        return self.store.column_bytes()

    def chunk(self, shard: int, chunk: int) -> Record:
        """A chunk's record with all columns; what fails is remembered as the shard's state.

        Raises: what `Store.read_chunk` raises.
        """
        key = shard, chunk
        with self._lock:
            held = self._chunks.pop(key, None)
            if held is not None:
                self._chunks[key] = held  # now the most recently used
                return held
        try:
            record = self.store.read_chunk(shard, chunk)
        except LogitstoreError as error:
            self._states[shard] = ShardState("damaged", error.as_dict())
            raise
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = record
                self._held_bytes += record.nbytes
            while self._held_bytes > _CACHE_BYTES and len(self._chunks) > 1:
                oldest = next(iter(self._chunks))
                self._held_bytes -= self._chunks.pop(oldest).nbytes
        return record

    def sample(self, number: int) -> Record:
        """One sample with all columns.

        Raises: NotFoundError sample-out-of-range; what `Store.read_chunk` raises.
        """
        shard, chunk, row = self.store.locate(number)
        return self.chunk(shard, chunk).sample(row)

    def state(self, shard: int) -> ShardState:
        """What is known about a shard's bytes so far."""
        return self._states.get(shard, ShardState())

    def check(self, shard: int) -> ShardState:
        """Read a shard's chunks and compare them with their committed checksums."""
        try:
            for number in range(len(self.store.commit(shard).chunks)):
                self.store.read_chunk(shard, number, ())
        except LogitstoreError as error:
            self._states[shard] = ShardState("damaged", error.as_dict())
        else:
            self._states[shard] = ShardState("checked")
        return self._states[shard]

    def first_sample(self, shard: int) -> int:
        """Number of a shard's first sample."""
        return sum(view.samples for view in self.store.shards[:shard])
