"""Top-K and nucleus: the most probable ids with exact log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.signals.encoder import Rows, register
from logitstore.signals.selection import exact_topk
from logitstore.spec.header import Header
from logitstore.spec.signals import Q8_MOST_STEPS, TopKSpec

__all__ = ["TopKEncoder", "log_mass_outside"]


@register("topk")
class TopKEncoder:
    """ids in descending teacher order (ties: lowest id first), log-probs, log_tail."""

    def __init__(self, spec: TopKSpec, header: Header) -> None:
        self._spec = spec
        step = next(c.step for c in header.schema_.columns if c.name == "logprobs")
        self._step = step
        self._log_tail = header.schema_.column("log_tail") is not None

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        values, ids = exact_topk(rows.z, self._spec.k)
        logprobs = values - rows.lse[:, None]
        stored = logprobs if self._step is None else _rounded(logprobs, self._step)
        out = {"ids": ids, "logprobs": stored}
        log_tail = log_mass_outside(rows, ids) if self._log_tail else None
        if self._spec.p is not None:
            probs = logprobs.exp()
            # Keep an id while the mass before it is below p: the smallest prefix that reaches p.
            keep = (probs.cumsum(-1) - probs) < self._spec.p
            if log_tail is not None:
                dropped = logprobs.masked_fill(keep, -torch.inf)
                log_tail = torch.logaddexp(log_tail, torch.logsumexp(dropped, -1))
            out = {"ids": ids[keep], "logprobs": stored[keep], "num_ids": keep.sum(-1)}
        if log_tail is not None:
            out["log_tail"] = log_tail
        return out


def _rounded(logprobs: Tensor, step: float) -> Tensor:
    """Nearest multiple of -step."""
    return torch.round(logprobs / -step).clamp_(0, Q8_MOST_STEPS) * -step


def log_mass_outside(rows: Rows, ids_RK: Tensor) -> Tensor:
    """float32 [R]: log of the probability outside the given distinct ids, by a masked sum; -inf for
    none.

    Never 1 - sum: once the kept mass exceeds about 0.9999 that difference is rounding noise.
    """
    outside = rows.exp_z.scatter(-1, ids_RK, 0.0)
    log_sum = outside.sum(-1).log() + rows.top
    # exp(z - top) underflows where the tail lies 60 nats and more below the top: redo those few
    # rows.
    low = (log_sum - rows.top < -60).nonzero()[:, 0]
    if low.numel():
        log_sum[low] = torch.logsumexp(rows.z[low].scatter(-1, ids_RK[low], -torch.inf), -1)
    return log_sum - rows.lse
