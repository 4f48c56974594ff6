"""Sinkhorn distance between the student's and the teacher's rows of a batch.

Letters: N rows that count, V vocabulary or classes, K stored ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss
from logitstore.losses.positions import counted_positions, dense_logits, tempered_logprobs
from logitstore.losses.sequences import in_row_chunks
from logitstore.losses.sorted_probs import Tail
from logitstore.spec.errors import UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["sinkhorn"]


@loss(
    signals={"dense": "exact", "topk": "approximate"},
    missing={"topk": ("bucket", "zero")},
    source="arXiv:2402.17110 (LREC-COLING 2024), released code; top-K form derived here",
    aliases=("sinkd",),
)
def sinkhorn(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iterations: int = 20,
    detach_plan: bool = False,
    missing: Tail = "bucket",
    reduction: Reduction = "sum",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """sum_ij P_ij W_ij, W_ij = ||softmax(zs_i / T) - softmax(zt_j / T)||_1, over counted rows.

    P starts as exp(-W / epsilon); each iteration scales rows to sum 1, then columns to sum 1, in
    the log domain. All counted rows of the call form one transport problem, so its size is part of
    the loss: batches cannot be split, and the sum grows with the number of rows.

    From `topk` targets W_ij = sum over teacher j's stored ids of |q_i - p_j| + tail, which lies in
    [|s_ij - r_j|, s_ij + r_j], s_ij the student's mass on other ids and r_j the teacher's. "bucket"
    takes the lower end (each W_ij too low by at most 2 min(s_ij, r_j)), "zero" takes s_ij. These
    are bounds of the entries of W, not of the distance, and at T = 2 residuals are large.

    Args:
        student_logits: float [..., V], usually [N, classes]. A sequence's counted rows are rows
            like any other: cost is O(N^2 V), so mask to a few hundred.
        targets: dense, or topk with `lse` and `lse_at[temperature]` (capture with --lse-at 2).
        labels, mask: which rows count, as in every loss; others are outside the transport problem.
        temperature, epsilon, num_iterations: 2, 0.1, 20 as released.
        detach_plan: treat P as constant; as released the gradient flows through all iterations
            (the two differ by 2 to 47 % of the largest entry on the reference cases).
        missing: "bucket" or "zero", topk only.
        reduction: "sum" is the published distance; "mean" divides it by the number of rows;
            "none" gives each student row's sum_j P_ij W_ij.

    Raises: TargetsError aux-missing, missing-not-allowed, shape-mismatch, empty-mask.

    Published use and our choice: scaled by 0.001 (GLUE) or 0.0008 (T0, GPT-Neo) there, unscaled
    here. The GLUE loop builds this loss under one option and adds it under another, so that most
    shipped commands never use it; the generative scripts pass [B, L, V] and thereby normalise over
    positions and over the batch, which is not copied; padding rows are not masked there.

    Source: arXiv:2402.17110, section 3; 2018cx/SinKD.
    """
    if temperature <= 0 or epsilon <= 0 or num_iterations < 1:
        raise UsageError(
            "bad-argument",
            "sinkhorn needs a positive temperature and epsilon and at least one iteration",
            got=f"{temperature}, {epsilon}, {num_iterations}",
        )
    at = counted_positions(align(student_logits, targets, labels, mask))
    student_NV = at.student_NV
    if isinstance(at.targets, DenseTargets):
        q_NV = torch.softmax(student_NV / temperature, -1)
        p_NV = torch.softmax(dense_logits(at) / temperature, -1)
        cost_NN = torch.cdist(q_NV, p_NV, p=1)
    else:
        assert isinstance(at.targets, TopKTargets)
        cost_NN = _cost_to_stored(student_NV, at.targets, temperature, missing)
    plan_NN = _plan(cost_NN.detach() if detach_plan else cost_NN, epsilon, num_iterations)
    return at.reduce((plan_NN * cost_NN).sum(-1), reduction, with_count)


def _plan(cost_NN: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    log_plan_NN = -cost_NN / epsilon
    for _ in range(num_iterations):
        log_plan_NN = log_plan_NN - torch.logsumexp(log_plan_NN, 1, keepdim=True)
        log_plan_NN = log_plan_NN - torch.logsumexp(log_plan_NN, 0, keepdim=True)
    return log_plan_NN.exp()


def _cost_to_stored(
    student_NV: Tensor, targets: TopKTargets, temperature: float, missing: Tail
) -> Tensor:
    held_NK = targets.ids != PAD_ID
    logprobs_NK = at_least_float32(targets.logprobs)
    p_NK = tempered_logprobs(logprobs_NK, targets, temperature, "sinkhorn").exp()
    p_NK = p_NK.masked_fill(~held_NK, 0.0).to(student_NV.dtype)
    if temperature == 1 and targets.log_tail is not None:
        tail_N = targets.log_tail.to(p_NK.dtype).exp()
    else:
        # Enters linearly: the rounding of 1 - sum is harmless here.
        tail_N = (1 - p_NK.sum(-1)).clamp_min(0)
    # Student probabilities of every id that any teacher row stores, gathered once.
    ids_U, slot_NK = torch.unique(targets.ids.clamp_min(0), return_inverse=True)
    lse_N1 = torch.logsumexp(student_NV / temperature, -1, keepdim=True)
    q_UN = (student_NV[:, ids_U] / temperature - lse_N1).exp().T
    num_rows = student_NV.shape[0]
    complete_N = held_NK.sum(-1) >= student_NV.shape[-1]

    def of_teacher_rows(
        slot_nK: Tensor, p_nK: Tensor, held_nK: Tensor, tail_n: Tensor, complete_n: Tensor
    ) -> Tensor:
        q_nKN = q_UN[slot_nK]
        head_nN = torch.where(held_nK[..., None], (q_nKN - p_nK[..., None]).abs(), 0.0).sum(1)
        rest_nN = (1 - torch.where(held_nK[..., None], q_nKN, 0.0).sum(1)).clamp_min(0)
        # Nothing is left of either side when every id is stored.
        rest_nN = rest_nN.masked_fill(complete_n[:, None], 0.0)
        tail_nN = rest_nN if missing == "zero" else (rest_nN - tail_n[:, None]).abs()
        return head_nN + tail_nN

    tail_N = tail_N.masked_fill(complete_N, 0.0)
    width = targets.k * num_rows
    return in_row_chunks(of_teacher_rows, width, slot_NK, p_NK, held_NK, tail_N, complete_N).T
