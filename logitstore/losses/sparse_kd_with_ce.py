"""Label cross-entropy and distillation in one pass over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from logitstore.losses.contract import (
    LossAndCount,
    Missing,
    Reduction,
    align,
    loss,
    reduce,
)
from logitstore.losses.cross_entropy import cross_entropy
from logitstore.losses.kl import forward_kl
from logitstore.losses.sparse_target import kd_and_ce_target
from logitstore.targets import Targets

__all__ = ["sparse_kd_with_ce"]


@loss(
    signals={"dense": "exact", "topk": "bounded", "sampled": "unbiased", "threshold": "unbiased"},
    missing={"topk": ("ghost", "renormalize", "none", "uniform", "uniform_all", "label")},
    needs_labels=True,
    source="the mixture of Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2",
    aliases=("kd_with_ce", "ce_and_kd"),
)
def sparse_kd_with_ce(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    missing: Missing = "ghost",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """ce_weight * cross_entropy + kd_weight * forward_kl: the same value and gradient, in one pass.

    The label is one more weighted id beside the teacher's, so both terms share one softmax and one
    gradient. Dense targets, and T other than 1, need two passes and get them.

    Args:
        student_logits: float [..., V], raw logits, no shift.
        targets: topk, sampled, threshold or dense targets of the same positions.
        labels: int64 [...], realised next tokens.
        mask: bool [...], positions that count, for both terms; default: labels other than -100.
        ce_weight, kd_weight: not negative; they need not sum to 1.
        missing: as `forward_kl`; renormalize_both is not a cross-entropy over the whole vocabulary
            and is refused: add the two losses yourself.
        temperature: T of the distillation term only, with its factor T^2.
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: as forward_kl and cross_entropy; UsageError bad-argument for a negative weight.
    """
    rows = align(student_logits, targets, labels, mask, upcast=False)
    if targets.signal == "dense" or temperature != 1.0:
        ce_R = cross_entropy(student_logits, targets, labels=labels, mask=mask, reduction="none")
        kd_R = forward_kl(
            student_logits,
            targets,
            labels=labels,
            mask=mask,
            missing=missing,
            temperature=temperature,
            reduction="none",
        )
        loss_R = (ce_weight * ce_R + kd_weight * kd_R).reshape(-1)
    else:
        target = kd_and_ce_target(rows, "sparse_kd_with_ce", missing, ce_weight, kd_weight)
        loss_R = target.loss(rows.student_RV, rows.mask_R)
    return reduce(loss_R, rows, reduction, with_count)
