"""Student log-probs at a few ids, and of all others together: what every sparse loss is made of.

One softmax over the vocabulary in the forward pass, one scaling of its result in the backward pass.
The gradient takes the place of the probabilities, so the extra memory is one copy of the logits;
sparse losses are then ordinary arithmetic on [R, U] tensors.

Letters: R rows, V vocabulary, U ids per row, S the first `num_excluded` ids of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitstore.spec.errors import UsageError
from logitstore.targets.dense import at_least_float32

__all__ = ["SparseLogprobs", "chunk_rows", "sparse_logprobs"]


class SparseLogprobs(NamedTuple):
    """What `sparse_logprobs` returns; rows that do not count hold 0 everywhere.

    Attributes:
        logprobs: float [R, U], log q at the ids, nats; 0 at padding.
        log_tail: float [R], log of the student's mass outside S by masked logsumexp; 0 when S is
            empty.
        total: float [R], sum of log q over the first `sum_vocab` ids of the vocabulary; 0 when that
            is 0.
    """

    logprobs: Tensor
    log_tail: Tensor
    total: Tensor


def sparse_logprobs(
    student_RV: Tensor,
    ids_RU: Tensor,
    mask_R: Tensor,
    *,
    num_excluded: int = 0,
    sum_vocab: int = 0,
    temperature: float = 1.0,
) -> SparseLogprobs:
    """log softmax(student / T) at `ids`, outside the first `num_excluded` of them, and summed up.

    Args:
        student_RV: float [R, V], raw logits; half types are computed in float32.
        ids_RU: int64 [R, U], -1 pads. The first `num_excluded` (S) must be distinct within a row
            and must leave at least one id outside; the others may repeat.
        mask_R: bool [R]; other rows give 0 and get a zero gradient whatever they hold.
        num_excluded: 0 skips `log_tail`.
        sum_vocab: `total` runs over ids below it; 0 skips `total`.
        temperature: T.

    Gradient: exact, once; a second derivative is refused. Under torch.compile the same
    values come from plain operators, which the compiler fuses and can differentiate again.
    """
    if torch.compiler.is_compiling():
        return _from_plain_operators(
            student_RV, ids_RU, mask_R, num_excluded, sum_vocab, temperature
        )
    # Inside the Function gradients are always off, so it has to be told.
    wanted = torch.is_grad_enabled() and student_RV.requires_grad
    return SparseLogprobs(
        *_SparseLogprobs.apply(
            student_RV, ids_RU, mask_R, num_excluded, sum_vocab, temperature, wanted
        )
    )


def chunk_rows(num_rows: int, vocab: int, device: torch.device) -> int:
    """Rows of logits worked on at a time: 2^25 values on a CPU, 2^26 elsewhere.

    Chunks bound the memory of buffers. Smaller ones, down to the cache, measured no faster on one
    thread, and up to five times slower on two threads of a busy machine, where every parallel
    region waits for the thread that lost its core.
    """
    values = 2**25 if device.type == "cpu" else 2**26
    return max(1, min(num_rows, values // max(vocab, 1)))


def _without_padding(ids_RU: Tensor) -> Tensor:
    """Padding replaced by an id of the same row, or by 0 in a row of padding alone."""
    if ids_RU.shape[-1] == 0:
        return ids_RU
    return torch.where(ids_RU < 0, ids_RU.amax(-1, keepdim=True).clamp_min(0), ids_RU)


def _exclusion(logits_CV: Tensor, ids_CS: Tensor) -> tuple[Tensor, Tensor]:
    """Addresses and what to write there to leave `ids` out: -inf, or in rows of padding alone what
    is there already."""
    has_ids_C1 = (ids_CS >= 0).any(-1, keepdim=True)
    values_C1 = torch.where(has_ids_C1, -torch.inf, logits_CV[:, :1])
    return _without_padding(ids_CS), values_C1.expand_as(ids_CS)


def softmax_outside(
    student_CV: Tensor, excluded_CS: Tensor, temperature: float, out_CV: Tensor
) -> Tensor:
    """Softmax outside `excluded`, written to `out` (0 inside); returns its log normaliser [C].

    The normaliser is max - log(max of the softmax): one more look at values in the cache instead of
    a second pass of exponentials. The largest probability is at least 1/V, so its log is accurate.
    """
    source_CV: Tensor = student_CV
    if excluded_CS.shape[-1] or temperature != 1.0 or student_CV.dtype != out_CV.dtype:
        if student_CV is not out_CV or temperature != 1.0:
            torch.mul(student_CV.to(out_CV.dtype), 1.0 / temperature, out=out_CV)
        if excluded_CS.shape[-1]:
            out_CV.scatter_(-1, *_exclusion(out_CV, excluded_CS))
        source_CV = out_CV
    top_C = source_CV.amax(-1)
    torch.softmax(source_CV, -1, out=out_CV)
    log_normaliser_C = top_C - out_CV.amax(-1).log()
    # Nothing outside: softmax of all -inf is NaN, the mass is 0.
    return torch.where(torch.isneginf(top_C), top_C, log_normaliser_C)


class _SparseLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RV: Tensor,
        ids_RU: Tensor,
        mask_R: Tensor,
        num_excluded: int,
        sum_vocab: int,
        temperature: float,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, vocab = student_RV.shape
        dtype = torch.promote_types(student_RV.dtype, torch.float32)
        # Half logits: keep the logits and take the softmax again in the backward pass, which needs
        # half the memory of float32 probabilities and rounds the gradient once. Otherwise keep the
        # softmax.
        keep_softmax = wanted and student_RV.dtype == dtype
        rows = chunk_rows(num_rows, vocab, student_RV.device)
        softmax_RV = student_RV.new_empty((num_rows if keep_softmax else rows, vocab), dtype=dtype)
        log_outside_R = student_RV.new_empty(num_rows, dtype=dtype)
        total_R = student_RV.new_zeros(num_rows, dtype=dtype)
        excluded_RS = ids_RU[:, :num_excluded]
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            out_CV = softmax_RV[part] if keep_softmax else softmax_RV[: part.stop - start]
            log_outside_R[part] = softmax_outside(
                student_RV[part], excluded_RS[part], temperature, out_CV
            )
            if sum_vocab:
                total_R[part] = student_RV[part, :sum_vocab].sum(-1, dtype=dtype)
        pad_RU = ids_RU < 0
        logits_RU = student_RV.gather(-1, _without_padding(ids_RU)).to(dtype) / temperature
        logits_RU = logits_RU.masked_fill(pad_RU, 0.0)
        if num_excluded:
            inside_RS = logits_RU[:, :num_excluded].masked_fill(
                pad_RU[:, :num_excluded], -torch.inf
            )
            lse_R = torch.logaddexp(log_outside_R, torch.logsumexp(inside_RS, -1))
            log_tail_R = log_outside_R - lse_R
        else:
            lse_R = log_outside_R
            log_tail_R = torch.zeros_like(lse_R)
        logprobs_RU = logits_RU - lse_R[:, None]
        if sum_vocab:
            total_R = total_R / temperature - sum_vocab * lse_R
        if wanted:
            ctx.save_for_backward(
                softmax_RV if keep_softmax else student_RV,
                ids_RU,
                mask_R,
                logprobs_RU,
                log_tail_R,
            )
            ctx.settings = keep_softmax, num_excluded, sum_vocab, temperature
        skip_R = ~mask_R
        return (
            logprobs_RU.masked_fill(pad_RU | skip_R[:, None], 0.0),
            log_tail_R.masked_fill(skip_R, 0.0),
            total_R.masked_fill(skip_R, 0.0),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        kept_RV, ids_RU, mask_R, logprobs_RU, log_tail_R = ctx.saved_tensors
        keep_softmax, num_excluded, sum_vocab, temperature = ctx.settings
        pad_RU, skip_R = ids_RU < 0, ~mask_R
        change = LogitGradient.of(
            gradients[0].masked_fill(pad_RU | skip_R[:, None], 0.0),
            gradients[1].masked_fill(skip_R, 0.0) if num_excluded else None,
            gradients[2].masked_fill(skip_R, 0.0) if sum_vocab else None,
            _without_padding(ids_RU),
            logprobs_RU.masked_fill(pad_RU | skip_R[:, None], -torch.inf),
            log_tail_R.masked_fill(skip_R, 0.0),
            num_excluded,
            sum_vocab,
            1.0 / temperature,
        )
        # A row that does not count gets exactly 0, and so do ids outside when nothing is outside.
        change.empty_R = skip_R | torch.isneginf(log_tail_R)
        num_rows, vocab = kept_RV.shape
        if keep_softmax:
            # The probabilities become the gradient in place, unless the graph is kept for another
            # pass.
            result_RV = kept_RV.clone() if graph_is_kept() else kept_RV
        else:
            result_RV = torch.empty_like(kept_RV)
        rows = chunk_rows(num_rows, vocab, kept_RV.device)
        buffer_CV = (
            None if keep_softmax else kept_RV.new_empty((rows, vocab), dtype=logprobs_RU.dtype)
        )
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            if buffer_CV is None:
                change.write(result_RV[part], part)
            else:
                grad_CV = buffer_CV[: part.stop - start]
                softmax_outside(kept_RV[part], ids_RU[part, :num_excluded], temperature, grad_CV)
                change.write(grad_CV, part)
                result_RV[part] = grad_CV
        return result_RV, None, None, None, None, None, None


@dataclass
class LogitGradient:
    """The gradient in the logits, given the gradients in log-probs, as it turns a softmax into it.

    With g_j, g_tail, g_total the gradients of log q_j, log s and the sum over the first V' ids, and
    C = sum_j g_j + g_tail + V' g_total:

        outside S   dz_v = softmax_outside_v (g_tail - C s) + g_total [v < V'],   s = exp(log_tail)
        at id j     + g_j, and inside S also - C q_j

    all of it divided by T.
    """

    ids_RU: Tensor
    at_ids_RU: Tensor
    scale_R: Tensor
    each_R: Tensor | None
    sum_vocab: int
    empty_R: Tensor | None = None

    @classmethod
    def of(
        cls,
        grad_RU: Tensor,
        grad_tail_R: Tensor | None,
        grad_total_R: Tensor | None,
        ids_RU: Tensor,
        logprobs_RU: Tensor,
        log_tail_R: Tensor,
        num_excluded: int,
        sum_vocab: int,
        factor: float | Tensor,
    ) -> LogitGradient:
        """`logprobs` must be -inf and `grad` 0 at padding; `factor` multiplies everything."""
        common_R = grad_RU.sum(-1)
        if grad_total_R is not None:
            common_R = common_R + sum_vocab * grad_total_R
        outside_R = -common_R
        if grad_tail_R is not None:
            common_R = common_R + grad_tail_R
            outside_R = grad_tail_R - common_R * log_tail_R.exp()
            inside_RS = common_R[:, None] * logprobs_RU[:, :num_excluded].exp()
            grad_RU = torch.cat(
                [grad_RU[:, :num_excluded] - inside_RS, grad_RU[:, num_excluded:]], -1
            )
        return cls(
            ids_RU,
            grad_RU * factor,
            outside_R * factor,
            None if grad_total_R is None else grad_total_R * factor,
            sum_vocab,
        )

    def write(self, softmax_CV: Tensor, part: slice) -> None:
        """Turn the softmax of rows `part` into their gradient, in place."""
        softmax_CV.mul_(self.scale_R[part, None])
        if self.empty_R is not None:
            empty_C = self.empty_R[part].nonzero()[:, 0]
            if empty_C.numel():
                softmax_CV.index_fill_(0, empty_C, 0.0)
        if self.each_R is not None:
            softmax_CV[:, : self.sum_vocab].add_(self.each_R[part, None])
        softmax_CV.scatter_add_(-1, self.ids_RU[part], self.at_ids_RU[part])


def refuse_second_derivative() -> None:
    """Inside a backward pass, gradients are on only under create_graph=True.

    torch's once_differentiable would pass the result off as a constant, because the incoming
    gradients seldom depend on anything.
    """
    if torch.is_grad_enabled():
        raise UsageError(
            "bad-argument",
            "this loss forms its gradient in advance and has no second derivative",
            where="create_graph",
            got=True,
            hint="under torch.compile, or from dense targets, forward_kl has one",
        )


def graph_is_kept() -> bool:
    """True when the running backward pass has retain_graph=True (or torch cannot tell)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _from_plain_operators(
    student_RV: Tensor,
    ids_RU: Tensor,
    mask_R: Tensor,
    num_excluded: int,
    sum_vocab: int,
    temperature: float,
) -> SparseLogprobs:
    """The same values and gradients from differentiable torch operators."""
    logits_RV = at_least_float32(student_RV).masked_fill(~mask_R[:, None], 0.0) / temperature
    lse_R = torch.logsumexp(logits_RV, -1)
    skip_RU = (ids_RU < 0) | ~mask_R[:, None]
    at_ids_RU = logits_RV.gather(-1, _without_padding(ids_RU))
    logprobs_RU = (at_ids_RU - lse_R[:, None]).masked_fill(skip_RU, 0.0)
    log_tail_R = total_R = torch.zeros_like(lse_R)
    if num_excluded:
        # Padding marks a column past the vocabulary.
        num_rows, vocab = logits_RV.shape
        marks_RS = ids_RU[:, :num_excluded].masked_fill(ids_RU[:, :num_excluded] < 0, vocab)
        inside_RV = torch.zeros(num_rows, vocab + 1, dtype=torch.bool, device=marks_RS.device)
        inside_RV = inside_RV.scatter(-1, marks_RS, True)[:, :vocab]
        outside_RV = logits_RV.masked_fill(inside_RV, -torch.inf)
        log_tail_R = (torch.logsumexp(outside_RV, -1) - lse_R).masked_fill(~mask_R, 0.0)
    if sum_vocab:
        total_R = (logits_RV[:, :sum_vocab].sum(-1) - sum_vocab * lse_R).masked_fill(~mask_R, 0.0)
    return SparseLogprobs(logprobs_RU, log_tail_R, total_R)
