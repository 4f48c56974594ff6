"""Linkless link prediction: ranks and distributions over context nodes of an anchor.

Language reading: an anchor is a position, its contexts are the stored ids, its scores log-probs.

Letters: N rows (anchors) that count, V vocabulary, C contexts, P pairs of contexts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss
from logitstore.losses.positions import Positions, counted_positions
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import PAD_ID, DenseTargets, ScoresTargets, Targets, TopKTargets

__all__ = ["llp_distribution", "llp_rank"]

_SOURCE = "arXiv:2210.05801 (ICML 2023); language reading derived for this project"


@loss(
    signals={"dense": "exact", "scores": "exact", "topk": "exact", "threshold": "exact"},
    source=_SOURCE,
)
def llp_rank(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    margin: float = 0.1,
    subtract_floor: bool = False,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over anchors of the mean over pairs i < j of max(0, m - r_ij (s_i - s_j)).

    r_ij is +1 where the teacher's score t_i > t_j + m, -1 where t_i < t_j - m, else 0: one m is
    both the tie threshold and the hinge margin. A tied pair adds the constant m without a gradient,
    a floor of m times the share of ties; `subtract_floor` leaves it out so that runs can be
    compared.

    Args:
        student_logits: float [..., C] scores of the stored candidates for `scores` targets (the
            released code scores with a sigmoid); float [..., V] logits for topk and threshold,
            whose stored ids (threshold: the exact head), always-ids included, are the contexts, and
            for dense, where all V ids are.
        targets: dense, scores, topk or threshold. Exact on the stored contexts. Dense ones are for
            small label sets: there are V (V - 1) / 2 pairs.
        labels: only used to ignore positions (label -100) when there is no mask.
        mask: bool [...], anchors that count. Contexts are masked by id -1: their pairs are dropped.
        margin: m. The released code has 0.1 and searches 0.05, 0.1, 0.2.
        subtract_floor: tied pairs add 0.

    An anchor with fewer than two contexts contributes 0. Where anchors have different numbers of
    contexts, each anchor's pairs are averaged first.

    Raises: TargetsError shape-mismatch, empty-mask; UsageError bad-argument.

    Published code and our choice: one anchor or one pair collapses its dimensions by `squeeze`,
        here it
    does not; its random contexts may repeat or be the anchor, which is the store's affair.

    Source: arXiv:2210.05801, rank-based matching; code snap-research/linkless-link-prediction.
    """
    if margin < 0:
        raise UsageError("bad-argument", "margin is a distance", got=margin, expected=">= 0")
    at = _anchors(student_logits, targets, labels, mask)
    student_NC, teacher_NC, valid_NC = _context_scores(at)
    i_P, j_P = torch.triu_indices(
        teacher_NC.shape[-1], teacher_NC.shape[-1], offset=1, device=teacher_NC.device
    )
    teacher_NC = torch.where(valid_NC, teacher_NC, 0.0)
    above_NP = teacher_NC[:, i_P] > teacher_NC[:, j_P] + margin
    below_NP = teacher_NC[:, i_P] < teacher_NC[:, j_P] - margin
    sign_NP = above_NP.to(at.dtype) - below_NP.to(at.dtype)
    gap_NP = student_NC[:, i_P] - student_NC[:, j_P]
    hinge_NP = torch.relu(margin - sign_NP * gap_NP)
    counts_NP = valid_NC[:, i_P] & valid_NC[:, j_P]
    value_NP = torch.where(counts_NP & (sign_NP != 0), hinge_NP, 0.0)
    if not subtract_floor:
        value_NP = torch.where(counts_NP & (sign_NP == 0), margin, value_NP)
    loss_N = value_NP.sum(-1) / counts_NP.sum(-1).clamp_min(1)
    return at.reduce(loss_N, reduction, with_count)


