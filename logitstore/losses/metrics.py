"""What to measure beside the loss: calibration, perplexity, acceptance, agreement, record KL.

None of these is a training objective; all run without gradients. Every one that sees a batch
returns sums or counts beside its value, so that batches and ranks add up exactly.

Letters: R rows of a batch, N rows that count, V vocabulary, K stored ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logitstore.losses.contract import Rows, align, require
from logitstore.losses.rows import KeptRows, dense_rows, kept_rows, weighted_rows
from logitstore.losses.sparse_logprobs import SparseLogprobs, sparse_logprobs
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import (
    DenseTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
)
from logitstore.targets.dense import at_least_float32

__all__ = [
    "Agreement",
    "AcceptanceRate",
    "Calibration",
    "Perplexity",
    "RecordKL",
    "acceptance",
    "ece",
    "expected_block_tokens",
    "perplexity",
    "record_kl",
    "top1_agreement",
]


@dataclass(frozen=True)
class Calibration:
    """A reliability table over M equal-width bins [m/M, (m+1)/M) of confidence; 1 is in the last.

    Attributes:
        count: int64 [M], rows whose largest probability falls into the bin.
        confidence_sum: float64 [M], sum of those probabilities.
        correct: int64 [M], how many of the rows predict their label.

    Tables of several batches add up: `first + second`.
    """

    count: Tensor
    confidence_sum: Tensor
    correct: Tensor

    @property
    def ece(self) -> float:
        """sum_m (n_m / n) |accuracy_m - confidence_m|; empty bins contribute nothing."""
        gap = (self.correct.double() - self.confidence_sum).abs().sum()
        return float(gap / self.count.sum())

    @property
    def n(self) -> int:
        """Rows counted."""
        return int(self.count.sum())

    @property
    def edges(self) -> Tensor:
        """float64 [M + 1], where bins begin and end."""
        return torch.linspace(0, 1, self.count.numel() + 1, dtype=torch.float64)

    @property
    def confidence(self) -> Tensor:
        """float64 [M], mean confidence; NaN in empty bins."""
        return self.confidence_sum / self.count

    @property
    def accuracy(self) -> Tensor:
        """float64 [M], share of correct rows; NaN in empty bins."""
        return self.correct.double() / self.count

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.count + other.count,
            self.confidence_sum + other.confidence_sum,
            self.correct + other.correct,
        )


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll_sum` / `count`); sums of several batches add up."""

    value: float
    nll_sum: float
    count: int


@dataclass(frozen=True)
class AcceptanceRate:
    """Means over counted rows of a quantity inside [`lower`, `upper`]; equal when exact."""

    lower: float
    upper: float
    count: int


@dataclass(frozen=True)
class Agreement:
    """`value`: share of the `count` rows with a known best teacher id where the student agrees."""

    value: float
    count: int


@dataclass(frozen=True)
class RecordKL:
    """KL(teacher || student) in nats, mean over `count` rows.

    `kind` says what the record allows: "exact"; "unbiased" (the mean over the record's sampling is
    exact); "lower" (the true value is at least this); "to_sample" (KL to the sampled weights, which
    is larger than the truth on average, because a sample has less entropy than its source).
    """

    value: float
    count: int
    kind: Literal["exact", "unbiased", "lower", "to_sample"]


@torch.no_grad()
def ece(
    student_logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, num_bins: int = 15
) -> Calibration:
    """Reliability table and expected calibration error (`.ece`) of the most probable id.

    Args:
        student_logits: float [..., V].
        labels: int64 [...]; rows with a negative label do not count.
        mask: bool [...], True counts. Over tokens the value depends on it: use one for all runs.
        num_bins: equal-width bins of confidence; 15 as usual since Guo et al.

    Raises: TargetsError shape-mismatch, empty-mask; UsageError bad-argument.

    Source: arXiv:1706.04599, section 2, with bins closed below instead of above.
    """
    if num_bins < 1:
        raise UsageError("bad-argument", "no bins", where="num_bins", got=num_bins, expected=">= 1")
    keep = labels >= 0 if mask is None else mask.bool() & (labels >= 0)
    if labels.shape != student_logits.shape[:-1] or keep.shape != labels.shape:
        raise TargetsError(
            "shape-mismatch",
            "labels, mask and student_logits disagree",
            got=f"{list(labels.shape)}, {list(keep.shape)}, {list(student_logits.shape)}",
            expected="labels and mask in the leading shape of student_logits",
        )
    if not bool(keep.any()):
        raise TargetsError("empty-mask", "no position with a label counts")
    logits_NV = at_least_float32(student_logits[keep])
    top_N = logits_NV.max(-1)
    confidence_N = (top_N.values - torch.logsumexp(logits_NV, -1)).exp().double().clamp(0, 1)
    correct_N = top_N.indices == labels[keep]
    bin_N = (confidence_N * num_bins).long().clamp_max(num_bins - 1)
    zeros = confidence_N.new_zeros(num_bins)
    return Calibration(
        torch.bincount(bin_N, minlength=num_bins).cpu(),
        zeros.index_add(0, bin_N, confidence_N).cpu(),
        zeros.index_add(0, bin_N, correct_N.double()).long().cpu(),
    )


