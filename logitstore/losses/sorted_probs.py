"""L1 distance of sorted probabilities: what ULD and GOLD compare.

The gradient is formed in the forward pass, chunk of rows by chunk of rows: one sort or top-K per
row, and the only thing of the logits' size that lives on is the gradient itself.

Letters: R rows of the student, P pairs of rows, p of them in a chunk, V vocabulary, W the larger
vocabulary, K stored ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from logitstore.losses.positions import tempered_logprobs
from logitstore.losses.sequences import rows_per_chunk
from logitstore.losses.sparse_logprobs import refuse_second_derivative
from logitstore.targets import PAD_ID, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["StoredHead", "Tail", "sorted_distance", "sorted_distance_to_head", "stored_head"]

Tail = Literal["bucket", "zero"]


class StoredHead(NamedTuple):
    """What a top-K record knows of P rows' sorted probabilities.

    `probs_PK` descending, 0 where fewer than K are stored; `held_PK` bool, where one is stored;
    `tail_P` the mass beyond them.
    """

    probs_PK: Tensor
    held_PK: Tensor
    tail_P: Tensor


def stored_head(
    targets: TopKTargets, rows_P: Tensor, temperature: float, needed_by: str
) -> StoredHead:
    """The head of padded targets at flat rows, at a temperature that was captured."""
    at_rows = targets.map(lambda x: x.flatten(0, 1)[rows_P.to(x.device)] if x.ndim > 1 else x)
    logprobs_PK = at_least_float32(at_rows.logprobs)
    held_PK = at_rows.ids != PAD_ID
    probs_PK = tempered_logprobs(logprobs_PK, at_rows, temperature, needed_by).exp()
    probs_PK = probs_PK.masked_fill(~held_PK, 0.0)
    if temperature == 1 and at_rows.log_tail is not None:
        tail_P = at_rows.log_tail.to(probs_PK.dtype).exp()
    else:
        # Enters linearly, never through a logarithm, so that the rounding of 1 - sum is harmless.
        tail_P = (1 - probs_PK.sum(-1)).clamp_min(0)
    if targets.k >= targets.vocab_size:
        tail_P = tail_P.masked_fill(held_PK.sum(-1) >= targets.vocab_size, 0.0)
    return StoredHead(probs_PK, held_PK, tail_P)


def sorted_distance(
    student_RV: Tensor,
    rows_P: Tensor,
    teacher_PV: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    log_scale_P: Tensor | None = None,
    teacher_log_scale_P: Tensor | None = None,
) -> Tensor:
    """[P]: sum_i |c q~(i) - d p~(i)| of two vocabularies' logits; c, d are 1 or exp(log scale).

    `rows_P` are the student's rows, distinct; all others get a zero gradient, whatever they hold.
    Gradients reach `student_RV` and `log_scale_P`, once.
    """
    width = max(student_RV.shape[-1], teacher_PV.shape[-1])

    def of_rows(rows: slice, q_pV: Tensor, scale_p: Tensor) -> _Distance:
        teacher_pV = at_least_float32(teacher_PV[rows]).to(q_pV.dtype)
        p_pV = torch.softmax(teacher_pV / teacher_temperature, -1)
        if teacher_log_scale_P is not None:
            p_pV *= teacher_log_scale_P[rows].to(q_pV.dtype).exp()[:, None]
        sorted_q = (scale_p[:, None] * q_pV).sort(-1, descending=True)
        gap_pW = _padded(sorted_q.values, width) - _padded(
            p_pV.sort(-1, descending=True).values, width
        )
        sign_pV = gap_pW[:, : q_pV.shape[-1]].sign()
        return _Distance(gap_pW.abs().sum(-1), sign_pV, sorted_q.indices, torch.zeros_like(scale_p))

    return _of_student(student_RV, rows_P, log_scale_P, of_rows, student_temperature, width)


def sorted_distance_to_head(
    student_RV: Tensor,
    rows_P: Tensor,
    head: StoredHead,
    student_temperature: float,
    tail: Tail,
    log_scale_P: Tensor | None = None,
) -> Tensor:
    """[P]: the head of sum_i |c q~(i) - p~(i)| exactly, and its tail as `tail` says.

    The student is never sorted. `rows_P` and gradients as in `sorted_distance`.
    """

    def of_rows(rows: slice, q_pV: Tensor, scale_p: Tensor) -> _Distance:
        held_pK = head.held_PK[rows]
        # A student with fewer ids than K has zeros there; such slots scatter nothing.
        k = min(held_pK.shape[-1], q_pV.shape[-1])
        top = q_pV.topk(k)
        q_pK = _padded(top.values, held_pK.shape[-1]).masked_fill(~held_pK, 0.0)
        gap_pK = scale_p[:, None] * q_pK - head.probs_PK[rows].to(q_pK.dtype)
        # Linear, never through a logarithm, so that 1 - sum is accurate enough; nothing is left of
        # a student whose every id is in the head.
        rest_p = scale_p * (1 - q_pK.sum(-1)).clamp_min(0)
        rest_p = rest_p.masked_fill(held_pK.sum(-1) >= q_pV.shape[-1], 0.0)
        rest_gap_p = rest_p if tail == "zero" else rest_p - head.tail_P[rows].to(rest_p.dtype)
        rest_sign_p = torch.ones_like(rest_p) if tail == "zero" else rest_gap_p.sign()
        sign_pK = torch.where(held_pK, gap_pK.sign(), rest_sign_p[:, None])
        return _Distance(
            gap_pK.abs().sum(-1) + rest_gap_p.abs(), sign_pK[:, :k], top.indices, rest_sign_p
        )

    width = student_RV.shape[-1]
    return _of_student(student_RV, rows_P, log_scale_P, of_rows, student_temperature, width)


class _Distance(NamedTuple):
    """Distances of a chunk and their slope in each scaled student probability.

    `slope_pU` belongs to `ids_pU`, distinct within a row; every other id has `other_slope_p`.
    """

    distance_p: Tensor
    slope_pU: Tensor
    ids_pU: Tensor
    other_slope_p: Tensor


def _of_student(
    student_RV: Tensor,
    rows_P: Tensor,
    log_scale_P: Tensor | None,
    of_rows: Callable[[slice, Tensor, Tensor], _Distance],
    temperature: float,
    width: int,
) -> Tensor:
    if log_scale_P is None:
        dtype = torch.promote_types(student_RV.dtype, torch.float32)
        log_scale_P = student_RV.new_zeros(rows_P.numel(), dtype=dtype)
    value: Tensor = _GradientInForward.apply(
        student_RV, log_scale_P, rows_P, of_rows, temperature, width
    )
    return value


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RV: Tensor,
        log_scale_P: Tensor,
        rows_P: Tensor,
        of_rows: Callable[[slice, Tensor, Tensor], _Distance],
        temperature: float,
        width: int,
    ) -> Tensor:
        num_rows = rows_P.numel()
        dtype = torch.promote_types(student_RV.dtype, torch.float32)
        distance_P = student_RV.new_empty(num_rows, dtype=dtype)
        wanted = any(ctx.needs_input_grad[:2])
        grad_RV = torch.zeros_like(student_RV) if wanted else None
        grad_scale_P = torch.empty_like(distance_P)
        step = rows_per_chunk(num_rows, width)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            q_pV = torch.softmax(student_RV[rows_P[rows]].to(dtype) / temperature, -1)
            scale_p = log_scale_P[rows].to(dtype).exp()
            part = of_rows(rows, q_pV, scale_p)
            distance_P[rows] = part.distance_p
            if grad_RV is None:
                continue
            # y = c softmax(z / T):  dL/dz = y (slope - mean slope under q) / T,
            # dL/dlog c = c mean.
            extra_pU = part.slope_pU - part.other_slope_p[:, None]
            q_pU = q_pV.gather(-1, part.ids_pU)
            mean_p = part.other_slope_p + (extra_pU * q_pU).sum(-1)
            outer_p1 = (scale_p / temperature)[:, None]
            q_pV *= outer_p1 * (part.other_slope_p - mean_p)[:, None]
            q_pV.scatter_add_(-1, part.ids_pU, outer_p1 * extra_pU * q_pU)
            grad_RV[rows_P[rows]] = q_pV.to(grad_RV.dtype)
            grad_scale_P[rows] = scale_p * mean_p
        if grad_RV is not None:
            ctx.save_for_backward(grad_RV, grad_scale_P.to(log_scale_P.dtype), rows_P)
        return distance_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad_RV, grad_scale_P, rows_P = ctx.saved_tensors
        outer_R = grad_P.new_zeros(grad_RV.shape[0]).index_copy(0, rows_P, grad_P)
        return (
            grad_RV * outer_R[:, None].to(grad_RV.dtype),
            grad_scale_P * grad_P.to(grad_scale_P.dtype),
            None,
            None,
            None,
            None,
        )


def _padded(values_pV: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values_pV, (0, width - values_pV.shape[-1]))
