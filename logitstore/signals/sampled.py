"""RS-KD: unique ids of N draws with replacement, and how often each was drawn.

Draw j of a position uses the uniform number (seed, sample key, position, j); the inverse CDF runs
over ascending ids. Source: arXiv:2503.16870.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.signals import random
from logitstore.signals.draws import InverseCdf
from logitstore.signals.encoder import Rows, register
from logitstore.spec.header import Header
from logitstore.spec.signals import SampledSpec

__all__ = ["SampledEncoder", "without"]


@register("sampled")
class SampledEncoder:
    """ids ascending inside a position, counts that add up to `rounds`, importance weights for power
    != 1.

    Always-ids are not drawn: their probability is stored beside, and the draws come from the rest.
    """

    def __init__(self, spec: SampledSpec, header: Header) -> None:
        self._spec = spec
        self._always = header.always_ids

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        power, rounds = self._spec.power, self._spec.rounds
        target = without(rows.exp_z, self._always)
        # exp(power * (z - top)) from exp(z - top): ids whose exp underflowed stay impossible.
        proposal = target if power == 1.0 else target.pow(power)
        cdf = InverseCdf(proposal)
        draw = torch.arange(rounds, device=rows.z.device)
        uniform = random.uniform(
            rows.seed, rows.keys[:, None], rows.positions[:, None], draw[None, :]
        )
        drawn, _ = cdf.pick(uniform * cdf.total[:, None]).sort(-1)
        # A row whose mass lies wholly on always-ids has nothing to draw from.
        alive = cdf.total > 0
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        first &= alive[:, None]
        row, column = first.nonzero(as_tuple=True)
        ids = drawn[row, column]
        start = row * rounds + column
        end = torch.cat([start[1:], start.new_full((1,), drawn.numel())])
        counts = torch.minimum(end, (row + 1) * rounds) - start
        out = {"ids": ids, "counts": counts, "num_ids": first.sum(-1)}
        if power != 1.0:
            probability = target[row, ids].double() * (rows.top[row] - rows.lse[row]).double().exp()
            drawn_probability = proposal[row, ids].double() / cdf.total[row]
            out["weights"] = counts / rounds * probability / drawn_probability
        return out


def without(exp_RV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """The weights with those of `ids` set to 0; the same tensor when there are none."""
    if not ids:
        return exp_RV
    return exp_RV.index_fill(-1, torch.tensor(ids, device=exp_RV.device), 0.0)
