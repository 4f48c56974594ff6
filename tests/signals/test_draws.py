"""Inverse CDF: the middle of every id's interval leads to that id, however small it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstore.signals import draws
from logitstore.signals.draws import InverseCdf


def middles(weights_V: torch.Tensor) -> torch.Tensor:
    wide_V = weights_V.double()
    return wide_V.cumsum(0) - wide_V / 2


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 5000])
def test_weights_of_ten_decades(vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights_RV = torch.exp(torch.rand(3, vocab, generator=generator) * -23)
    weights_RV[1, vocab // 2] = 0
    weights_RV[2] = weights_RV[2].flip(0)
    points_RN = torch.stack([middles(row) for row in weights_RV])
    found = InverseCdf(weights_RV).pick(points_RN)
    possible = weights_RV > 0
    ids = torch.arange(vocab).expand(3, -1)
    assert torch.equal(found[possible], ids[possible])


@pytest.mark.parametrize("place", [0, 262_143])
def test_a_tail_far_below_the_head_is_reached_id_by_id(place: int) -> None:
    """In float32 a running sum past 1 takes none of these."""
    weights_V = torch.full((262_144,), 1e-9)
    weights_V[place] = 1.0
    found = InverseCdf(weights_V[None]).pick(middles(weights_V)[None])
    assert torch.equal(found[0], torch.arange(262_144))


def test_ends_rows_without_mass_and_no_rows() -> None:
    weights_RV = torch.zeros(3, 300)
    weights_RV[0, 7], weights_RV[0, 200] = 0.1, 0.7
    weights_RV[2, 299] = 3.0
    cdf = InverseCdf(weights_RV)
    beyond = cdf.total[:, None] * torch.tensor([0.0, 1.0, 2.0])
    assert cdf.pick(beyond).tolist() == [[7, 200, 200], [0, 0, 0], [299, 299, 299]]
    assert InverseCdf(torch.ones(0, 300)).pick(torch.ones(0, 4)).shape == (0, 4)


def test_points_are_looked_up_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    cdf = InverseCdf(torch.rand(5, 400, generator=generator))
    points_RN = torch.rand(5, 33, generator=generator).double() * cdf.total[:, None]
    whole = cdf.pick(points_RN)
    seen = []
    inside = InverseCdf._inside
    monkeypatch.setattr(draws, "_POINTS", 16)
    monkeypatch.setattr(
        InverseCdf, "_inside", lambda self, *part: seen.append(len(part[0])) or inside(self, *part)
    )
    assert torch.equal(cdf.pick(points_RN), whole)
    assert (max(seen), sum(seen)) == (16, 5 * 33)
    order = np.sort(whole.numpy(), axis=-1)
    assert np.array_equal(order, cdf.pick(points_RN.sort(-1).values).numpy())
