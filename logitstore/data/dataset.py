"""A store as a map-style dataset: one rank's samples in this epoch's order."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from logitstore.data.checks import check_alignment, check_stored_views, check_tokenizer
from logitstore.data.chunks import ChunkCache, Row
from logitstore.data.collate import Item, SampleId
from logitstore.data.order import EpochOrder, RankOrder, ShardTable, Tail, rank_part
from logitstore.data.prefetch import AHEAD_CHUNKS, ChunkKey, Prefetcher
from logitstore.record import Record, columns_needed
from logitstore.record.selection import Selection, Split, parse_conditions
from logitstore.spec.errors import NotFoundError, StateError, UsageError
from logitstore.spec.header import AUX_FIELDS
from logitstore.store import Snapshot, Store
from logitstore.store import open as open_store

__all__ = ["LogitDataset", "SampleIndexError"]


class LogitDataset(torch.utils.data.Dataset[Item]):
    """The samples of a store that this rank reads, in the order of the current epoch.

    `ds[i]` is an `Item` with `.tokens, .labels, .loss_mask, .segment_ids, .position_ids, .targets,
    .sample_key`; `collate` makes a `Batch` of several. The snapshot is pinned when the dataset is
    made: shards committed later belong to the next dataset. Safe in forked and in spawned workers
    for local stores; for remote ones in spawned or forkserver workers.

    Args:
        store: an open store, a folder, or a URL.
        shuffle: two-level shuffle, a function of (snapshot, seed, epoch); False is storage order.
        seed: of the shuffle.
        rank, world_size: this process among those that share the epoch; by default those of
            `torch.distributed` when it is initialised, else 0 of 1.
        tail: when samples do not divide by ranks: "keep" gives some ranks one more, so that parts
            are disjoint and complete; "drop" leaves out fewer than world_size samples.
        epoch: number of the first epoch.
        columns: aux fields to read (`entropy`, `lse`, ...), None for all; the signal's own arrays,
            tokens, segments and masks always come.
        k: use only the k most probable ids of a top-K store, exactly as if k had been captured.
        tokenizer: the student's; refused when its ids do not mean what the teacher's do.
        filter: conditions (field, operator, value) that must all hold; see
            `logitstore.record.selection`.
        holdout: share of samples set aside by a hash of their `sample_key`, [0, 1).
        split: "train" for the other samples, "validation" for those set aside.
        max_samples: use only the first so many of the selected samples, in storage order.
        cache_bytes: decoded chunks to keep in each process.
        cache_dir, cache_limit_bytes, offline: of `logitstore.open`, for a folder or URL. Offline, a
            cache that lacks chunks is refused here, not in the middle of an epoch; with
            `max_samples` chunks are looked for as they are read.

    Raises: UsageError bad-argument, k-exceeds-vocabulary, unknown-aux; AlignmentError
    tokenizer-mismatch, store-misaligned; NotFoundError not-cached; what opening a store raises.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        tail: Tail = "keep",
        epoch: int = 0,
        columns: Collection[str] | None = None,
        k: int | None = None,
        tokenizer: Any = None,
        filter: Iterable[Sequence[Any]] | None = None,
        holdout: float = 0.0,
        split: Split = "train",
        max_samples: int | None = None,
        cache_bytes: int = 256 << 20,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit_bytes: int | None = None,
        offline: bool = False,
    ) -> None:
        self.rank, self.world_size = _this_rank(rank, world_size)
        _check(
            ("seed", seed, 0 <= seed < 1 << 63, "0 to 2**63 - 1"),
            ("epoch", epoch, epoch >= 0, "0 or more"),
            ("tail", tail, tail in ("keep", "drop"), "'keep' or 'drop'"),
            ("split", split, split in ("train", "validation"), "'train' or 'validation'"),
            ("holdout", holdout, 0 <= holdout < 1, "at least 0 and below 1"),
            (
                "split",
                split,
                holdout > 0 or split == "train",
                "a holdout above 0 with 'validation'",
            ),
            ("max_samples", max_samples, max_samples is None or max_samples > 0, "1 or more"),
            ("cache_bytes", cache_bytes, cache_bytes >= 0, "0 or more"),
        )
        self._owns_store = not isinstance(store, Store)
        if isinstance(store, Store):
            caches = cache_dir is not None or cache_limit_bytes is not None or offline
            _check(("cache_dir", cache_dir, not caches, "a location, or ls.open(..., cache_dir=)"))
            self.store = store
        else:
            self.store = open_store(
                store, cache_dir=cache_dir, cache_limit_bytes=cache_limit_bytes, offline=offline
            )
        if max_samples is None:
            self.store.require_cached()
        self.header = self.store.header
        self.shuffle, self.seed, self.tail = shuffle, seed, tail
        self.max_samples = max_samples
        self.k = _check_k(k, self.header.signal)
        self.selection = Selection(holdout, split, parse_conditions(filter, self.header))
        self._columns = self._wanted(columns)
        # Shared memory, so that persistent workers see `set_epoch` of the parent.
        self._epoch = torch.tensor(epoch).share_memory_()
        if tokenizer is not None:
            check_tokenizer(self.store, tokenizer)
        check_alignment(self.store)
        check_stored_views(self.store)
        self._first_sample = _starts([s.samples for s in self.store.shards])
        # Arrow chunks of a disk are views of the mapped file.
        mapped = self.header.container == "arrow" and self.store.location.kind == "local"
        self._chunks = ChunkCache(cache_bytes, mapped=mapped)
        self._chunk_starts: dict[int, list[int]] = {}
        self._prefetcher: Prefetcher | None = None
        self._keep = self._scan()
        self._order: tuple[int, RankOrder] | None = None
        self.epoch_samples = len(self.epoch_order(epoch))
        if self.epoch_samples < self.world_size:
            raise UsageError(
                "bad-argument",
                "fewer samples than ranks",
                where=self.store.location,
                got=f"{self.epoch_samples} samples after filter, hold-out and max_samples",
                expected=f"at least {self.world_size}",
            )

    # torch.utils.data

    def __len__(self) -> int:
        return len(self._rank_order())

    def __getitem__(self, index: int) -> Item:
        """The sample at a place of this rank's order; negative places count from the end.

        Raises: NotFoundError sample-out-of-range (also an IndexError's place in iteration).
        """
        size = len(self)
        if not -size <= index < size:
            raise SampleIndexError(
                "sample-out-of-range",
                "no such sample",
                where=self.store.location,
                got=index,
                expected=f"-{size} to {size - 1}",
            )
        place = index % size
        return self._item(int(self._rank_order().numbers(place, place + 1)[0]))

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The samples at several places; a DataLoader asks for batches so."""
        return [self[index] for index in indices]

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Samples by their number in the store, whatever the epoch's order."""
        return [self._item(number) for number in numbers]

    # fetching ahead, for remote stores

    @property
    def fetches_ahead(self) -> bool:
        """Whether it helps to announce chunks: a local store is read in place."""
        return self.store.location.kind != "local"

    def chunks_of(self, numbers: Sequence[int]) -> list[ChunkKey]:
        """The chunks that hold these samples, each once, in their order."""
        return list(dict.fromkeys(self._chunk_of(number)[:2] for number in numbers))

    def announce(self, keys: Iterable[ChunkKey]) -> None:
        """Begin to fetch chunks that are needed soon, unless they are here already."""
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.store)
        self._prefetcher.announce(key for key in keys if key not in self._chunks)

    # epochs and order

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order; also in workers that run already."""
        self._epoch.fill_(epoch)

    def epoch_order(self, epoch: int, snapshot: Snapshot | None = None) -> EpochOrder:
        """All ranks' order of an epoch, over this dataset's snapshot or over an earlier one.

        Raises: StateError state-mismatch when the earlier snapshot is not part of this one.
        """
        if snapshot is None:
            shards = list(range(len(self.store.shards)))
        else:
            shards = self._shards_of(snapshot)
        table = ShardTable(
            first_sample=np.array([self._first_sample[i] for i in shards], np.int64),
            samples=np.array([self.store.shards[i].samples for i in shards], np.int64),
            chunk_samples=lambda i: np.diff(self._starts_of_chunks(shards[i])),
        )
        return EpochOrder(
            table,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            keep=self._keep,
            max_samples=self.max_samples,
        )

    def order_parameters(self) -> dict[str, Any]:
        """What decides the order beside snapshot and epoch; JSON-able, kept in loader states."""
        return {
            "shuffle": self.shuffle,
            "seed": self.seed,
            "tail": self.tail,
            "holdout": self.selection.holdout,
            "split": self.selection.split,
            "filter": [c.as_json() for c in self.selection.conditions],
            "max_samples": self.max_samples,
        }

    # closing and sending to workers

    def close(self) -> None:
        """Release files and connections; a store that was passed in stays open."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Decoded chunks and orders are cheap to make again, and expensive to send.
        empty = ChunkCache(self._chunks.limit_bytes, mapped=self._chunks.mapped)
        fresh = {"_chunks": empty, "_chunk_starts": {}, "_order": None, "_prefetcher": None}
        return {**self.__dict__, **fresh}

    # inside

    def _rank_order(self) -> RankOrder:
        epoch = self.epoch
        if self._order is None or self._order[0] != epoch:
            order = self.epoch_order(epoch)
            part = rank_part([(0, len(order))], self.world_size, self.rank, self.tail)
            self._order = (epoch, RankOrder(order, part))
        return self._order[1]

    def _item(self, number: int) -> Item:
        shard, chunk, inside = self._chunk_of(number)
        decoded = self._chunks.get((shard, chunk), lambda: self._read(shard, chunk, self._columns))
        sample_id = SampleId(self.store.shards[shard].shard, inside)
        row = inside - self._starts_of_chunks(shard)[chunk]
        return Item(Row(decoded, row), self.header, sample_id, self.k)

    def _chunk_of(self, number: int) -> tuple[int, int, int]:
        """(shard, chunk, row inside the shard) of a sample."""
        # Plain lists and bisect: numpy takes several times as long for a single number.
        shard = bisect_right(self._first_sample, number) - 1
        inside = number - self._first_sample[shard]
        return shard, bisect_right(self._starts_of_chunks(shard), inside) - 1, inside

    def _read(self, shard: int, chunk: int, columns: Collection[str] | None) -> Record:
        data = None if self._prefetcher is None else self._prefetcher.take((shard, chunk))
        if data is None:
            return self.store.read_chunk(shard, chunk, columns)
        return self.store.decode_chunk(shard, chunk, data, columns)

    def _starts_of_chunks(self, shard: int) -> list[int]:
        """Row of the shard at which each chunk begins, and the number of its rows."""
        starts = self._chunk_starts.get(shard)
        if starts is None:
            starts = _starts([c.samples for c in self.store.commit(shard).chunks])
            self._chunk_starts[shard] = starts
        return starts

    def _scan(self) -> NDArray[np.bool_] | None:
        """bool [samples of the store]: hold-out and filter, or None when all are used.

        Reads the columns they need of every chunk once; for a remote store that is every byte.
        """
        columns = self.selection.columns
        if columns is None:
            return None
        names = {c.name for c in self.header.schema_.columns}
        columns |= names & {"segment_ids", "label", "loss_mask"}
        parts = [np.zeros(0, bool)]
        for shard in range(len(self.store.shards)):
            keys = [(shard, chunk) for chunk in range(len(self._starts_of_chunks(shard)) - 1)]
            for number, key in enumerate(keys):
                if self.fetches_ahead and number % AHEAD_CHUNKS == 0:
                    self.announce(keys[number : number + 2 * AHEAD_CHUNKS])
                parts.append(self.selection.keeps(self._read(*key, columns)))
        return np.concatenate(parts)

    def _shards_of(self, snapshot: Snapshot) -> list[int]:
        here = {(s.shard, s.generation): i for i, s in enumerate(self.store.shards)}
        missing = [pair for pair in snapshot.commits if pair not in here]
        if missing:
            shard, generation = missing[0]
            raise StateError(
                "state-mismatch",
                "the state's snapshot holds commits that this dataset's does not",
                where=self.store.location,
                got=f"{len(missing)} commits, first shard {shard} generation {generation}",
                expected="a state of this snapshot, or of an earlier one that grew into it",
                hint="a shard was repaired or the store was opened at an older snapshot; "
                "start a new epoch, or pass ls.open(location, snapshot=...)",
            )
        return [here[pair] for pair in snapshot.commits]

    def _wanted(self, columns: Collection[str] | None) -> set[str] | None:
        names = {c.name for c in self.header.schema_.columns}
        # Pictures are for people.
        pictures = names & {"thumbnail", "num_thumbnail"}
        names -= pictures
        if columns is None:
            return columns_needed(self.header.schema_, names) if pictures else None
        # Signals are decoded with the help of these two.
        optional = names & set(AUX_FIELDS) - {"label_logprob", "top1_logprob"}
        optional |= {n for n in names if n.startswith("lse_at_")}
        unknown = set(columns) - names
        if unknown:
            raise UsageError(
                "unknown-aux",
                "the store holds no such column",
                where=self.store.location,
                got=", ".join(sorted(unknown)),
                expected=", ".join(sorted(optional)),
            )
        return columns_needed(self.header.schema_, (names - optional) | set(columns))


class SampleIndexError(NotFoundError, IndexError):
    """A place beyond the dataset; an IndexError too, so that plain iteration ends."""


def _this_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None and world_size is None and distributed:
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (rank is None) != (world_size is None):
        _check(("rank and world_size", (rank, world_size), False, "both or neither"))
    rank, world_size = rank or 0, 1 if world_size is None else world_size
    _check(("rank", rank, 0 <= rank < world_size, f"0 to world_size - 1 = {world_size - 1}"))
    return rank, world_size


def _check_k(k: int | None, signal: Any) -> int | None:
    if k is None:
        return None
    _check(("k", k, signal.kind == "topk", f"no k: the store holds {signal}"))
    _check(("k", k, 1 <= k <= signal.k, f"1 to {signal.k}, what the store holds"))
    return k


def _check(*rules: tuple[str, Any, bool, str]) -> None:
    for name, value, holds, expected in rules:
        if not holds:
            raise UsageError(
                "bad-argument",
                "has a value that cannot work",
                where=f"LogitDataset {name}",
                got=repr(value),
                expected=expected,
            )


def _starts(counts: Iterable[int]) -> list[int]:
    return [0, *accumulate(counts)]
