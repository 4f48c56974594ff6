"""Cross-entropy with the labels: the baseline beside every distillation loss."""

from __future__ import annotations

from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss, reduce
from logitstore.losses.sparse_target import label_target
from logitstore.targets import Targets

__all__ = ["cross_entropy"]


@loss(
    signals={"dense": "exact", "topk": "exact", "sampled": "exact", "threshold": "exact"},
    needs_labels=True,
    source="the negative log-likelihood of the next token",
    aliases=("ce",),
)
def cross_entropy(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """-log q(label), nats: what `F.cross_entropy` computes, at about a third of its time and
    memory.

    Args:
        student_logits: float [..., V], raw logits, no shift.
        targets: any per-position targets; only their shape is looked at.
        labels: int64 [...], the realised next tokens (`batch.labels`).
        mask: bool [...], positions that count; default: labels other than `ignore_index`.
        ignore_index: label of positions without a next token.
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: TargetsError label-missing, shape-mismatch, empty-mask.
    """
    rows = align(student_logits, targets, labels, mask, ignore_index=ignore_index, upcast=False)
    loss_R = label_target(rows, "cross_entropy").loss(rows.student_RV, rows.mask_R)
    return reduce(loss_R, rows, reduction, with_count)
