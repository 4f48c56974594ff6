"""Divergences from a whole teacher row, in chunks of rows with the gradient formed on the way.

What lives on is the gradient, one copy of the logits; softmaxes of both sides exist for one chunk
at a time.

Letters: R rows, C rows of a chunk, V vocabulary of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitstore.losses.sparse_logprobs import graph_is_kept

__all__ = ["LOG_ZERO", "Terms", "dense_divergence", "forward_kl_terms", "reverse_kl_terms"]

# Stands for log 0: below every log-prob that matters, its exponential is 0, and unlike -inf it
# makes 0 log 0 = 0, in gradients too.
LOG_ZERO = -1e30


class Terms(NamedTuple):
    """A divergence D of each row, and how it changes.

    Attributes:
        value: float [C].
        slope: float [C, V], dD / d log q. A multiple of q may be added: the gradient in the
            logits is slope - q * (sum of slope).
    """

    value: Tensor
    slope: Tensor


def dense_divergence(
    student_RV: Tensor,
    teacher_RV: Tensor,
    mask_R: Tensor,
    terms: Callable[[Tensor, Tensor], Terms],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """float [R]: `terms(log p, log q)` of softmaxes; 0 in rows that do not count.

    Args:
        student_RV: float [R, V] raw logits; half types are computed in float32.
        teacher_RV: float [R, V'], V' <= V, raw logits; the ids that it lacks have probability 0.
        mask_R: bool [R]; other rows get a zero gradient whatever they hold.
        terms: differentiable in log q; neither argument falls below LOG_ZERO.
        student_temperature, teacher_temperature: what the logits are divided by.

    A second derivative is taken through plain operators, as is everything under torch.compile.
    """
    temperatures = (student_temperature, teacher_temperature)
    if torch.compiler.is_compiling():
        return _from_plain_operators(student_RV, teacher_RV, mask_R, terms, temperatures)
    value: Tensor = _DenseDivergence.apply(
        student_RV, teacher_RV.detach(), mask_R, terms, temperatures
    )
    return value


def forward_kl_terms(log_p: Tensor, log_q: Tensor) -> Terms:
    """sum p (log p - log q)."""
    p = log_p.exp()
    return Terms((p * (log_p - log_q)).sum(-1), -p)


def reverse_kl_terms(log_p: Tensor, log_q: Tensor) -> Terms:
    """sum q (log q - log p)."""
    each = log_q.exp() * (log_q - log_p)
    return Terms(each.sum(-1), each)


def _chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows worked on at a time: on a CPU as many as fit its cache with their temporaries.

    2^18 values took two thirds of the time of 2^20 and half that of 2^22 (one thread, V = 128,256).
    """
    return max(1, 2 ** (18 if device.type == "cpu" else 24) // vocab)


class _DenseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RV: Tensor,
        teacher_RV: Tensor,
        mask_R: Tensor,
        terms: Callable[[Tensor, Tensor], Terms],
        temperatures: tuple[float, float],
    ) -> Tensor:
        num_rows, vocab = student_RV.shape
        live_L = None if bool(mask_R.all()) else mask_R.nonzero()[:, 0]
        num_live = num_rows if live_L is None else live_L.numel()
        value_R = student_RV.new_zeros(
            num_rows, dtype=torch.promote_types(student_RV.dtype, torch.float32)
        )
        grad_RV = None
        if ctx.needs_input_grad[0]:
            # Rows that do not count keep their zeros.
            grad_RV = (torch.empty_like if live_L is None else torch.zeros_like)(student_RV)
        step = _chunk_rows(vocab, student_RV.device)
        for start in range(0, num_live, step):
            part: slice | Tensor = slice(start, min(start + step, num_live))
            if live_L is not None:
                part = live_L[part]
            log_q_CV, log_p_CV = _logprobs(student_RV[part], teacher_RV[part], temperatures)
            value_R[part], slope_CV = terms(log_p_CV, log_q_CV)
            if grad_RV is not None:
                q_CV = log_q_CV.exp_()
                grad_CV = torch.addcmul(slope_CV, q_CV, slope_CV.sum(-1, keepdim=True), value=-1)
                grad_RV[part] = grad_CV.div_(temperatures[0]).to(grad_RV.dtype)
        if grad_RV is not None:
            # The inputs cost nothing: they are the caller's.
            ctx.save_for_backward(grad_RV, student_RV, teacher_RV, mask_R)
            ctx.settings = terms, temperatures
        return value_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_RV, student_RV, teacher_RV, mask_R = ctx.saved_tensors
        if torch.is_grad_enabled():
            value_R = _from_plain_operators(student_RV, teacher_RV, mask_R, *ctx.settings)
            (result_RV,) = torch.autograd.grad(value_R, student_RV, gradients[0], create_graph=True)
            return result_RV, None, None, None, None
        scale_R1 = gradients[0][:, None].to(grad_RV.dtype)
        result_RV = grad_RV * scale_R1 if graph_is_kept() else grad_RV.mul_(scale_R1)
        return result_RV, None, None, None, None


def _from_plain_operators(
    student_RV: Tensor,
    teacher_RV: Tensor,
    mask_R: Tensor,
    terms: Callable[[Tensor, Tensor], Terms],
    temperatures: tuple[float, float],
) -> Tensor:
    skip_R1 = ~mask_R[:, None]
    log_q_RV, log_p_RV = _logprobs(
        student_RV.masked_fill(skip_R1, 0.0), teacher_RV.masked_fill(skip_R1, 0.0), temperatures
    )
    return terms(log_p_RV, log_q_RV).value.masked_fill(~mask_R, 0.0)


def _logprobs(
    student_CV: Tensor, teacher_CV: Tensor, temperatures: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """log q and log p [C, V], at least LOG_ZERO."""
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    log_q_CV, log_p_CV = (
        torch.log_softmax(x.to(dtype) / temperature, -1).clamp_min(LOG_ZERO)
        for x, temperature in zip((student_CV, teacher_CV), temperatures, strict=True)
    )
    extra = student_CV.shape[-1] - teacher_CV.shape[-1]
    if extra:
        log_p_CV = torch.nn.functional.pad(log_p_CV, (0, extra), value=LOG_ZERO)
    return log_q_CV, log_p_CV
