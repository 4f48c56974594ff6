"""Targets as rectangular rows that meet the student's rows: the step between `align` and
arithmetic.

Letters: R rows, K kept ids, A always-ids, U entries of a row, V vocabulary. Rows that do not count
hold harmless values, so that a NaN or infinity in padding can reach neither value nor gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logitstore.losses.contract import Rows, require
from logitstore.spec.errors import TargetsError
from logitstore.targets import (
    PAD_ID,
    DenseTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
    WeightedTargets,
)
from logitstore.targets.dense import at_least_float32

__all__ = [
    "KeptRows",
    "WeightedRows",
    "dense_rows",
    "kept_rows",
    "log_without",
    "refuse_temperature",
    "require_labels",
    "student_precision",
    "teacher_logits",
    "tempered_tail",
    "weighted_rows",
]


class KeptRows(NamedTuple):
    """Ids whose teacher probability is known exactly, and the mass outside them.

    Attributes:
        ids: int64 [R, K], distinct within a row; -1 pads.
        logprobs: float [R, K], log p_T, nats; -inf at padding.
        log_tail: float [R], log of the teacher's mass outside, nats; None when the record lacks it.
        vocab_size: V of the teacher.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor | None
    vocab_size: int

    @property
    def probs(self) -> Tensor:
        """float [R, K], 0 at padding."""
        return self.logprobs.exp()

    @property
    def num_kept(self) -> Tensor:
        """int64 [R], ids that are not padding."""
        return (self.ids >= 0).sum(-1)

    def require_tail(self, name: str) -> Tensor:
        """`log_tail`, or the error that names its capture flag."""
        if self.log_tail is not None:
            return self.log_tail
        if bool((self.num_kept < self.vocab_size).any()):
            raise TargetsError(
                "aux-missing",
                f"{name} needs the field log_tail, which these targets do not hold",
                hint="capture with --aux log_tail, or choose missing='renormalize'",
            )
        return self.logprobs.new_full(self.logprobs.shape[:1], -torch.inf)


class WeightedRows(NamedTuple):
    """Sparse weights, E[w] = p.

    Attributes:
        ids: int64 [R, U]; -1 pads.
        weights: float [R, U]; 0 at padding.
    """

    ids: Tensor
    weights: Tensor


def kept_rows(rows: Rows, name: str, temperature: float = 1.0) -> KeptRows:
    """The exactly known part of top-K targets, or the head of threshold targets, with always-ids
    merged in.

    Args:
        rows: from `align`.
        name: the loss, for messages.
        temperature: T other than 1 needs `lse` and `lse_at[T]`: p_T(i) = exp(z_i / T - lse_at[T]).
    """
    targets = rows.targets
    if isinstance(targets, ThresholdTargets):
        refuse_temperature(targets, name, temperature)
        kept = _head_rows(rows, targets)
    elif isinstance(targets, TopKTargets):
        kept = _topk_rows(rows, targets)
    else:
        raise TargetsError(
            "targets-mismatch", f"{name} needs exact log-probs of some ids", got=targets.signal
        )
    if targets.always_ids is not None:
        # A top-K tail still holds the always-ids; a threshold tail was taken from the other ids.
        in_tail = isinstance(targets, TopKTargets)
        kept = _merge_always(kept, *_always_rows(rows, kept.logprobs.dtype), in_tail=in_tail)
    if temperature != 1.0:
        kept = _softened(kept, targets, name, temperature)
    mask_R1 = rows.mask_R[:, None]
    log_tail_R = kept.log_tail
    if log_tail_R is not None:
        nothing_outside_R = (kept.num_kept >= kept.vocab_size) | ~rows.mask_R
        log_tail_R = log_tail_R.masked_fill(nothing_outside_R, -torch.inf)
    return kept._replace(
        ids=torch.where(mask_R1, kept.ids, PAD_ID),
        logprobs=torch.where(mask_R1 & (kept.ids >= 0), kept.logprobs, -torch.inf),
        log_tail=log_tail_R,
    )


