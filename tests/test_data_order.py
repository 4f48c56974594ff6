"""The epoch's order: complete, disjoint over ranks, local, mixed, a pure function of its inputs."""

from __future__ import annotations

from itertools import chain

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from logitstore.data.order import (
    CHUNKS_PER_WINDOW,
    SHARDS_PER_GROUP,
    EpochOrder,
    RankOrder,
    ShardTable,
    count,
    rank_part,
    remaining,
)


def table(samples_of_chunks: list[list[int]]) -> ShardTable:
    samples = np.array([sum(c) for c in samples_of_chunks], np.int64)
    return ShardTable(
        first_sample=np.cumsum(samples) - samples,
        samples=samples,
        chunk_samples=lambda shard: np.array(samples_of_chunks[shard], np.int64),
    )


def regular(shards: int, chunks: int, samples: int) -> ShardTable:
    return table([[samples] * chunks] * shards)


def whole(order: EpochOrder) -> list[int]:
    return order.numbers(0, len(order)).tolist()


shard_lists = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=80)


@given(shard_lists, st.booleans(), st.integers(0, 3), st.data())
@settings(max_examples=60)
def test_an_epoch_holds_every_selected_sample_once(shards, shuffle, epoch, data):
    total = sum(sum(c) for c in shards)
    keep = None
    if data.draw(st.booleans()):
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    maximum = data.draw(st.none() | st.integers(1, total + 2))
    order = EpochOrder(
        table(shards), seed=7, epoch=epoch, shuffle=shuffle, keep=keep, max_samples=maximum
    )
    selected = np.arange(total) if keep is None else np.flatnonzero(keep)
    selected = selected[:maximum].tolist()
    got = whole(order)
    assert sorted(got) == selected
    if not shuffle:
        assert got == selected
    pieces = [order.numbers(i, min(i + 3, len(order))).tolist() for i in range(0, len(order), 3)]
    assert list(chain.from_iterable(pieces)) == got


def test_order_is_a_function_of_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        return whole(EpochOrder(regular(40, 5, 3), seed=seed, epoch=epoch, shuffle=True))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    # Fixed for ever: a saved state continues under a later release.
    assert order(1, 0)[:6] == [30, 136, 154, 386, 128, 500]


def test_each_chunk_is_decoded_once_by_a_reader_that_keeps_one_window():
    shards, chunks, samples = 2 * SHARDS_PER_GROUP, 20, 4
    order = EpochOrder(regular(shards, chunks, samples), seed=0, epoch=0, shuffle=True)
    cached: dict[int, None] = {}
    decodes = 0
    for number in whole(order):
        chunk = number // samples
        if chunk not in cached:
            decodes += 1
        cached.pop(chunk, None)
        cached[chunk] = None
        if len(cached) > 2 * CHUNKS_PER_WINDOW:
            del cached[next(iter(cached))]
    assert decodes == shards * chunks


def test_neighbours_come_from_all_over_a_group():
    order = EpochOrder(regular(SHARDS_PER_GROUP, 64, 4), seed=0, epoch=0, shuffle=True)
    batches = np.array(whole(order)).reshape(-1, 32)
    shards = batches // (64 * 4)
    distinct = [len(set(row)) for row in shards.tolist()]
    # 32 independent draws out of 32 shards meet 20.4 different ones on average.
    assert 18 < np.mean(distinct) < 22
    # In storage order a place is worth its number; here the correlation is gone.
    places = np.arange(batches.size)
    assert abs(np.corrcoef(places, batches.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_are_disjoint_and_complete(world_size, shuffle):
    order = EpochOrder(regular(5, 3, 3), seed=3, epoch=2, shuffle=shuffle, max_samples=43)
    parts = []
    for rank in range(world_size):
        part = RankOrder(order, rank_part([(0, len(order))], world_size, rank))
        parts.append(part.numbers(0, len(part)).tolist())
    assert sorted(chain.from_iterable(parts)) == list(range(43))
    assert {len(p) for p in parts} <= {43 // world_size, 43 // world_size + 1}
    assert list(chain.from_iterable(parts)) == whole(order)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_tail_drop_gives_equal_parts_and_leaves_out_less_than_one_per_rank(world_size):
    parts = [rank_part([(0, 43)], world_size, rank, "drop") for rank in range(world_size)]
    assert {count(p) for p in parts} == {43 // world_size}
    places = [i for p in parts for a, b in p for i in range(a, b)]
    assert len(set(places)) == len(places) > 43 - world_size


worlds = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 30)), min_size=1, max_size=5)


@given(st.integers(1, 200), worlds, st.sampled_from(["keep", "drop"]))
def test_changing_the_number_of_ranks_continues_with_exactly_the_unseen(total, stretches, tail):
    intervals = ((0, total),)
    seen: list[int] = []
    for world_size, consumed in stretches:
        for rank in range(world_size):
            places = [
                i for a, b in rank_part(intervals, world_size, rank, tail) for i in range(a, b)
            ]
            seen.extend(places[:consumed])
        intervals = remaining(intervals, world_size, consumed, tail)
    left = [i for a, b in intervals for i in range(a, b)]
    assert sorted(seen + left) == list(range(total))


def test_ten_million_samples_need_no_list_of_them():
    calls = []

    def chunk_samples(shard: int) -> np.ndarray:
        calls.append(shard)
        return np.full(250, 4, np.int64)

    samples = np.full(20_000, 1_000, np.int64)
    shards = ShardTable(np.cumsum(samples) - samples, samples, chunk_samples)
    order = EpochOrder(shards, seed=0, epoch=0, shuffle=True)
    assert len(order) == 20_000_000
    middle = RankOrder(order, rank_part([(0, len(order))], 8, 5))
    first = middle.numbers(0, 1000)
    assert len(set(first.tolist())) == 1000
    # Only the one group that holds these places was looked at.
    assert len(calls) <= 2 * SHARDS_PER_GROUP


def test_a_store_that_grew_keeps_the_order_of_the_old_snapshot():
    """Sample numbers shift when shards appear in between; the order of (shard, row) must not."""
    old = regular(3, 4, 2)
    # Shards 0, 2 and 3 of the grown store are the old ones; shard 1 is new and holds 5 samples.
    grown = ShardTable(np.array([0, 13, 21]), old.samples, old.chunk_samples)
    a = whole(EpochOrder(old, seed=1, epoch=1, shuffle=True))
    b = whole(EpochOrder(grown, seed=1, epoch=1, shuffle=True))
    assert [n if n < 8 else n + 5 for n in a] == b
