"""LM head and loss in one: the logits of all positions never exist together.

Rows that count are taken in chunks: logits of the chunk, loss, gradient in the logits (in place),
and its products with the head and the hidden states. Only those products are kept.

Letters: R rows, L rows that count, C rows of a chunk, D hidden size, V vocabulary (of this rank), U
ids.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from logitstore.losses.contract import (
    LossAndCount,
    Missing,
    Reduction,
    Rows,
    align,
)
from logitstore.losses.sparse_kd_with_ce import sparse_kd_with_ce
from logitstore.losses.sparse_logprobs import (
    LogitGradient,
    SparseLogprobs,
    chunk_rows,
    graph_is_kept,
    refuse_second_derivative,
    softmax_outside,
)
from logitstore.losses.sparse_target import SparseTarget, kd_and_ce_target
from logitstore.losses.tensor_parallel import VocabularyShard
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import Targets

__all__ = ["fused_linear_kd"]


@overload
def fused_linear_kd(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Targets,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    missing: Missing = "ghost",
    reduction: Reduction = "mean",
    with_count: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...


@overload
def fused_linear_kd(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Targets,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    missing: Missing = "ghost",
    reduction: Reduction = "mean",
    with_count: Literal[True],
    group: dist.ProcessGroup | None = None,
) -> LossAndCount: ...


def fused_linear_kd(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Targets,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    missing: Missing = "ghost",
    reduction: Reduction = "mean",
    with_count: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | LossAndCount:
    """`sparse_kd_with_ce(hidden @ lm_head_weight.T + bias, ...)` without forming [B, T, V].

    Value and gradients (hidden, weight, bias) are those of the unfused loss. Memory beyond hidden,
    weight and their gradients is one chunk of logits (128 MiB of float32 on a CPU, 256 MiB
    elsewhere). Rows that do not count cost nothing.

    Args:
        hidden: float [..., D], the states that go into the LM head.
        lm_head_weight: float [V, D]; a padded vocabulary (V above the teacher's) is fine.
        targets: topk, sampled or threshold targets of the same positions.
        labels: int64 [...], realised next tokens; may be absent when ce_weight is 0.
        bias: float [V] or None.
        mask: bool [...], positions that count; default: labels other than -100.
        ce_weight: weight of the label's cross-entropy.
        kd_weight: weight of forward KL; 0 makes this a fused cross-entropy.
        missing: treatment of the mass outside a top-K list, as in `sparse_kd_with_ce`.
        reduction: mean over counted positions, or sum. The gradient is formed in the forward pass,
            so "none" does not exist here.
        with_count: also return how many positions count.
        group: tensor parallelism: each rank passes its consecutive rows of the head (and of bias),
            in rank order, and the same hidden, targets, labels and mask. Every rank gets the whole
            loss and the whole gradient in hidden (already summed over ranks: do not wrap hidden in
            another all-reduce), and the gradient of its own rows of the head.

    Raises: as sparse_kd_with_ce; TargetsError shape-mismatch when hidden and head disagree;
        UsageError bad-argument for reduction="none".

    Numerics: matrix products in the dtype of hidden and weight (the autocast dtype under autocast),
    softmax and the weight gradient's sum in float32 at least. Gradient once; a second derivative is
    refused. Untested on GPUs.
    """
    if reduction not in ("mean", "sum"):
        raise UsageError(
            "bad-argument",
            "fused_linear_kd forms the gradient in the forward pass and reduces there",
            where="reduction",
            got=reduction,
            expected="mean, sum",
            hint="use sparse_kd_with_ce on the logits for one value per position",
        )
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden.shape[-1]:
        raise TargetsError(
            "shape-mismatch",
            "hidden and lm_head_weight disagree",
            got=f"hidden {list(hidden.shape)}, lm_head_weight {list(lm_head_weight.shape)}",
            expected="hidden [..., D] and lm_head_weight [V, D]",
        )
    shard = VocabularyShard.of(lm_head_weight.shape[0], group, hidden.device)
    # Shapes and masks are checked against logits that take no memory.
    stand_in = hidden.new_zeros(1).expand(*hidden.shape[:-1], shard.total)
    rows = align(stand_in, targets, labels, mask, upcast=False)
    target = _target(rows, missing, ce_weight, kd_weight)
    count = rows.mask_R.sum()
    live_L = rows.mask_R.nonzero()[:, 0]
    wanted = torch.is_grad_enabled()
    hidden, weight = _under_autocast(hidden), _under_autocast(lm_head_weight)
    bias = None if bias is None else _under_autocast(bias)
    loss: Tensor = _apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        live_L,
        target.take(live_L),
        shard,
        1.0 / live_L.numel() if reduction == "mean" else 1.0,
        _Wanted(*(wanted and x is not None and x.requires_grad for x in (hidden, weight, bias))),
    )
    return LossAndCount(loss, count) if with_count else loss


def _target(rows: Rows, missing: str, ce_weight: float, kd_weight: float) -> SparseTarget:
    if rows.targets.signal == "dense":
        raise TargetsError(
            "targets-mismatch",
            "fused_linear_kd needs sparse targets: dense ones already hold [B, T, V]",
            got="dense",
            expected="topk, sampled, threshold",
        )
    info = sparse_kd_with_ce.info
    info.check_signal(rows.targets.signal)
    info.check_missing(rows.targets.signal, missing)
    return kd_and_ce_target(rows, "fused_linear_kd", missing, ce_weight, kd_weight)


def _under_autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts the inputs of a linear layer; autograd casts the gradient back."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(*args: Any) -> Any:
    """A chunked loop with matrix products inside gains nothing from the compiler."""
    return _FusedLinear.apply(*args)


class _Wanted(NamedTuple):
    """Which gradients are asked for; inside a Function it cannot be seen."""

    hidden: bool
    weight: bool
    bias: bool


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        live_L: Tensor,
        target: SparseTarget,
        shard: VocabularyShard,
        factor: float,
        wanted: _Wanted,
    ) -> Tensor:
        dtype = target.weights.dtype
        hidden_LD = hidden_RD[live_L]
        num_rows, vocab = len(live_L), shard.size
        # Products in the dtype of the inputs, sums over chunks in at least float32.
        grad_hidden_LD = torch.zeros_like(hidden_LD, dtype=dtype) if wanted.hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted.weight else None
        grad_bias_V = weight_VD.new_zeros(vocab, dtype=dtype) if wanted.bias else None
        total = hidden_RD.new_zeros((), dtype=dtype)
        rows = chunk_rows(num_rows, shard.largest, hidden_RD.device)
        # Ids that are not here are read and written in the columns past the end; 16 of them keep
        # rows aligned for the matrix products.
        buffer_CV = hidden_RD.new_empty((rows, vocab + 16), dtype=dtype)
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            padded_CV = buffer_CV[: part.stop - start]
            logits_CV = padded_CV[:, :vocab]
            hidden_CD = hidden_LD[part]
            if hidden_CD.dtype == dtype:
                torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
            else:
                logits_CV.copy_(hidden_CD @ weight_VD.t())
            if bias_V is not None:
                logits_CV += bias_V
            padded_CV[:, vocab:] = -torch.inf
            loss_C = _loss_and_gradient(padded_CV, target.take(part), shard)
            total += loss_C.sum()
            grad_CV = logits_CV.to(hidden_CD.dtype)
            if grad_hidden_LD is not None:
                grad_hidden_LD[part] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                if hidden_CD.dtype == dtype:
                    grad_weight_VD.addmm_(grad_CV.t(), hidden_CD)
                else:
                    grad_weight_VD += grad_CV.t() @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0)
        if grad_hidden_LD is not None:
            grad_hidden_LD = shard.sum(grad_hidden_LD)
        kept = []
        for gradient in (grad_hidden_LD, grad_weight_VD, grad_bias_V):
            if gradient is not None:
                # Only now: 1 / count inside a product of float16 would underflow.
                gradient.mul_(factor)
                if weight_VD.dtype == torch.bfloat16:
                    gradient = gradient.bfloat16()
            kept.append(gradient)
        ctx.save_for_backward(*kept, live_L)
        ctx.inputs = hidden_RD.shape, hidden_RD.dtype
        return total * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        scale = gradients[0]
        # loss.backward() passes 1: no need to touch the weight's gradient again. Elsewhere than on
        # a CPU looking would wait for the device.
        as_is = scale.device.type == "cpu" and float(scale) == 1.0
        kept = graph_is_kept()
        shape, dtype = ctx.inputs
        *gradients_now, live_L = ctx.saved_tensors
        results: list[Tensor | None] = []
        for x in gradients_now:
            if x is not None and (kept or not as_is):
                x = x * scale if kept else x.mul_(scale)
            # float16 waits for the scale of a gradient scaler before it is rounded to.
            results.append(None if x is None else x.to(dtype))
        if results[0] is not None:
            hidden_LD = results[0]
            results[0] = hidden_LD.new_zeros(shape).index_copy_(0, live_L, hidden_LD)
        return (*results, None, None, None, None, None)


def _loss_and_gradient(padded_CV: Tensor, target: SparseTarget, shard: VocabularyShard) -> Tensor:
    """Loss [C] of logits [C, V + 16], which become their gradient."""
    num_excluded = target.num_excluded
    local_CU = shard.local(target.ids)
    here_CU = local_CU < shard.size
    sum_vocab = 0 if target.background is None else shard.num_below(target.vocab_size)
    logits_CU = padded_CV.gather(-1, local_CU).masked_fill(~here_CU, 0.0)
    total_C = padded_CV[:, :sum_vocab].sum(-1)
    log_here_C = softmax_outside(padded_CV, local_CU[:, :num_excluded], 1.0, padded_CV)
    # What all ranks know: the logits at the ids, the mass outside S, the sum of logits.
    logits_CU = shard.sum(logits_CU)
    log_outside_C = shard.logsumexp(log_here_C)
    pad_CU = target.ids < 0
    lse_C = log_outside_C
    if num_excluded:
        inside_CS = logits_CU[:, :num_excluded].masked_fill(pad_CU[:, :num_excluded], -torch.inf)
        lse_C = torch.logaddexp(log_outside_C, torch.logsumexp(inside_CS, -1))
    student = SparseLogprobs(
        (logits_CU - lse_C[:, None]).masked_fill(pad_CU, 0.0),
        log_outside_C - lse_C if num_excluded else torch.zeros_like(lse_C),
        shard.sum(total_C) - target.vocab_size * lse_C
        if target.background is not None
        else torch.zeros_like(lse_C),
    )
    gradient = LogitGradient.of(
        -target.weights,
        None if target.tail_weight is None else -target.tail_weight,
        None if target.background is None else -target.background,
        local_CU,
        student.logprobs.masked_fill(pad_CU, -torch.inf),
        student.log_tail,
        num_excluded,
        target.vocab_size,
        1.0,
    )
    # The softmax of this rank's columns alone, on the scale of all ranks'.
    gradient.scale_R = gradient.scale_R * (log_here_C - log_outside_C).exp().nan_to_num(0.0)
    gradient.empty_R = torch.isneginf(log_here_C)
    gradient.sum_vocab = sum_vocab
    gradient.write(padded_CV, slice(None))
    return target.loss_of(student)
