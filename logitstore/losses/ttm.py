"""Transformed teacher matching: temper the teacher only. WTTM also weights rows by how flat the
teacher is.

Letters: N rows that count, V vocabulary, K stored ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss, require
from logitstore.losses.dense_divergence import dense_divergence, forward_kl_terms
from logitstore.losses.positions import (
    Positions,
    counted_positions,
    tempered_logprobs,
)
from logitstore.losses.rows import tempered_tail
from logitstore.losses.sequences import rows_per_chunk
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.spec.errors import UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets

__all__ = ["ttm", "wttm"]

_MISSING = {"topk": ("uniform", "ghost", "uniform_estimate", "renormalize")}
_SOURCE = "arXiv:2402.11148 (ICLR 2024); tail treatments derived for this project"
# Below this exponent a uniform tail is nearer to the tempered teacher than one bucket, above it
# farther (gradient error 0.14 against 0.85 at gamma 0.1, V = 100, K = 10; 0.26 against 0.18 at 0.8,
# 1024, 32).
_GHOST_FROM_GAMMA = 0.7


@loss(
    signals={"dense": "exact", "topk": "bounded"},
    missing=_MISSING,
    source=_SOURCE,
    aliases=("transformed_teacher_matching",),
)
def ttm(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    gamma: float | None = None,
    temperature: float | None = None,
    missing: str | None = None,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean KL(p^gamma / U || q) over counted rows, nats, with U = sum p^gamma.

    The student is not tempered. This is the distillation term alone: the paper trains CE + beta *
    ttm with no T^2 factor and CE weight 1.

    From `topk` targets `missing` says what stands for the tempered mass mt outside the stored ids:

    - "uniform": exact U (needs `lse` and `lse_at[T]`), mt spread evenly over the other ids. Best
      for small gamma.
    - "ghost": exact U, the tail is one bucket, mt log(mt / s). Never above the full loss.
    - "uniform_estimate": U estimated from a flat tail, U' = sum_S p^gamma + (V-K)^(1-gamma) r^gamma
      >= U (for gamma <= 1); needs `log_tail` only.
    - "renormalize": p^gamma renormalised over S. Tempering lifts the tail (at gamma 0.1 the 10
      first of 100 classes hold about 15 % of U), so this is a comparison, not a method.

    L1 error of the logit gradient against the full loss, per row: at most 2 mt, and 0 on stored
        ids,
    for "uniform" and "ghost"; at most 2 mt', mt' = 1 - sum_S p^gamma / U', for "uniform_estimate";
    exactly 2 mt for "renormalize".

    Always-ids count as stored ids.

    Args:
        student_logits: float [..., V].
        targets: dense or topk.
        labels: only used to ignore positions (label -100) when there is no mask.
        mask: bool [...], True counts.
        gamma: exponent, usually 0 < gamma < 1; the paper uses 0.1-0.4 on CIFAR-100, 0.7-0.8 on
            ImageNet.
        temperature: T = 1 / gamma; give one of the two.
        missing: see above; None means "uniform" below gamma 0.7 and "ghost" from there on.

    Raises: UsageError bad-argument unless exactly one of gamma and temperature is given and
        positive; TargetsError aux-missing, shape-mismatch, empty-mask.

    Published code and our choice: it computes pow(softmax(z), gamma), which loses classes whose
    probability underflows (a gap above 103 in float32) although p^gamma may be large; here
    softmax(gamma z).

    Source: arXiv:2402.11148; code zkxufo/TTM.
    """
    at, kl_N, _ = _tempered_kl(
        student_logits, targets, labels, mask, gamma, temperature, missing, "ttm"
    )
    return at.reduce(kl_N, reduction, with_count)


