"""Distillation from unbiased sparse weights: RS-KD samples and threshold samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, align, loss, reduce, require
from logitstore.losses.sparse_target import sparse_target
from logitstore.spec.errors import UsageError
from logitstore.targets import Targets

__all__ = ["random_sampling_kd", "threshold_kd"]

Value = Literal["kl", "unbiased", "cross_entropy"]


@loss(
    signals={"sampled": "unbiased"},
    source="Sparse Logit Sampling, arXiv:2503.16870, section 4",
    aliases=("rs_kd", "rskd", "sparse_logit_sampling"),
)
def random_sampling_kd(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    value: Value = "kl",
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """sum_i w_i (log w_i - log q_i) over the ids drawn at capture, w = counts / rounds, nats.

    Logit gradient (sum w) q - w, whose expectation over draws is the full one, q - p. With power
    other
    than 1 the weights are importance weights: still unbiased, but their sum varies.

    Args:
        student_logits: float [..., V], raw logits, no shift.
        targets: sampled targets of the same positions. They cannot be softened: (c/N)^(1/T) is
            biased.
        labels: unused but for the mask: without `mask`, -100 masks.
        mask: bool [...], positions that count.
        value: all three have the same gradient.
            "kl": KL(w || q), never negative, but above KL(p || q) on average (Jensen);
            "unbiased": -sum w log q - H(p) with the stored entropy, equal to KL(p || q) on average;
            "cross_entropy": -sum w log q.
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: TargetsError targets-mismatch, aux-missing (entropy), shape-mismatch, empty-mask.

    Traps elsewhere: the authors released no code; what is called RS-KD in public is sometimes a
    top-K list with a ghost bucket, or takes the paper's 12 (unique ids) for the number of rounds
    (50), or renormalises p over the sampled set, which is another, biased estimator.
    """
    return _weighted_kd(
        "random_sampling_kd", student_logits, targets, labels, mask, value, reduction, with_count
    )


@loss(
    signals={"threshold": "unbiased"},
    source="Fearnhead & Clifford 2003; Szegedy & Thorup 2007; arXiv:0803.0473",
    aliases=("threshold_sampling_kd",),
)
def threshold_kd(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    value: Value = "kl",
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """sum_i w_i (log w_i - log q_i) over the stored ids: w = p in the head, tau in the sampled
    tail, nats.

    The arithmetic of `random_sampling_kd`, because both records are weights with E[w] = p and a
    weighted cross-entropy is all that such weights serve without bias. What differs is the noise:
    threshold sampling has the smallest E||w - p||^2 of all unbiased schemes that store as many ids
    on average, and its weights sum to exactly 1, so that the gradient is q - w.

    Args, raises: as `random_sampling_kd`, with threshold targets.
    """
    return _weighted_kd(
        "threshold_kd", student_logits, targets, labels, mask, value, reduction, with_count
    )


def _weighted_kd(
    name: str,
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    value: Value,
    reduction: Reduction,
    with_count: bool,
) -> Tensor | LossAndCount:
    rows = align(student_logits, targets, labels, mask, upcast=False)
    target = sparse_target(rows, name, "none")
    loss_R = target.loss(rows.student_RV, rows.mask_R)
    if value in ("cross_entropy", "unbiased"):
        loss_R = loss_R - target.constant
        if value == "unbiased":
            entropy = require(rows.targets, "entropy", f"{name} with value='unbiased'")
            loss_R = loss_R - torch.where(rows.mask_R, rows.per_row(entropy), 0.0)
    elif value != "kl":
        raise UsageError(
            "bad-argument",
            f"{name}: unknown value",
            where="value",
            got=value,
            expected="kl, unbiased, cross_entropy",
        )
    return reduce(loss_R, rows, reduction, with_count)