@loss(
    signals={"dense": "exact", "scores": "exact", "topk": "exact", "threshold": "exact"},
    source=_SOURCE,
)
def llp_distribution(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over anchors of T^2 KL(softmax(t / T) || softmax(s / T)) over the contexts, nats.

    On topk targets at T = 1 this is `forward_kl(missing="renormalize_both")`: both sides
    renormalised over the stored ids, the student's tail free. Softening needs no `lse_at` here,
    because the normaliser runs over the contexts only.

    Args:
        student_logits: as in `llp_rank`.
        targets: dense, scores, topk or threshold (its exact head).
        labels: only used to ignore positions (label -100) when there is no mask.
        mask: bool [...], anchors that count. Contexts are masked by id -1.
        temperature: T, tau of the paper (1 in the released code).

    The released code takes the softmax over sigmoid outputs, which is almost flat (largest over
    smallest probability at most e), so the term is small; pass sigmoid scores to reproduce it, raw
    scores for a sharper target. An anchor without contexts contributes 0.

    Raises: TargetsError shape-mismatch, empty-mask; UsageError bad-argument.
    Source: arXiv:2210.05801, distribution-based matching; code
        snap-research/linkless-link-prediction.
    """
    if not temperature > 0:
        raise UsageError("bad-argument", "temperature must be positive", got=temperature)
    at = _anchors(student_logits, targets, labels, mask)
    student_NC, teacher_NC, valid_NC = _context_scores(at)
    log_p_NC = _log_softmax_over(teacher_NC / temperature, valid_NC)
    log_q_NC = _log_softmax_over(student_NC / temperature, valid_NC)
    # 0 log 0 = 0.
    counts_NC = valid_NC & (log_p_NC.exp() > 0)
    kl_NC = torch.where(counts_NC, log_p_NC.exp() * (log_p_NC - log_q_NC), 0.0)
    return at.reduce(temperature**2 * kl_NC.sum(-1), reduction, with_count)


def _anchors(
    student_logits: Tensor, targets: Targets, labels: Tensor | None, mask: Tensor | None
) -> Positions:
    if isinstance(targets, ScoresTargets):
        if student_logits.shape[-1] != targets.ids.shape[-1]:
            raise TargetsError(
                "shape-mismatch",
                "scores targets need one student score per stored candidate",
                got=f"student_logits {list(student_logits.shape)}",
                expected=f"last axis {targets.ids.shape[-1]}",
                hint="score targets.ids with the student's predictor",
            )
        # The last axis counts candidates, not the vocabulary their ids come from.
        targets = dataclasses.replace(targets, vocab_size=student_logits.shape[-1])
    return counted_positions(align(student_logits, targets, labels, mask, upcast=False))


def _context_scores(at: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher scores [N, C] in `at.dtype`, and which contexts there are."""
    targets = at.targets
    if isinstance(targets, ScoresTargets):
        valid_NC = targets.valid()
        student_NC, teacher_NC = at.student_NV, targets.scores
    elif isinstance(targets, DenseTargets):
        student_NC, teacher_NC = at.student_NV[:, : targets.vocab_size], targets.logits
        valid_NC = teacher_NC > -torch.inf
    else:
        assert isinstance(targets, TopKTargets)
        # An id that cannot occur is no context.
        valid_NC = (targets.ids != PAD_ID) & (targets.logprobs > -torch.inf)
        student_NC = at.student_NV.gather(-1, targets.ids.clamp_min(0))
        teacher_NC = targets.logprobs
    student_NC = torch.where(valid_NC, student_NC.to(at.dtype), 0.0)
    return student_NC, teacher_NC.to(at.dtype), valid_NC


def _log_softmax_over(scores_NC: Tensor, valid_NC: Tensor) -> Tensor:
    """log-softmax over the valid contexts; a row without any is left uniform, to be ignored."""
    absent_NC = ~valid_NC & valid_NC.any(-1, keepdim=True)
    finite_NC = torch.where(valid_NC, scores_NC, 0.0)
    return torch.log_softmax(finite_NC.masked_fill(absent_NC, -torch.inf), -1)