def perplexity(targets: Targets, mask: Tensor) -> Perplexity:
    """The teacher's perplexity on the stored text: exp(-mean label_logprob), in units of tokens.

    Args:
        targets: any signal with `label_logprob`, flat or padded.
        mask: bool in the shape of a padded batch [B, T] (or of `label_logprob`), True where the
            next token counts: the store's loss mask. It is needed, since 0 means both "no label"
            and "certain".

    Raises: TargetsError aux-missing, shape-mismatch, empty-mask.
    """
    logprob = require(targets, "label_logprob", "perplexity")
    if targets.lengths is not None and mask.ndim == 2:
        present_BT = torch.arange(mask.shape[1], device=mask.device) < targets.lengths.to(
            mask.device
        ).unsqueeze(-1)
        mask = mask[present_BT]
    if mask.shape != logprob.shape:
        raise TargetsError(
            "shape-mismatch",
            "mask and label_logprob disagree",
            got=f"mask {list(mask.shape)}",
            expected=f"{list(logprob.shape)}, or [B, T] for flat targets",
        )
    counted_N = logprob[mask.bool().to(logprob.device)].double()
    if counted_N.numel() == 0:
        raise TargetsError("empty-mask", "no position counts: the mean would be 0 / 0")
    nll_sum = -counted_N.sum()
    return Perplexity(float((nll_sum / counted_N.numel()).exp()), float(nll_sum), counted_N.numel())


