"""Bounded divergences: Jensen-Shannon and total variation, with brackets where the record is
partial."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore.losses.completed import completed_logprobs, student_logprobs
from logitstore.losses.contract import (
    LossAndCount,
    Missing,
    Reduction,
    Rows,
    align,
    loss,
    reduce,
)
from logitstore.losses.dense_divergence import LOG_ZERO, Terms, dense_divergence
from logitstore.losses.rows import kept_rows, teacher_logits
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.spec.errors import UsageError
from logitstore.targets import DenseTargets, Targets

__all__ = ["Bracket", "jsd", "jsd_bracket", "tvd", "tvd_bracket"]

_MISSING = ("ghost", "renormalize", "renormalize_both", "uniform", "uniform_all", "label")


class Bracket(NamedTuple):
    """Proven lower and upper values of a divergence from the whole teacher, reduced alike."""

    lower: Tensor
    upper: Tensor


class _Pair(NamedTuple):
    """Teacher and student probabilities side by side, and what both have outside.

    log_p, log_q: float [R, U]; log_r, log_s: float [R], None when nothing is outside.
    """

    log_p: Tensor
    log_q: Tensor
    log_r: Tensor | None = None
    log_s: Tensor | None = None


@loss(
    signals={"dense": "exact", "topk": "bounded", "threshold": "bounded"},
    missing={"topk": _MISSING, "threshold": _MISSING},
    source="GKD, arXiv:2306.13649, section 2",
    aliases=("js_divergence", "generalized_jsd"),
)
def jsd(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    missing: Missing = "ghost",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """beta KL(p || M) + (1 - beta) KL(q || M) with M = beta p + (1 - beta) q, nats.

    `missing=` as in `forward_kl`; "ghost" compares K ids and one tail bucket and is a lower bound
    (log-sum inequality), `jsd_bracket` gives the upper one too. "none" is refused: a list cut at K
    is no
    distribution. Threshold targets use their exact head. Sampled targets are refused: the value is
    biased (Jensen).

    Args:
        student_logits: float [..., V], raw logits, no shift.
        targets: dense, topk or threshold targets of the same positions.
        labels: int64 [...], only for missing="label"; without a mask, -100 masks.
        mask: bool [...], positions that count.
        missing: treatment of the mass outside the known ids.
        beta: weight of the teacher, strictly between 0 and 1. At 0 and 1 the formula gives 0; the
            limits are jsd / beta -> KL(p || q) and jsd / (1 - beta) -> KL(q || p), which published
            trainers
            return in their place. Here they are refused: use forward_kl or reverse_kl.
        temperature: T of both sides; no factor T^2 (multiply yourself if wanted).
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: UsageError bad-argument (beta); TargetsError as forward_kl.
    """
    log_beta, log_rest = _log_weights(beta)
    if isinstance(targets, DenseTargets):
        rows = align(student_logits, targets, labels, mask, upcast=False)
        terms = partial(_dense_jsd, log_beta=log_beta, log_rest=log_rest)
        return reduce(_dense(rows, terms, temperature), rows, reduction, with_count)
    rows, pair = _pair(student_logits, targets, labels, mask, missing, temperature, "jsd")
    loss_R = _jsd_terms(pair.log_p, pair.log_q, log_beta, log_rest).sum(-1)
    if pair.log_r is not None and pair.log_s is not None:
        loss_R = loss_R + _jsd_terms(pair.log_r, pair.log_s, log_beta, log_rest)
    return reduce(loss_R, rows, reduction, with_count)


@loss(
    signals={"dense": "exact", "topk": "bounded", "threshold": "bounded"},
    missing={"topk": _MISSING, "threshold": _MISSING},
    source="1 - tvd is the acceptance rate of arXiv:2211.17192, section 3",
    aliases=("total_variation",),
)
def tvd(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    missing: Missing = "ghost",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Total variation distance (1/2) sum |p - q|, between 0 and 1.

    `missing=` as in `jsd`: "ghost" is sum_S |p - q| / 2 + |r - s| / 2, a lower bound; `tvd_bracket`
    gives the upper one too. The gradient is that of |.|: sign(q - p) / 2, taken as 0 where they are
    equal.

    Args: as `jsd`, without beta.
    Raises: TargetsError as forward_kl.
    """
    if isinstance(targets, DenseTargets):
        rows = align(student_logits, targets, labels, mask, upcast=False)
        return reduce(_dense(rows, _dense_tvd, temperature), rows, reduction, with_count)
    rows, pair = _pair(student_logits, targets, labels, mask, missing, temperature, "tvd")
    loss_R = 0.5 * (pair.log_p.exp() - pair.log_q.exp()).abs().sum(-1)
    if pair.log_r is not None and pair.log_s is not None:
        loss_R = loss_R + 0.5 * (pair.log_r.exp() - pair.log_s.exp()).abs()
    return reduce(loss_R, rows, reduction, with_count)