def weighted_rows(rows: Rows) -> WeightedRows:
    """Ids and weights of sampled or threshold targets; always-ids enter with their exact
    probability.

    An always-id that was also stored is replaced, not counted twice: samples are drawn from the
    other ids, whose weights the record scales so that E[w] = p.
    """
    targets = rows.targets
    assert isinstance(targets, WeightedTargets)
    entries = targets.entries()
    ids_RU = _to_rows(entries.ids, rows, PAD_ID)
    weights_RU = _to_rows(at_least_float32(entries.weights), rows, 0.0)
    if targets.always_ids is not None:
        always_RA, logprobs_RA = _always_rows(rows, weights_RU.dtype)
        known_RU = (ids_RU[:, :, None] == always_RA[:, None, :]).any(-1)
        ids_RU = torch.cat([always_RA, ids_RU.masked_fill(known_RU, PAD_ID)], -1)
        weights_RU = torch.cat([logprobs_RA.exp(), weights_RU.masked_fill(known_RU, 0.0)], -1)
    mask_R1 = rows.mask_R[:, None]
    return WeightedRows(
        torch.where(mask_R1, ids_RU, PAD_ID),
        torch.where(mask_R1 & (ids_RU >= 0), weights_RU, 0.0),
    )


def teacher_logits(rows: Rows) -> Tensor:
    """Raw logits of dense targets, float [R, V'] in the dtype they are kept in."""
    assert isinstance(rows.targets, DenseTargets)
    return rows.targets.logits.reshape(rows.student_RV.shape[0], -1)


