"""The order of an epoch: a pure function of (snapshot, seed, epoch), split over ranks.

Two levels keep reads local and batches mixed. The shards of the snapshot are permuted; the chunks
of each group of `SHARDS_PER_GROUP` consecutive shards in that order are permuted together; the
samples of each window of `CHUNKS_PER_WINDOW` consecutive chunks are permuted together. So a reader
that keeps one window of decoded chunks decodes every chunk once, and only sample counts per shard
must be known to start: chunk tables are asked for one group at a time.

Ranks take contiguous stretches of that order. What an interrupted epoch has not seen is then at
most a few intervals, whatever the number of ranks, and any other number can split exactly those.

Everything is numpy; memory is a few bytes per shard plus two or three groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.record.random import bits, key_of

__all__ = [
    "CHUNKS_PER_WINDOW",
    "SHARDS_PER_GROUP",
    "EpochOrder",
    "Interval",
    "RankOrder",
    "ShardTable",
    "Tail",
    "count",
    "rank_part",
    "remaining",
]

SHARDS_PER_GROUP = 32
# 64 chunks of 2,048 positions with 64 ids each are 50 MB decoded: small beside a training process.
CHUNKS_PER_WINDOW = 64

# Domains of the random function, so that the three permutations are independent.
_SHARD_KEY = key_of("logitstore shard order")
_CHUNK_KEY = key_of("logitstore chunk order")
_SAMPLE_KEY = key_of("logitstore sample order")

Interval = tuple[int, int]
Tail = Literal["keep", "drop"]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ShardTable:
    """The shards of a snapshot in reading order.

    Attributes:
        first_sample: int64 [shards], number of the shard's first sample in the store as opened.
        samples: int64 [shards], samples of each shard.
        chunk_samples: index of a shard in this table -> int64 [chunks], samples of each chunk.
    """

    first_sample: Int64
    samples: Int64
    chunk_samples: Callable[[int], Int64]


class EpochOrder:
    """Every selected sample of a snapshot, once, in this epoch's order.

    Args:
        keep: bool by sample number of the store, or None for all.
        max_samples: keep only this many, the first in storage order.
    """

    def __init__(
        self,
        shards: ShardTable,
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        keep: NDArray[np.bool_] | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._shards = shards
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle
        self._keep = keep
        kept = _kept_per_shard(shards, keep)
        if max_samples is not None:
            kept -= np.clip(np.cumsum(kept) - max_samples, 0, kept)
        self._kept = kept
        if shuffle:
            keys = bits(seed, _SHARD_KEY, epoch, np.arange(len(kept)))
            self._permuted = np.argsort(keys, kind="stable")
        else:
            self._permuted = np.arange(len(kept))
        ends = np.cumsum(kept[self._permuted])
        starts = np.concatenate(([0], ends[SHARDS_PER_GROUP - 1 :: SHARDS_PER_GROUP]))
        total = int(ends[-1]) if len(ends) else 0
        self._group_starts = np.append(starts, total) if starts[-1] < total else starts
        self._groups: dict[int, Int64] = {}

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    def numbers(self, start: int, stop: int) -> Int64:
        """int64 [stop - start]: sample numbers of the store at these places of the order."""
        first = int(np.searchsorted(self._group_starts, start, "right")) - 1
        parts = []
        while start < stop:
            low, high = (int(b) for b in self._group_starts[first : first + 2])
            until = min(stop, high)
            parts.append(self._group(first)[start - low : until - low])
            start, first = until, first + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _group(self, group: int) -> Int64:
        numbers = self._groups.get(group)
        if numbers is None:
            numbers = self._build_group(group)
            # Neighbours are all that a sequential reader can need again.
            self._groups = {g: n for g, n in self._groups.items() if abs(g - group) <= 1}
            self._groups[group] = numbers
        return numbers

    def _build_group(self, group: int) -> Int64:
        shards = self._permuted[group * SHARDS_PER_GROUP : (group + 1) * SHARDS_PER_GROUP]
        shards = shards[self._kept[shards] > 0]
        rows = [self._rows(int(s)) for s in shards]
        numbers = np.concatenate(
            [self._shards.first_sample[s] + r for s, r in zip(shards, rows, strict=True)]
        )
        if not self._shuffle:
            return numbers
        # (shard << 32 | n) names a chunk or a sample the same way however much the store grows.
        base = shards.astype(np.uint64) << np.uint64(32)
        chunks = np.concatenate(
            [b | self._chunks(int(s), r) for b, s, r in zip(base, shards, rows, strict=True)]
        )
        samples = np.concatenate([b | r.astype(np.uint64) for b, r in zip(base, rows, strict=True)])
        names, chunk_of_row = np.unique(chunks, return_inverse=True)
        chunk_keys = bits(self._seed, _CHUNK_KEY, self._epoch, names)
        rank_of_chunk = np.empty(len(names), np.int64)
        rank_of_chunk[np.argsort(chunk_keys, kind="stable")] = np.arange(len(names))
        window = rank_of_chunk[chunk_of_row] // CHUNKS_PER_WINDOW
        return numbers[np.lexsort((bits(self._seed, _SAMPLE_KEY, self._epoch, samples), window))]

    def _rows(self, shard: int) -> Int64:
        """Selected rows of a shard, ascending."""
        samples, kept = int(self._shards.samples[shard]), int(self._kept[shard])
        if self._keep is None:
            return np.arange(kept)
        first = int(self._shards.first_sample[shard])
        return np.flatnonzero(self._keep[first : first + samples])[:kept]

    def _chunks(self, shard: int, rows: Int64) -> NDArray[np.uint64]:
        ends = np.cumsum(self._shards.chunk_samples(shard))
        return np.searchsorted(ends, rows, "right").astype(np.uint64)


class RankOrder:
    """One rank's places of an epoch's order, as if they were numbered from 0."""

    def __init__(self, order: EpochOrder, intervals: Sequence[Interval]) -> None:
        self._order = order
        self._starts = np.array([a for a, _ in intervals], np.int64)
        sizes = np.array([b - a for a, b in intervals], np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(sizes)))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def numbers(self, start: int, stop: int) -> Int64:
        """int64 [stop - start]: sample numbers of the store at this rank's places start to stop."""
        parts = []
        part = int(np.searchsorted(self._offsets, start, "right")) - 1
        while start < stop:
            until = min(stop, int(self._offsets[part + 1]))
            shift = int(self._starts[part] - self._offsets[part])
            parts.append(self._order.numbers(start + shift, until + shift))
            start, part = until, part + 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def count(intervals: Sequence[Interval]) -> int:
    """How many places the intervals hold."""
    return sum(stop - start for start, stop in intervals)


