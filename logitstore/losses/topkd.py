"""TopKD: teacher logits scaled by rank, matched group by group in direction, and across the batch.

Letters: N rows that count, V classes, K ranks (the method's K), S stored ids per row.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from logitstore.losses.contract import LossAndCount, Reduction, align, loss, require
from logitstore.losses.positions import Positions, counted_positions
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets

__all__ = ["ScaledLogits", "top_scaled_logits", "topkd"]

# Norms below this count as this: a group of zeros has cosine 0, not NaN.
_SMALLEST_NORM = 1e-8


@loss(
    signals={"dense": "exact", "topk": "approximate"},
    missing={"topk": ("tdl_pos",)},
    needs={"topk": ("lse",)},
    needs_labels=True,
    source="arXiv:2508.04539, after secondary accounts; constants and group rules are ours",
    aliases=("top_scaled_kd",),
)
def topkd(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    k: int = 5,
    rank_weights: Tensor | None = None,
    label_factor: float = 2.0,
    delta: float = 0.5,
    alpha: float = 1.0,
    beta: float = 1.0,
    contrastive_weight: float | None = None,
    contrastive: Literal["normalized", "raw"] = "normalized",
    contrastive_teacher: Literal["scaled", "plain"] = "scaled",
    contrastive_temperature: float = 0.5,
    missing: str | None = None,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """TDL + CON: 1 - (alpha cos_Pos + beta cos_Neg + cos_Non), plus a contrastive term, per row.

    TSM first scales the teacher (see `top_scaled_logits`): z' = z w_rank + D on the K largest, z
    times `label_factor` + D on the label where the teacher is wrong, z elsewhere. Then, with
    Pos = K largest of z', Neg = K smallest, Non = the rest, cosines are taken between student and
    z' on each group. CON is the mean of the two cross-entropies of M = student z'^T / tau over the
    rows of the batch against the diagonal; with it a row's value depends on the other rows that
    count.

    A label cross-entropy is *not* added. At a perfect match TDL is -(alpha + beta): negative values
    are normal. Cosines leave each group's norm free, and their gradient falls as 1 / norm.

    From `topk` targets only the first group is exact, so `missing="tdl_pos"` (the one choice)
    computes 1 - alpha cos_Pos, and that is the name to report results under: Neg would need the
    smallest logits, Non with a constant stand-in would only flatten the student's tail, CON from
    stored ids is another loss. The K largest of z' are looked for among stored ids and label, which
    is exact when K scaled logits stay above the smallest stored one (factors >= 1 and top logits >=
    0 suffice); always-ids count as stored. D needs `logit_mean` (unless delta = 0), and a label
    outside the stored ids, where it is scaled, `label_logprob`. For vocabulary-sized V treat TopKD
    as a classification method.

    Args:
        student_logits: float [..., V].
        targets: dense, or topk with `lse`: factors multiply raw logits, and a factor above 1 on a
            negative log-prob would lower the class.
        labels: int64 [...], needed wherever `mask` is true; without a mask, -100 does not count.
        mask: bool [...], True counts.
        k: K; 3, 5 and 10 were best and 50 collapsed in a secondary account. 2 K <= V.
        rank_weights: float [K], factor of rank 1..K; None is linspace(1.5, 1, K). Ours.
        label_factor: factor of the label where argmax z differs from it. Ours.
        delta: D = delta (mean of z over the K largest - mean of the others). Ours.
        alpha, beta: weights of Pos and Neg. Ours.
        contrastive_weight: weight of CON; None is 1 from dense targets and 0 from topk.
        contrastive: "normalized" (L2-normalised rows) or "raw", whose scale follows the logits (it
            overflows half precision near V = 1000, and wants a temperature near 20). Ours.
        contrastive_teacher: "scaled" (z') or "plain" (z). Ours.
        contrastive_temperature: tau. Ours.
        missing: see above.

    No public text gives the constants marked "ours"; they are choices of this project.

    Raises: UsageError bad-argument (2 K > V, K not stored, CON from topk); TargetsError
        aux-missing, label-missing, shape-mismatch, empty-mask, targets-mismatch (a teacher logit
        of -inf).

    Traps: an unrelated TopKD exists (ICML 2024, persistence diagrams), and a face-recognition
    "TopKDLoss" mixes KL, cosine and mass error; neither is this.

    Source: arXiv:2508.04539; no official code.
    """
    dense = isinstance(targets, DenseTargets)
    if contrastive_weight is None:
        contrastive_weight = 1.0 if dense else 0.0
    _check_options(targets, k, rank_weights, contrastive_weight)
    at = counted_positions(
        align(student_logits, targets, labels, mask, upcast=dense),
        labelled="topkd",
        across_rows=contrastive_weight != 0,
    )
    if rank_weights is None:
        rank_weights = torch.linspace(1.5, 1.0, k, dtype=torch.float64)
    weights_K = rank_weights.to(device=at.student_NV.device, dtype=at.dtype)
    if not dense:
        loss_N = 1 - alpha * _stored_pos_cosine(at, weights_K, label_factor, delta)
        return at.reduce(loss_N, reduction, with_count)
    assert isinstance(at.targets, DenseTargets)
    assert at.labels_N is not None
    teacher_NV = at.targets.logits.to(at.dtype)
    student_NV = at.student_NV[:, : teacher_NV.shape[-1]]
    scaled = top_scaled_logits(
        teacher_NV, at.labels_N, rank_weights=weights_K, label_factor=label_factor, delta=delta
    )
    _check_finite(scaled.delta)
    order_NV = torch.sort(scaled.logits, dim=-1, descending=True, stable=True).indices
    loss_N = torch.ones_like(scaled.delta)
    groups = ((alpha, slice(None, k)), (beta, slice(-k, None)), (1.0, slice(k, -k)))
    for weight, group in groups:
        ids_NG = order_NV[:, group]
        cosine_N = _cosine(student_NV.gather(-1, ids_NG), scaled.logits.gather(-1, ids_NG))
        loss_N = loss_N - weight * cosine_N
    if contrastive_weight != 0:
        rows_NV = scaled.logits if contrastive_teacher == "scaled" else teacher_NV
        if contrastive == "normalized":
            student_NV = normalize(student_NV, dim=-1, eps=_SMALLEST_NORM)
            rows_NV = normalize(rows_NV, dim=-1, eps=_SMALLEST_NORM)
        pairs_NN = student_NV @ rows_NV.T / contrastive_temperature
        diagonal_N = torch.arange(pairs_NN.shape[0], device=pairs_NN.device)
        both_N = cross_entropy(pairs_NN, diagonal_N, reduction="none") + cross_entropy(
            pairs_NN.T, diagonal_N, reduction="none"
        )
        loss_N = loss_N + contrastive_weight * both_N / 2
    return at.reduce(loss_N, reduction, with_count)


class ScaledLogits(NamedTuple):
    """What `top_scaled_logits` returns: z' float [N, V] and D float [N]."""

    logits: Tensor
    delta: Tensor


def top_scaled_logits(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    rank_weights: Tensor,
    label_factor: float,
    delta: float,
) -> ScaledLogits:
    """TSM: scale the K largest teacher logits by rank and lift them, with the label, by D.

    Args:
        teacher_logits: float [N, V], raw.
        labels: int64 [N].
        rank_weights: float [K], factors of rank 1..K (ties: lowest id first).
        label_factor: replaces the label's factor where the label is not the teacher's first.
        delta: D = delta (mean over the K largest - mean over the V - K others).
    """
    k = rank_weights.shape[0]
    order_NK = torch.sort(teacher_logits, dim=-1, descending=True, stable=True).indices[:, :k]
    top_NK = teacher_logits.gather(-1, order_NK)
    mean_others_N = (teacher_logits.sum(-1) - top_NK.sum(-1)) / (teacher_logits.shape[-1] - k)
    delta_N = delta * (top_NK.mean(-1) - mean_others_N)
    scaled_NV = teacher_logits.scatter(-1, order_NK, top_NK * rank_weights + delta_N[:, None])
    label_N1 = labels[:, None]
    corrected_N1 = teacher_logits.gather(-1, label_N1) * label_factor + delta_N[:, None]
    wrong_N1 = order_NK[:, :1] != label_N1
    label_value_N1 = torch.where(wrong_N1, corrected_N1, scaled_NV.gather(-1, label_N1))
    return ScaledLogits(scaled_NV.scatter(-1, label_N1, label_value_N1), delta_N)


def _stored_pos_cosine(
    at: Positions, weights_K: Tensor, label_factor: float, delta: float
) -> Tensor:
    """cos_Pos [N] among stored ids and label."""
    targets = at.targets
    assert isinstance(targets, TopKTargets)
    assert at.labels_N is not None
    k = weights_K.shape[0]
    lse_N1 = require(targets, "lse", "topkd").to(at.dtype)[:, None]
    plain_NS = targets.logprobs.to(at.dtype) + lse_N1
    top_NK = plain_NS[:, :k]
    delta_N1 = torch.zeros_like(lse_N1)
    if delta != 0:
        mean_N = require(targets, "logit_mean", "topkd").to(at.dtype)
        vocab_size = targets.vocab_size
        mean_others_N = (vocab_size * mean_N - top_NK.sum(-1)) / (vocab_size - k)
        delta_N1 = (delta * (top_NK.mean(-1) - mean_others_N))[:, None]
    _check_finite(delta_N1 + top_NK[:, -1:])
    scaled_NS = torch.cat([top_NK * weights_K + delta_N1, plain_NS[:, k:]], -1)
    # The label's own column, where the teacher is wrong; its stored slot then leaves the list.
    label_N1 = at.labels_N[:, None]
    wrong_N1 = targets.ids[:, :1] != label_N1
    is_label_NS = targets.ids == label_N1
    inside_N1 = is_label_NS.any(-1, keepdim=True)
    plain_label_N1 = torch.where(is_label_NS, plain_NS, 0.0).sum(-1, keepdim=True)
    if targets.label_logprob is not None:
        read_N1 = targets.label_logprob.to(at.dtype)[:, None] + lse_N1
        plain_label_N1 = torch.where(inside_N1, plain_label_N1, read_N1)
    elif bool((wrong_N1 & ~inside_N1).any()):
        raise TargetsError(
            "aux-missing",
            "topkd needs the teacher's logit of labels that are not among the stored ids",
            hint="capture with --aux label_logprob",
        )
    absent_NS = (targets.ids == PAD_ID) | (is_label_NS & wrong_N1)
    label_value_N1 = plain_label_N1 * label_factor + delta_N1
    candidates_NM = torch.cat(
        [
            torch.where(absent_NS, -math.inf, scaled_NS),
            torch.where(wrong_N1, label_value_N1, -math.inf),
        ],
        -1,
    )
    ids_NM = torch.cat([targets.ids.clamp_min(0), label_N1], -1)
    place_NK = torch.sort(candidates_NM, dim=-1, descending=True, stable=True).indices[:, :k]
    ids_NK = ids_NM.gather(-1, place_NK)
    return _cosine(
        at.student_NV.gather(-1, ids_NK).to(at.dtype), candidates_NM.gather(-1, place_NK)
    )


def _cosine(student_NG: Tensor, teacher_NG: Tensor) -> Tensor:
    """Cosine per row; 0 for an empty group (2 K = V leaves Non empty)."""
    if student_NG.shape[-1] == 0:
        return student_NG.sum(-1)
    return cosine_similarity(student_NG, teacher_NG, dim=-1, eps=_SMALLEST_NORM)


def _check_finite(delta: Tensor) -> None:
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(delta).all()):
        raise TargetsError(
            "targets-mismatch",
            "topkd scales raw logits, and has none of an id that cannot occur",
            got="teacher logits of -inf",
            expected="finite teacher logits at every counted position",
            hint="leave out padded vocabulary rows: ids that can occur are enough",
        )


def _check_options(
    targets: Targets, k: int, rank_weights: Tensor | None, contrastive_weight: float
) -> None:
    stored = targets.k if isinstance(targets, TopKTargets) else targets.vocab_size
    if not 1 <= k <= stored or 2 * k > targets.vocab_size:
        raise UsageError(
            "bad-argument",
            "topkd cannot take that many ranks",
            where="k",
            got=k,
            expected=f"1..{min(stored, targets.vocab_size // 2)}: stored, and 2 k <= V",
        )
    if rank_weights is not None and rank_weights.shape != (k,):
        raise UsageError(
            "bad-argument",
            "topkd needs one factor per rank",
            where="rank_weights",
            got=list(rank_weights.shape),
            expected=[k],
        )
    if contrastive_weight != 0 and isinstance(targets, TopKTargets):
        raise UsageError(
            "bad-argument",
            "topkd has no contrastive term from stored ids: it would be another loss",
            where="contrastive_weight",
            got=contrastive_weight,
            expected="0 or None with topk targets",
        )