def dense_rows(rows: Rows, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T), float [R, V of the student], -inf at ids the teacher lacks."""
    logits_RV = at_least_float32(teacher_logits(rows))
    logits_RV = torch.where(rows.mask_R[:, None], logits_RV, 0.0)
    logprobs_RV = torch.log_softmax(logits_RV / temperature, -1)
    extra = rows.student_RV.shape[-1] - logprobs_RV.shape[-1]
    if extra > 0:
        logprobs_RV = torch.nn.functional.pad(logprobs_RV, (0, extra), value=-torch.inf)
    return logprobs_RV


def refuse_temperature(targets: Targets, name: str, temperature: float) -> None:
    """Samples of p are not samples of p_T, and their weights to the power 1/T are biased."""
    if temperature != 1.0:
        raise TargetsError(
            "not-retemperable",
            f"{name}: {targets.signal} targets exist at the captured temperature only",
            got=f"temperature={temperature}",
            expected="temperature=1.0",
            hint="capture topk with --lse-at, or dense, to soften the teacher",
        )


def require_labels(rows: Rows, name: str, why: str) -> Tensor:
    """Labels [R], 0 in rows that do not count; a row that counts must have a valid one."""
    if rows.labels_R is None:
        raise TargetsError(
            "label-missing",
            f"{name}{why} needs labels",
            expected="labels=batch.labels, int64 in the leading shape of student_logits",
        )
    labels_R = torch.where(rows.mask_R, rows.labels_R, 0)
    vocab = rows.student_RV.shape[-1]
    if not torch.compiler.is_compiling():
        wrong_R = (labels_R < 0) | (labels_R >= vocab)
        if bool(wrong_R.any()):
            raise TargetsError(
                "label-missing",
                f"{name}{why}: a position that counts has no label inside the vocabulary",
                got=f"{int(wrong_R.sum())} such positions, first label {int(labels_R[wrong_R][0])}",
                expected=f"labels in 0..{vocab - 1} wherever mask is true",
                hint="use batch.loss_mask, which is false where there is no next token",
            )
    return labels_R


def _topk_rows(rows: Rows, targets: TopKTargets) -> KeptRows:
    log_tail = targets.log_tail
    return KeptRows(
        targets.ids.reshape(-1, targets.k),
        student_precision(targets.logprobs.reshape(-1, targets.k), rows),
        None if log_tail is None else student_precision(log_tail.reshape(-1), rows),
        targets.vocab_size,
    )


def _softened(kept: KeptRows, targets: Targets, name: str, temperature: float) -> KeptRows:
    """p_T(i) = exp(z_i / T - lse_at[T]) with z = log p + lse."""
    lse_at_R = require(targets, "lse_at", name, temperature=temperature).reshape(-1)
    lse_R = require(targets, "lse", name).reshape(-1)
    logprobs_RK = (kept.logprobs + lse_R[:, None]) / temperature - lse_at_R[:, None]
    log_tail_R = tempered_tail(
        logprobs_RK.masked_fill(kept.ids < 0, -torch.inf),
        None if kept.log_tail is None else (kept.log_tail + lse_R) / temperature - lse_at_R,
        kept.vocab_size - kept.num_kept,
        1 / temperature,
    )
    return kept._replace(logprobs=logprobs_RK, log_tail=log_tail_R)


def tempered_tail(
    logprobs_RK: Tensor, log_bucket_R: Tensor | None, num_outside_R: Tensor, gamma: float
) -> Tensor:
    """log of p_T's mass outside the kept ids, [R]: 1 - sum, within what the stored tail allows.

    With r the mass outside at T = 1, the sum over the tail of p^gamma lies between r^gamma and
    (V - K)^(1 - gamma) r^gamma (the other way round for gamma > 1). So rounded log-probs that sum
    to 1 or more do not make a tail vanish that is there.

    Args:
        logprobs_RK: log p_T of the kept ids; -inf at padding.
        log_bucket_R: gamma log r on the scale of `logprobs`; None when r is not stored.
        num_outside_R: V - K.
        gamma: 1 / T.
    """
    log_rest_R = torch.log(-torch.expm1(logprobs_RK.logsumexp(-1).clamp_max(0.0)))
    if log_bucket_R is None:
        return log_rest_R
    log_flat_R = log_bucket_R + (1 - gamma) * num_outside_R.clamp_min(1).to(log_rest_R.dtype).log()
    return log_rest_R.clamp(
        torch.minimum(log_bucket_R, log_flat_R), torch.maximum(log_bucket_R, log_flat_R)
    )


def _head_rows(rows: Rows, targets: ThresholdTargets) -> KeptRows:
    """The exact head of threshold targets; its sampled tail is left out, log_tail is exact."""
    entries = targets.entries()
    index_U = torch.arange(entries.ids.shape[-1], device=entries.ids.device)
    width = max(int(targets.num_heads.max()), 1)
    in_head_NU = (index_U < targets.num_heads[:, None])[:, :width]
    ids_NU = entries.ids[:, :width].masked_fill(~in_head_NU, PAD_ID)
    weights_NU = at_least_float32(entries.weights[:, :width]).masked_fill(~in_head_NU, 0.0)
    return KeptRows(
        _to_rows(ids_NU, rows, PAD_ID),
        student_precision(_to_rows(weights_NU, rows, 0.0), rows).log(),
        student_precision(_to_rows(targets.log_tail, rows, -torch.inf), rows),
        targets.vocab_size,
    )


def _merge_always(
    kept: KeptRows, ids_RA: Tensor, logprobs_RA: Tensor, *, in_tail: bool
) -> KeptRows:
    """Append the always-ids that the list lacks; if they were in the tail, they leave it."""
    known_RA = (ids_RA[:, :, None] == kept.ids[:, None, :]).any(-1)
    logprobs_RA = logprobs_RA.masked_fill(known_RA, -torch.inf)
    log_tail_R = kept.log_tail
    if log_tail_R is not None and in_tail:
        log_tail_R = log_without(log_tail_R, torch.logsumexp(logprobs_RA, -1))
    return kept._replace(
        ids=torch.cat([kept.ids, ids_RA.masked_fill(known_RA, PAD_ID)], -1),
        logprobs=torch.cat([kept.logprobs, logprobs_RA], -1),
        log_tail=log_tail_R,
    )


def log_without(log_mass: Tensor, log_part: Tensor) -> Tensor:
    """log(exp(log_mass) - exp(log_part)); -inf where rounding leaves less than nothing."""
    share = (log_part - log_mass).exp().nan_to_num(nan=1.0)
    return log_mass + torch.log1p(-share.clamp(max=1.0))


def _always_rows(rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[R, A] always-ids and their log-probs; rows the teacher never saw get -inf."""
    targets = rows.targets
    assert targets.always_ids is not None
    logprobs = targets.always_logprobs
    if logprobs is None:
        raise TargetsError(
            "aux-missing", "always_ids without always_logprobs", hint="capture with --always-ids"
        )
    num_rows = rows.mask_R.numel()
    logprobs_RA = logprobs.reshape(-1, logprobs.shape[-1]).to(dtype)
    if logprobs_RA.shape[0] != num_rows:
        logprobs_RA = _to_rows(logprobs_RA, rows, -torch.inf)
    return targets.always_ids.expand(num_rows, -1), logprobs_RA


def _to_rows(x_N: Tensor, rows: Rows, fill: float) -> Tensor:
    """[N, ...] per position -> [R, ...] per row of the student."""
    num_rows = rows.mask_R.numel()
    if rows.row_of_position is None or x_N.shape[0] == num_rows:
        return x_N
    out = x_N.new_full((num_rows, *x_N.shape[1:]), fill)
    out[rows.row_of_position] = x_N
    return out


def student_precision(x: Tensor, rows: Rows) -> Tensor:
    """At least float32, and float64 beside a float64 student."""
    return x.to(
        torch.promote_types(x.dtype, torch.promote_types(rows.student_RV.dtype, torch.float32))
    )
