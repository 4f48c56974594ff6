"""Plackett-Luce distillation: a ranking loss over the teacher's order with the label first.

Letters: N rows that count, V vocabulary, K stored ids, M ranked ids (M = V dense, K + 1 sparse).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss
from logitstore.losses.positions import (
    Positions,
    counted_positions,
    dense_logits,
    tempered_logprobs,
)
from logitstore.losses.sparse_logprobs import refuse_second_derivative, sparse_logprobs
from logitstore.spec.errors import TargetsError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets

__all__ = ["pld"]


@loss(
    signals={"dense": "exact", "topk": "bounded", "threshold": "bounded"},
    needs_labels=True,
    source="arXiv:2506.12542 (NeurIPS 2025); truncated form derived for this project",
    aliases=("plackett_luce",),
)
def pld(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    teacher_temperature: float = 1.0,
    renormalize: bool = False,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over rows of sum_k alpha_k (logsumexp_{l >= k} z[pi_l] - z[pi_k]), nats.

    pi is the label followed by the other ids in descending teacher order, alpha_k the teacher's
    probability of pi_k at `teacher_temperature` (tau_T). The label is inside: no separate
    cross-entropy, no mixing weight.

    From `topk` targets, and from the exact head of `threshold` targets, the sum stops after the
    label and the stored ids; ids outside enter every denominator through the student's own
    logsumexp. With r' the teacher mass that is neither label nor stored, the L1 norm of the missing
    gradient is at most 2 r' per row. The *value* is not close: with a flat student tail,
    r' (log(V - M) - 1) is missing from it, M ids being ranked. An always-id that a top-K list lacks
    has no known rank and counts to r'; beside a threshold head it is ranked by its probability, and
    counts to r' where that is below the head's.

    Args:
        student_logits: float [..., V].
        targets: dense, topk or threshold. A label that is not among the stored ids needs
            `label_logprob`; tau_T != 1 from stored ids needs `lse` and `lse_at[tau_T]`.
        labels: int64 [...], needed wherever `mask` is true; without a mask, -100 does not count.
        mask: bool [...], True counts.
        teacher_temperature: tau_T. 1 was best on ImageNet; the paper's CIFAR-100 recipe uses 4.
        renormalize: rescale the kept alpha of each row to sum to 1. Rescales the loss; off by
            default.

    Raises: TargetsError label-missing, aux-missing (label outside the stored ids), shape-mismatch,
        empty-mask.

    Published listing and our choice: it sorts unstably, here ties go to the lowest id (dense) or
    keep the stored order; it does not show how ignored labels leave, here they do not count. Its
    p-ListMLE weights as printed equal PLD's at tau_T = 1 although its table separates the two;
    p-ListMLE is not offered.

    Source: arXiv:2506.12542, formula and printed listing.
    """
    dense = isinstance(targets, DenseTargets)
    at = counted_positions(
        align(student_logits, targets, labels, mask, upcast=dense),
        labelled="pld",
        always_ids=False,
    )
    if dense:
        ranked_NM, log_alpha_NM, tail_N = _rank_dense(at, teacher_temperature)
    else:
        ranked_NM, log_alpha_NM, tail_N = _rank_stored(at, teacher_temperature)
    if renormalize:
        log_alpha_NM = torch.log_softmax(log_alpha_NM, -1)
    loss_N: Tensor = _PlackettLuce.apply(ranked_NM, log_alpha_NM, tail_N)
    return at.reduce(loss_N, reduction, with_count)