def rank_part(
    intervals: Sequence[Interval], world_size: int, rank: int, tail: Tail = "keep"
) -> tuple[Interval, ...]:
    """The stretch of `intervals` that one rank reads.

    The places are cut into `world_size` contiguous parts. With tail="keep" the first
    `total % world_size` ranks get one place more; with "drop" the last `total % world_size` places
    are left out.
    """
    base, extra = divmod(count(intervals), world_size)
    if tail == "drop":
        return _cut(intervals, rank * base, (rank + 1) * base)
    start = rank * base + min(rank, extra)
    return _cut(intervals, start, start + base + (rank < extra))


def remaining(
    intervals: Sequence[Interval], world_size: int, consumed: int, tail: Tail = "keep"
) -> tuple[Interval, ...]:
    """What nobody has read once every rank has read `consumed` places of its part."""
    total = count(intervals)
    left: list[Interval] = []
    for rank in range(world_size):
        part = rank_part(intervals, world_size, rank, tail)
        left.extend(_cut(part, consumed, count(part)))
    if tail == "drop":
        left.extend(_cut(intervals, total - total % world_size, total))
    return _merged(left)


def _cut(intervals: Sequence[Interval], start: int, stop: int) -> tuple[Interval, ...]:
    """Places start to stop of the intervals laid end to end."""
    out, before = [], 0
    for low, high in intervals:
        a, b = max(start - before, 0), min(stop - before, high - low)
        if a < b:
            out.append((low + a, low + b))
        before += high - low
    return tuple(out)


def _merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Touching neighbours joined, so that states stay small over many changes of world size."""
    out: list[Interval] = []
    for low, high in intervals:
        if out and out[-1][1] == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return tuple(out)


def _kept_per_shard(shards: ShardTable, keep: NDArray[np.bool_] | None) -> Int64:
    if keep is None:
        return shards.samples.copy()
    counts: list[Any] = [
        np.count_nonzero(keep[first : first + samples])
        for first, samples in zip(shards.first_sample, shards.samples, strict=True)
    ]
    return np.array(counts, np.int64)