def jsd_bracket(
    student_logits: Tensor,
    targets: Targets,
    *,
    mask: Tensor | None = None,
    beta: float = 0.5,
    reduction: Reduction = "mean",
) -> Bracket:
    """Lower and upper bound of the dense `jsd` from topk or threshold targets; they meet when r = s
    = 0.

    Lower: the tail as one bucket. Upper: tails that share no id, beta r log(1/beta) +
    (1 - beta) s log(1/(1 - beta)).
    """
    log_beta, log_rest = _log_weights(beta)
    rows, pair = _pair(student_logits, targets, None, mask, "ghost", 1.0, "jsd_bracket")
    head_R = _jsd_terms(pair.log_p, pair.log_q, log_beta, log_rest).sum(-1)
    if pair.log_r is None or pair.log_s is None:
        lower_R = upper_R = head_R
    else:
        lower_R = head_R + _jsd_terms(pair.log_r, pair.log_s, log_beta, log_rest)
        apart_R = -beta * log_beta * pair.log_r.exp() - (1 - beta) * log_rest * pair.log_s.exp()
        upper_R = head_R + apart_R
    return _bracket(lower_R, upper_R, rows, reduction)


def tvd_bracket(
    student_logits: Tensor,
    targets: Targets,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Bracket:
    """Lower and upper bound of the dense `tvd` from topk or threshold targets: head + [|r - s|/2,
    (r + s)/2]."""
    rows, pair = _pair(student_logits, targets, None, mask, "ghost", 1.0, "tvd_bracket")
    head_R = 0.5 * (pair.log_p.exp() - pair.log_q.exp()).abs().sum(-1)
    if pair.log_r is None or pair.log_s is None:
        return _bracket(head_R, head_R, rows, reduction)
    r_R, s_R = pair.log_r.exp(), pair.log_s.exp()
    return _bracket(head_R + 0.5 * (r_R - s_R).abs(), head_R + 0.5 * (r_R + s_R), rows, reduction)


def _bracket(lower_R: Tensor, upper_R: Tensor, rows: Rows, reduction: Reduction) -> Bracket:
    lower, upper = (reduce(x_R, rows, reduction, False) for x_R in (lower_R, upper_R))
    return Bracket(lower, upper)


def _pair(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    missing: Missing,
    temperature: float,
    name: str,
) -> tuple[Rows, _Pair]:
    sparse = missing in ("ghost", "renormalize_both")
    rows = align(student_logits, targets, labels, mask, upcast=not sparse)
    kept = kept_rows(rows, name, temperature)
    if not sparse:
        log_p_RV = completed_logprobs(rows, kept, missing, name)
        return rows, _Pair(_floor(log_p_RV), student_logprobs(rows, temperature))
    student = sparse_logprobs(
        rows.student_RV,
        kept.ids,
        rows.mask_R,
        num_excluded=kept.ids.shape[-1] if missing == "ghost" else 0,
        temperature=temperature,
    )
    padding_RK = kept.ids < 0
    if missing == "renormalize_both":
        log_p_RK, log_q_RK = (
            x_RK - torch.logsumexp(x_RK.masked_fill(padding_RK, -torch.inf), -1, keepdim=True)
            for x_RK in (kept.logprobs.masked_fill(~rows.mask_R[:, None], 0.0), student.logprobs)
        )
        return rows, _Pair(
            _floor(log_p_RK.masked_fill(padding_RK, -torch.inf)),
            _floor(log_q_RK.masked_fill(padding_RK, -torch.inf)),
        )
    log_r_R = kept.require_tail(f"{name} with missing='ghost'")
    log_s_R = student.log_tail.masked_fill(~rows.mask_R, -torch.inf)
    return rows, _Pair(
        _floor(kept.logprobs),
        _floor(student.logprobs.masked_fill(padding_RK, -torch.inf)),
        _floor(log_r_R),
        _floor(log_s_R),
    )


def _dense(rows: Rows, terms: Callable[[Tensor, Tensor], Terms], temperature: float) -> Tensor:
    return dense_divergence(
        rows.student_RV,
        teacher_logits(rows),
        rows.mask_R,
        terms,
        student_temperature=temperature,
        teacher_temperature=temperature,
    )


def _dense_jsd(log_p: Tensor, log_q: Tensor, *, log_beta: float, log_rest: float) -> Terms:
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    slope = math.exp(log_rest) * log_q.exp() * (log_q - log_m)
    teacher = math.exp(log_beta) * log_p.exp() * (log_p - log_m)
    return Terms((teacher + slope).sum(-1), slope)


def _dense_tvd(log_p: Tensor, log_q: Tensor) -> Terms:
    q = log_q.exp()
    gap = q - log_p.exp()
    return Terms(0.5 * gap.abs().sum(-1), 0.5 * q * gap.sign())


def _jsd_terms(log_p: Tensor, log_q: Tensor, log_beta: float, log_rest: float) -> Tensor:
    """Each id's share: beta p log(p/M) + (1 - beta) q log(q/M)."""
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    teacher = math.exp(log_beta) * log_p.exp() * (log_p - log_m)
    return teacher + math.exp(log_rest) * log_q.exp() * (log_q - log_m)


def _floor(logprobs: Tensor) -> Tensor:
    """-inf becomes the lowest finite value, so that 0 log 0 = 0 also in gradients."""
    return logprobs.clamp_min(LOG_ZERO)


def _log_weights(beta: float) -> tuple[float, float]:
    if not 0.0 < beta < 1.0:
        raise UsageError(
            "bad-argument",
            "jsd needs beta strictly between 0 and 1",
            where="beta",
            got=beta,
            hint="the formula is 0 at both ends; use forward_kl (limit at 0) or reverse_kl (at 1)",
        )
    return math.log(beta), math.log1p(-beta)