def _rank_dense(at: Positions, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(at.targets, DenseTargets)
    assert at.labels_N is not None
    teacher_NV = dense_logits(at)
    keys_NV = teacher_NV.scatter(-1, at.labels_N[:, None], math.inf)
    order_NV = torch.sort(keys_NV, dim=-1, descending=True, stable=True).indices
    log_alpha_NV = torch.log_softmax(teacher_NV / temperature, -1).gather(-1, order_NV)
    nothing_N = torch.full_like(teacher_NV[:, 0], -math.inf)
    return at.student_NV.gather(-1, order_NV), log_alpha_NV, nothing_N


def _rank_stored(at: Positions, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(at.targets, TopKTargets)
    assert at.labels_N is not None
    dtype = at.dtype
    ids_NK, label_N1 = at.targets.ids, at.labels_N[:, None]
    logprobs_NK = at.targets.logprobs.to(dtype)
    is_label_NK = ids_NK == label_N1
    # A stored label appears once in a row, so the sum of the masked row is its log-prob.
    label_logprob_N = torch.where(is_label_NK, logprobs_NK, 0.0).sum(-1)
    inside_N = is_label_NK.any(-1)
    if at.targets.label_logprob is not None:
        label_logprob_N = torch.where(inside_N, label_logprob_N, at.targets.label_logprob.to(dtype))
    elif not bool(inside_N.all()):
        raise TargetsError(
            "aux-missing",
            "pld needs the teacher's probability of labels that are not among the stored ids",
            got=f"{int((~inside_N).sum())} of {inside_N.numel()} rows with such a label",
            hint="capture with --aux label_logprob, or with a greater K",
        )
    log_alpha_NM = tempered_logprobs(
        torch.cat([label_logprob_N[:, None], logprobs_NK], -1), at.targets, temperature, "pld"
    )
    # The label keeps its first rank only; its stored slot and padding leave the list.
    absent_NK = is_label_NK | (ids_NK == PAD_ID)
    absent_NM = torch.nn.functional.pad(absent_NK, (1, 0))
    ranked_ids_NM = torch.cat([label_N1, ids_NK], -1).masked_fill(absent_NM, PAD_ID)
    everywhere_N = torch.ones_like(inside_N)
    student = sparse_logprobs(
        at.student_NV, ranked_ids_NM, everywhere_N, num_excluded=ranked_ids_NM.shape[-1]
    )
    ranked_NM = student.logprobs.masked_fill(absent_NM, -math.inf)
    return ranked_NM, log_alpha_NM.masked_fill(absent_NM, -math.inf), student.log_tail


class _PlackettLuce(torch.autograd.Function):
    """sum_k alpha_k (suffix_k - z_k), suffix_k = logsumexp(z_k, z_{k+1}, ..., tail), per row.

    The gradient is formed in the forward pass, in the log domain:
    d/dz_i = exp(z_i + logsumexp_{k <= i}(log alpha_k - suffix_k)) - alpha_i. Every exponent is <= 0
    because suffix_k >= z_i for k <= i. An id with z = -inf and alpha = 0 is not in the list.
    """

    @staticmethod
    def forward(ctx: Any, ranked_NM: Tensor, log_alpha_NM: Tensor, tail_N: Tensor) -> Tensor:
        # The loss is shift-invariant; a row maximum of 0 keeps small differences exact at gaps of
        # 1e4.
        chain_NM1 = torch.cat([ranked_NM, tail_N[:, None]], -1)
        chain_NM1 = chain_NM1 - chain_NM1.amax(-1, keepdim=True)
        suffix_NM = chain_NM1.flip(-1).logcumsumexp(-1).flip(-1)[:, :-1]
        # alpha that underflows to 0 has no say, and keeps 0 * inf away from absent ids.
        alpha_NM = log_alpha_NM.exp()
        counts_NM = alpha_NM > 0
        step_NM = torch.where(counts_NM, suffix_NM - chain_NM1[:, :-1], 0.0)
        reach_NM = torch.where(counts_NM, log_alpha_NM - suffix_NM, -math.inf).logcumsumexp(-1)
        ctx.save_for_backward(
            (chain_NM1[:, :-1] + reach_NM).exp_().sub_(alpha_NM),
            (chain_NM1[:, -1] + reach_NM[:, -1]).exp(),
        )
        return (alpha_NM * step_NM).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, Tensor]:
        refuse_second_derivative()
        grad_NM, grad_tail_N = ctx.saved_tensors
        return grad_NM * grad_N[:, None], None, grad_tail_N * grad_N
