"""Forward and reverse KL divergence, from whole or partial teacher distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.losses.completed import completed_logprobs, student_logprobs
from logitstore.losses.contract import (
    LossAndCount,
    Missing,
    Reduction,
    Rows,
    align,
    loss,
    reduce,
)
from logitstore.losses.dense_divergence import (
    LOG_ZERO,
    dense_divergence,
    forward_kl_terms,
    reverse_kl_terms,
)
from logitstore.losses.rows import KeptRows, kept_rows, teacher_logits
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.losses.sparse_target import sparse_target
from logitstore.targets import DenseTargets, Targets

__all__ = ["forward_kl", "reverse_kl"]


@loss(
    signals={"dense": "exact", "topk": "bounded", "sampled": "unbiased", "threshold": "unbiased"},
    missing={
        "topk": (
            "ghost",
            "renormalize",
            "renormalize_both",
            "none",
            "uniform",
            "uniform_all",
            "label",
        )
    },
    source="Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2",
    aliases=("kd", "kl_div", "soft_cross_entropy"),
)
def forward_kl(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    missing: Missing = "ghost",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """T^2 KL(p_T || q_T), nats: the student is pulled to cover everything the teacher finds likely.

    With p the teacher, q the student, S the K stored ids, a their mass, r = 1 - a, q_S the
    student's mass on S and s = 1 - q_S, `missing=` says what stands for the mass outside a top-K
    list:

        ghost             sum_S p log(p/q) + r log(r/s); never more than the full KL, exact gradient
        on S renormalize       sum_S (p/a) log((p/a)/q)
        renormalize_both  sum_S (p/a) log((p/a)/(q/q_S)); says nothing about the tail
        none              sum_S p log(p/q); can be negative, and must not be clamped at 0
        uniform           r spread evenly over the V - K other ids
        uniform_all       r spread evenly over all V ids
        label             r added to the label (needs `labels`)

    L1 distance of the logit gradient from the full one: at most 2r (renormalize: exactly 2r;
    renormalize_both: at most 2(r + s)). Sampled and threshold targets miss nothing: every treatment
    gives sum w log(w/q), whose gradient (sum w) q - w is unbiased (`random_sampling_kd`).

    Args:
        student_logits: float [..., V], raw logits, no shift.
        targets: dense, topk, sampled or threshold targets of the same positions.
        labels: int64 [...], only for missing="label"; without a mask, -100 masks.
        mask: bool [...], positions that count.
        missing: treatment of the mass outside a top-K list.
        temperature: T; the factor T^2 keeps gradients comparable with a label term. From topk it
            needs `lse` and `lse_at[T]`; sampled and threshold targets exist at T = 1 only.
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: TargetsError missing-not-allowed, aux-missing (naming the capture flag),
        not-retemperable, label-missing, shape-mismatch, empty-mask.

    Numerics: float32 inside at least; the student's tail by a logsumexp over the ids outside S,
    never log(1 - sum exp), which is noise once q_S exceeds about 0.9999. One copy of the logits as
    extra memory.
    """
    rows = align(student_logits, targets, labels, mask, upcast=False)
    if isinstance(targets, DenseTargets):
        loss_R = dense_divergence(
            rows.student_RV,
            teacher_logits(rows),
            rows.mask_R,
            forward_kl_terms,
            student_temperature=temperature,
            teacher_temperature=temperature,
        )
    elif missing == "renormalize_both" and targets.signal == "topk":
        kept = kept_rows(rows, "forward_kl", temperature)
        loss_R = _forward_kl_renormalized(rows, kept, temperature)
    else:
        target = sparse_target(rows, "forward_kl", missing, temperature)
        loss_R = target.loss(rows.student_RV, rows.mask_R, temperature)
    return reduce(temperature**2 * loss_R, rows, reduction, with_count)


@loss(
    signals={"dense": "exact", "topk": "bounded"},
    missing={"topk": ("ghost", "renormalize_both", "uniform", "uniform_all")},
    source="MiniLLM, arXiv:2306.08543, section 2",
    aliases=("rkl",),
)
def reverse_kl(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    missing: Missing = "ghost",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """T^2 KL(q_T || p_T), nats: the student is pushed off everything the teacher finds unlikely.

    `missing=` for a top-K list (names as in `forward_kl`):

        ghost             sum_S q log(q/p) + s log(s/r): a lower bound; no upper bound exists,
        because an
                          unseen p may be arbitrarily small
        renormalize_both  sum_S (q/q_S) log((q/q_S)/(p/a))
        uniform           against p on S and r/(V - K) elsewhere
        uniform_all       against p + r/V on S and r/V elsewhere

    `none`, `renormalize` and `label` give ids outside S probability 0, so the divergence is
    infinite as soon as the student has any mass there; sampled and threshold targets do so too.
    They are refused. A teacher logit of -inf makes the true value infinite; here its log-prob
    counts as -1e30: astronomically large, but finite.

    Args:
        student_logits: float [..., V], raw logits, no shift. Ids beyond the teacher's vocabulary
            are left out and the student renormalised over the shared ones (with missing="ghost"
            they count as tail).
        targets: dense or topk targets of the same positions.
        labels: unused but for the mask: without `mask`, -100 masks.
        mask: bool [...], positions that count.
        missing: treatment of the mass outside a top-K list.
        temperature: T, with the factor T^2; from topk it needs `lse` and `lse_at[T]`.
        reduction: mean over counted positions, sum, or none ([...], 0 where masked).
        with_count: also return how many positions count.

    Raises: TargetsError missing-not-allowed, aux-missing, targets-mismatch, shape-mismatch,
    empty-mask.

    Cost: dense, ghost and renormalize_both as forward_kl; uniform and uniform_all build [R, V]
    teacher rows.
    """
    completed = targets.signal == "topk" and missing in ("uniform", "uniform_all")
    rows = align(student_logits, targets, labels, mask, upcast=completed)
    shared = targets.vocab_size
    if isinstance(targets, DenseTargets):
        loss_R = dense_divergence(
            rows.student_RV[:, :shared],
            teacher_logits(rows),
            rows.mask_R,
            reverse_kl_terms,
            student_temperature=temperature,
            teacher_temperature=temperature,
        )
    else:
        kept = kept_rows(rows, "reverse_kl", temperature)
        if completed:
            log_p_RV = completed_logprobs(rows, kept, missing, "reverse_kl")[:, :shared]
            log_q_RV = student_logprobs(rows, temperature, shared)
            loss_R = reverse_kl_terms(log_p_RV.clamp_min(LOG_ZERO), log_q_RV).value
        else:
            loss_R = _reverse_kl_sparse(rows, kept, missing, temperature)
    return reduce(temperature**2 * loss_R, rows, reduction, with_count)


def _forward_kl_renormalized(rows: Rows, kept: KeptRows, temperature: float) -> Tensor:
    log_p_RK = _renormalized(kept.logprobs)
    log_q_RK = _renormalized(_student_on(rows, kept, temperature))
    valid_RK = kept.ids >= 0
    # 0 log 0 = 0: a stored id may have probability 0.
    p_RK = torch.where(valid_RK, log_p_RK.exp(), 0.0)
    return (p_RK * torch.where(p_RK > 0, log_p_RK - log_q_RK, 0.0)).sum(-1)


def _reverse_kl_sparse(rows: Rows, kept: KeptRows, missing: Missing, temperature: float) -> Tensor:
    valid_RK = kept.ids >= 0
    if missing == "renormalize_both":
        log_q_RK = _renormalized(_student_on(rows, kept, temperature)).clamp_min(LOG_ZERO)
        log_p_RK = _renormalized(kept.logprobs).clamp_min(LOG_ZERO)
        gap_RK = torch.where(valid_RK, log_q_RK - log_p_RK, 0.0)
        return (torch.where(valid_RK, log_q_RK.exp(), 0.0) * gap_RK).sum(-1)
    log_p_RK = torch.where(valid_RK, kept.logprobs.clamp_min(LOG_ZERO), 0.0)
    log_r_R = kept.require_tail("reverse_kl with missing='ghost'").clamp_min(LOG_ZERO)
    student = sparse_logprobs(
        rows.student_RV,
        kept.ids,
        rows.mask_R,
        num_excluded=kept.ids.shape[-1],
        temperature=temperature,
    )
    gap_RK = student.logprobs.clamp_min(LOG_ZERO) - log_p_RK
    head_R = (torch.where(valid_RK, student.logprobs.exp(), 0.0) * gap_RK).sum(-1)
    # K = V leaves the student no tail either; rows that do not count have none to look at.
    has_tail_R = ~torch.isneginf(student.log_tail) & rows.mask_R
    log_s_R = torch.where(has_tail_R, student.log_tail, 0.0)
    gap_R = log_s_R - torch.where(has_tail_R, log_r_R, 0.0)
    return head_R + torch.where(has_tail_R, log_s_R.exp(), 0.0) * gap_R


def _student_on(rows: Rows, kept: KeptRows, temperature: float) -> Tensor:
    """Student logits / T at the kept ids, -inf at padding: all that renormalize_both looks at."""
    safe_RK = kept.ids.clamp_min(0)
    dtype = kept.logprobs.dtype
    logits_RK = rows.student_RV.gather(-1, safe_RK).to(dtype) / temperature
    return logits_RK.masked_fill(kept.ids < 0, -torch.inf)


def _renormalized(logprobs_RK: Tensor) -> Tensor:
    """log of the values divided by their sum; rows of padding alone stay -inf."""
    log_sum_R1 = torch.logsumexp(logprobs_RK, -1, keepdim=True)
    return logprobs_RK - log_sum_R1.masked_fill(torch.isneginf(log_sum_R1), 0.0)