@torch.no_grad()
def acceptance(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> AcceptanceRate:
    """Mean of sum_i min(p_i, q_i): how often a teacher accepts the student's draft token.

    Exact from dense targets. From topk, and from the exact head of threshold targets, the stored
    ids are exact and the rest lies in [0, min(r, s)], r the teacher's and s the student's mass on
    other ids. Refused from sampled targets: sum min(w, q) is too low on average (Jensen).

    Args: as in every loss. At temperature 1.

    Raises: TargetsError targets-mismatch, shape-mismatch, empty-mask.

    Source: Leviathan et al., arXiv:2211.17192, section 3.2; 1 - total variation.
    """
    _refuse(targets, "acceptance", "dense", "topk", "threshold")
    rows = align(student_logits, targets, labels, mask, upcast=False)
    count = int(rows.mask_R.sum())
    if isinstance(targets, DenseTargets):
        value = _dense_mean(rows, lambda log_p, log_q: torch.minimum(log_p, log_q).exp())
        return AcceptanceRate(value, value, count)
    kept = kept_rows(rows, "acceptance")
    log_q = _stored_logprobs(rows, kept)
    head_RK = torch.minimum(kept.logprobs, log_q.logprobs).exp().masked_fill(kept.ids < 0, 0.0)
    tail_R = torch.minimum(kept.require_tail("acceptance"), log_q.log_tail).exp()
    lower_R = head_RK.sum(-1)
    return AcceptanceRate(_mean(lower_R, rows), _mean(lower_R + tail_R, rows), count)


def expected_block_tokens(acceptance_rate: float, num_drafts: int) -> float:
    """Expected tokens per block of `num_drafts` drafts, (1 - a^(g+1)) / (1 - a), if independent.

    Args:
        acceptance_rate: a in [0, 1], from `acceptance`.
        num_drafts: g >= 0.

    Source: arXiv:2211.17192, equation 1.
    """
    if not 0 <= acceptance_rate <= 1 or num_drafts < 0:
        raise UsageError(
            "bad-argument",
            "an acceptance rate and a number of drafts are needed",
            got=f"{acceptance_rate}, {num_drafts}",
            expected="a rate in [0, 1] and a number >= 0",
        )
    # The geometric sum itself has no division that fails at a = 1.
    return float(sum(acceptance_rate**i for i in range(num_drafts + 1)))


@torch.no_grad()
def top1_agreement(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Agreement:
    """Share of rows where the student's most probable id is the teacher's; ties: lowest id.

    From dense and topk targets every counted row is judged. From threshold targets only rows whose
    best id is certain: its stored probability is at least the mass outside the head (the realised
    token is in the head for its own sake, and may be all of it).

    Raises: TargetsError targets-mismatch (sampled), shape-mismatch, empty-mask.
    """
    _refuse(targets, "top1_agreement", "dense", "topk", "threshold")
    rows = align(student_logits, targets, labels, mask, upcast=False)
    if isinstance(targets, DenseTargets):
        teacher_R = _first_argmax(dense_rows(rows))
        known_R = rows.mask_R
    else:
        kept = kept_rows(rows, "top1_agreement")
        best_R1 = _first_argmax(kept.logprobs)[:, None]
        teacher_R = kept.ids.gather(-1, best_R1)[:, 0]
        known_R = rows.mask_R & (teacher_R >= 0)
        if isinstance(targets, ThresholdTargets):
            best_logprob_R = kept.logprobs.gather(-1, best_R1)[:, 0]
            known_R &= best_logprob_R >= kept.require_tail("top1_agreement")
    count = int(known_R.sum())
    if count == 0:
        raise TargetsError("empty-mask", "the teacher's best id is known at no counted position")
    same_R = _first_argmax(rows.student_RV) == teacher_R
    return Agreement(int((same_R & known_R).sum()) / count, count)


@torch.no_grad()
def record_kl(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> RecordKL:
    """Mean KL(teacher || student) as far as the record knows it, nats; `kind` says how far.

    dense: exact. topk: the K + 1 category KL with the tail as one bucket, a lower bound (exact at
    K = V). sampled (power 1 or importance-corrected) and threshold: cross-entropy of the weights
    minus the stored `entropy`, unbiased; without `entropy`, KL to the weights themselves.

    Raises: TargetsError targets-mismatch, shape-mismatch, empty-mask.
    """
    _refuse(targets, "record_kl", "dense", "topk", "sampled", "threshold")
    rows = align(student_logits, targets, labels, mask, upcast=False)
    count = int(rows.mask_R.sum())
    if isinstance(targets, DenseTargets):
        return RecordKL(_dense_mean(rows, _kl_terms), count, "exact")
    if isinstance(targets, TopKTargets):
        kept = kept_rows(rows, "record_kl")
        log_q = _stored_logprobs(rows, kept)
        kl_R = _kl_terms(kept.logprobs, log_q.logprobs).sum(-1)
        kl_R = kl_R + _kl_terms(kept.require_tail("record_kl"), log_q.log_tail)
        complete = bool((kept.num_kept >= kept.vocab_size)[rows.mask_R].all())
        return RecordKL(_mean(kl_R, rows), count, "exact" if complete else "lower")
    weighted = weighted_rows(rows)
    log_q = sparse_logprobs(rows.student_RV, weighted.ids, rows.mask_R)
    cross_entropy = _mean(-(weighted.weights * log_q.logprobs).sum(-1), rows)
    if targets.entropy is not None:
        entropy_R = rows.per_row(at_least_float32(targets.entropy))
        return RecordKL(cross_entropy - _mean(entropy_R, rows), count, "unbiased")
    negative_entropy = _mean(torch.xlogy(weighted.weights, weighted.weights).sum(-1), rows)
    return RecordKL(cross_entropy + negative_entropy, count, "to_sample")


def _stored_logprobs(rows: Rows, kept: KeptRows) -> SparseLogprobs:
    return sparse_logprobs(rows.student_RV, kept.ids, rows.mask_R, num_excluded=kept.ids.shape[-1])


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))


def _dense_mean(rows: Rows, term: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean over counted rows of the sum over the vocabulary of term(log p, log q)."""
    log_p_NV = dense_rows(rows)[rows.mask_R]
    log_q_NV = torch.log_softmax(at_least_float32(rows.student_RV[rows.mask_R]), -1)
    return float(term(log_p_NV.to(log_q_NV), log_q_NV).sum(-1).double().mean())


def _mean(value_R: Tensor, rows: Rows) -> float:
    return float(value_R[rows.mask_R].double().mean())


def _first_argmax(values_RV: Tensor) -> Tensor:
    """Lowest index among the largest; `argmax` leaves ties open."""
    return (values_RV == values_RV.max(-1, keepdim=True).values).int().argmax(-1)


def _refuse(targets: Targets, name: str, *allowed: str) -> None:
    if targets.signal not in allowed:
        raise TargetsError(
            "targets-mismatch",
            f"{name} cannot be computed from {targets.signal} targets",
            got=targets.signal,
            expected=", ".join(allowed),
        )
