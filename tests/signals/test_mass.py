"""The cumulative-mass curve against numpy, on rows of a real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import logitstore
from logitstore import store
from logitstore.record.random import bits, key_of
from logitstore.record.statistics import merge
from logitstore.signals import MassCurve
from logitstore.signals.mass import LEVELS, ranks, taken
from logitstore.spec.statistics import CumulativeMass, Statistics

LENGTHS = (200, 150, 34)


@pytest.fixture
def rows_PV(real_rows_PV: torch.Tensor) -> torch.Tensor:
    return real_rows_PV[: sum(LENGTHS)]


def expected(rows_PV: torch.Tensor, positions: list[int]) -> tuple[list[int], dict, np.ndarray]:
    """Ranks, positions that reach each level first at each, and summed masses; by definition."""
    z = rows_PV[positions].double().numpy()
    p = np.exp(z - z.max(-1, keepdims=True))
    p = -np.sort(-p / p.sum(-1, keepdims=True), axis=-1)
    ks = list(ranks(z.shape[1]))
    mass = p.cumsum(-1)[:, [k - 1 for k in ks]]
    reach = {
        level: tuple(
            int(sum(next(j for j, m in enumerate(row) if m >= float(level)) == i for row in mass))
            for i in range(len(ks))
        )
        for level in LEVELS
    }
    return ks, reach, mass.sum(0)


def test_a_pushed_store_tells_the_curve_of_one_position_in_64(tmp_path, rows_PV):
    vocab_size = rows_PV.shape[1]
    with logitstore.writer(tmp_path, signal="topk:4", vocab_size=vocab_size) as writer:
        start = 0
        for number, length in enumerate(LENGTHS):
            part = rows_PV[start : start + length]
            writer.add(np.arange(length), part, sample_key=f"k{number}")
            writer.flush()
            start += length
    chosen, start = [], 0
    for number, length in enumerate(LENGTHS):
        hashed = bits(0x6D617373, key_of(f"k{number}"), np.arange(length), 0)
        chosen += (start + np.flatnonzero(hashed % np.uint64(64) == 0)).tolist()
        start += length
    assert len(chosen) >= 3
    ks, reach, mass = expected(rows_PV, chosen)
    with store.open(tmp_path) as opened:
        told = opened.statistics().cumulative_mass
        parts = [opened.commit(i).statistics.cumulative_mass for i in range(len(opened.shards))]
    assert told is not None
    assert (told.positions, list(told.ks), told.reach) == (len(chosen), ks, reach)
    assert told.mass == pytest.approx(mass, abs=1e-5)
    assert told.mass[-1] == len(chosen)
    assert sum(part.positions for part in parts if part) == len(chosen)


def test_the_curve_does_not_depend_on_blocks_or_shards(rows_PV):
    """Sums are equal bit by bit, however rows are grouped."""
    few_PV = rows_PV[:48]
    weights_PV = torch.softmax(few_PV, -1)
    every = np.ones(len(few_PV), np.bool_)
    whole = MassCurve(weights_PV.shape[1])
    whole.add(weights_PV, every)
    by_blocks = MassCurve(weights_PV.shape[1])
    parts = []
    for block in weights_PV.split(7):
        by_blocks.add(block, every[: len(block)])
        part = MassCurve(weights_PV.shape[1])
        part.add(block, every[: len(block)])
        parts.append(Statistics(cumulative_mass=part.total()))
    assert by_blocks.total() == whole.total() == merge(parts).cumulative_mass
    _, reach, mass = expected(few_PV, list(range(48)))
    assert whole.total().reach == reach
    assert whole.total().mass == pytest.approx(mass, abs=1e-5)


def test_one_position_in_64_is_taken():
    keys = np.array([key_of(f"corpus.txt#{i}@0") for i in range(2000)], np.uint64).view(np.int64)
    share = taken(np.repeat(keys, 64), np.tile(np.arange(64), 2000)).mean()
    assert share == pytest.approx(1 / 64, rel=0.1)


def test_curves_of_other_ranks_add_at_those_that_both_tell():
    one = CumulativeMass(positions=2, ks=(1, 2, 4), mass=(1.0, 1.5, 2.0), reach={"0.90": (0, 1, 1)})
    other = CumulativeMass(positions=1, ks=(1, 4), mass=(0.5, 1.0), reach={"0.90": (0, 1)})
    told = merge([Statistics(cumulative_mass=one), Statistics(cumulative_mass=other)])
    assert told.cumulative_mass == CumulativeMass(
        positions=3, ks=(1, 4), mass=(1.5, 3.0), reach={"0.90": (0, 3)}
    )
    with pytest.raises(ValueError, match="ks must ascend"):
        CumulativeMass(positions=1, ks=(2, 1), mass=(0.5, 1.0))