@loss(
    signals={"dense": "exact", "topk": "bounded"},
    missing=_MISSING,
    source=_SOURCE,
    aliases=("weighted_transformed_teacher_matching",),
)
def wttm(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    gamma: float | None = None,
    temperature: float | None = None,
    missing: str | None = None,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean U KL(p^gamma / U || q) over counted rows, nats: `ttm` with rows weighted by U.

    U runs from 1 (one-hot teacher) to V^(1-gamma) (flat teacher), so beta does not transfer between
    label sets. Arguments, treatments, errors and sources are those of `ttm`; gradient errors are
    multiplied by U (exact with "uniform" and "ghost"; from above with "uniform_estimate"; sum_S
    p^gamma with "renormalize").
    """
    at, kl_N, log_u_N = _tempered_kl(
        student_logits, targets, labels, mask, gamma, temperature, missing, "wttm"
    )
    return at.reduce(log_u_N.exp() * kl_N, reduction, with_count)


def _tempered_kl(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    gamma: float | None,
    temperature: float | None,
    missing: str | None,
    name: str,
) -> tuple[Positions, Tensor, Tensor]:
    """Counted positions, KL [N] and log U [N]."""
    given = temperature if gamma is None else gamma
    if (gamma is None) == (temperature is None) or given is None or not 0 < given < math.inf:
        raise UsageError(
            "bad-argument",
            f"{name} needs one positive exponent",
            got=f"gamma={gamma}, temperature={temperature}",
            expected="gamma, or temperature = 1 / gamma, and not both",
        )
    gamma = 1 / given if gamma is None else gamma
    temperature = 1 / gamma if temperature is None else temperature
    at = counted_positions(align(student_logits, targets, labels, mask, upcast=False))
    if isinstance(targets, DenseTargets):
        kl_N, log_u_N = _dense(at, gamma)
    else:
        if missing is None:
            missing = "uniform" if gamma < _GHOST_FROM_GAMMA else "ghost"
        kl_N, log_u_N = _stored(at, gamma, temperature, missing, name)
    return at, kl_N, log_u_N


def _dense(at: Positions, gamma: float) -> tuple[Tensor, Tensor]:
    assert isinstance(at.targets, DenseTargets)
    everywhere_N = torch.ones_like(at.student_NV[:, 0], dtype=torch.bool)
    kl_N = dense_divergence(
        at.student_NV,
        at.targets.logits,
        everywhere_N,
        forward_kl_terms,
        teacher_temperature=1 / gamma,
    )
    rows = rows_per_chunk(*at.targets.logits.shape)
    parts = [x.to(at.dtype) for x in at.targets.logits.split(rows)]
    log_u_N = torch.cat([(gamma * z).logsumexp(-1) - gamma * z.logsumexp(-1) for z in parts])
    return kl_N, log_u_N


def _stored(
    at: Positions, gamma: float, temperature: float, missing: str, name: str
) -> tuple[Tensor, Tensor]:
    assert isinstance(at.targets, TopKTargets)
    dtype = at.dtype
    vocab_size = at.targets.vocab_size
    ids_NK = at.targets.ids
    logprobs_NK = at.targets.logprobs.to(dtype)
    num_outside_N = (vocab_size - (ids_NK != PAD_ID).sum(-1)).to(dtype)
    log_q_NK, log_tail_q_N, sum_log_q_N = sparse_logprobs(
        at.student_NV,
        ids_NK,
        torch.ones_like(num_outside_N, dtype=torch.bool),
        num_excluded=ids_NK.shape[-1] if missing == "ghost" else 0,
        sum_vocab=vocab_size if missing.startswith("uniform") else 0,
    )

    if missing == "renormalize":
        log_target_NK = torch.log_softmax(gamma * logprobs_NK, -1)
        return _kl_sum(log_target_NK, log_q_NK), (gamma * logprobs_NK).logsumexp(-1)

    log_tail_N = at.targets.log_tail
    if log_tail_N is not None:
        log_tail_N = log_tail_N.to(dtype)
    if missing == "uniform_estimate":
        log_tail_N = require(at.targets, "log_tail", f"{name} with missing='uniform_estimate'")
        log_mass_N = gamma * log_tail_N.to(dtype) + (1 - gamma) * num_outside_N.log()
        log_mass_N = torch.where(num_outside_N > 0, log_mass_N, -math.inf)
        log_u_N = torch.logaddexp((gamma * logprobs_NK).logsumexp(-1), log_mass_N)
        log_target_NK = gamma * logprobs_NK - log_u_N[:, None]
        log_mt_N = log_mass_N - log_u_N
    else:
        log_target_NK = tempered_logprobs(logprobs_NK, at.targets, temperature, name)
        # log U = gamma log p - log p^gamma / U, the same for every id; the first id is always
        # stored.
        log_u_N = gamma * logprobs_NK[:, 0] - log_target_NK[:, 0]
        log_mt_N = tempered_tail(
            log_target_NK,
            None if log_tail_N is None else gamma * log_tail_N - log_u_N,
            num_outside_N,
            gamma,
        )

    if missing == "ghost":
        log_target_tail_N = log_mt_N
    else:
        # What counts is the mean of log q over the teacher's ids that are not stored.
        log_tail_q_N = (sum_log_q_N - log_q_NK.sum(-1)) / num_outside_N.clamp_min(1)
        log_target_tail_N = log_mt_N - num_outside_N.log()
    # Nothing outside (K = V, or a tail that underflows) has nothing to match: 0 log 0 = 0.
    tail_N = torch.where(
        (num_outside_N > 0) & (log_mt_N > -math.inf),
        log_mt_N.exp() * (log_target_tail_N - log_tail_q_N),
        0.0,
    )
    return _kl_sum(log_target_NK, log_q_NK) + tail_N, log_u_N


def _kl_sum(log_target: Tensor, log_q: Tensor) -> Tensor:
    """sum target (log target - log q) over the last axis; ids of target 0 contribute 0."""
    target = log_target.exp()
    return torch.where(target > 0, target * (log_target - log_q), 0.0).sum(-1)
