"""Partial-knowledge distillation: cross-entropy to targets that keep one part of the teacher each.

Letters: N rows that count, V classes, K stored ids, D features of the teacher's output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vecdot

from logitstore.losses.contract import LossAndCount, Reduction, align, loss
from logitstore.losses.dense_divergence import Terms, dense_divergence
from logitstore.losses.positions import (
    Positions,
    counted_positions,
    dense_logits,
    tempered_logprobs,
)
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["instance_weights", "kd_partial", "relation_table", "similarity_table"]

PartialKind = Literal["kd", "ls", "pt", "topk", "sim", "rel"]

# kind -> signals that hold what it needs; "label_logprob" is checked where it is read.
_SIGNALS: dict[str, tuple[str, ...]] = {
    "kd": ("dense",),
    "ls": ("dense", "topk", "threshold", "sampled"),
    "pt": ("dense", "topk", "threshold", "sampled"),
    "topk": ("dense", "topk", "threshold"),
    "sim": ("dense", "topk", "threshold", "sampled"),
    "rel": ("dense", "topk", "threshold", "sampled"),
}
_SOURCE = "arXiv:2002.03532 (target definitions unverified against the paper; no public code)"


@loss(
    signals={"dense": "exact", "topk": "exact", "threshold": "exact", "sampled": "exact"},
    needs_labels=True,
    source=_SOURCE,
    aliases=("partial_kd",),
)
def kd_partial(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    kind: PartialKind = "topk",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    k: int | None = None,
    table: Tensor | None = None,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean of (1 - lambda) CE(y, q) + lambda T^2 H(rho, q_T), nats.

    lambda = `kd_weight`, H the cross-entropy, and the target rho by `kind`:

    - "kd": p_T. Dense only: from stored ids name a treatment of the missing mass,
      `forward_kl(missing=...)`.
    - "ls": 1 / V (universe knowledge, label smoothing). Needs nothing of the teacher.
    - "pt": p_T(y) on the label, the rest spread evenly. Needs the label's log-prob only.
    - "topk": p_T on the k largest, the rest spread evenly over the others:
      `forward_kl(missing="uniform")` with a label term. A label outside the k largest loses its own
      confidence.
    - "sim": row y of `table` = `similarity_table(...)` (domain knowledge).
    - "rel": row y of `table` = `relation_table(...)`, the label-conditioned mean of p_T over a
      store; this project's stand-in for the paper's class relations.

    The student is tempered too, except for "ls" and "sim", where T = 1. Because H is a
    cross-entropy, the value at a perfect match is the entropy of rho and not 0. All kinds are exact
    from the records they take.

    Args:
        student_logits: float [..., V].
        targets: dense; or stored ids for the kinds above. T != 1 needs `lse` and `lse_at[T]`.
        labels: int64 [...], needed wherever `mask` is true; without a mask, -100 does not count.
        mask: bool [...], True counts.
        kind: see above.
        kd_weight: lambda in [0, 1]. No default is published; 0.5 is ours.
        temperature: T.
        k: ids of "topk"; None means all that are stored, always-ids included (required for dense
            targets).
        table: float [V, V] of "sim" and "rel", rows sum to 1.

    Raises: TargetsError targets-mismatch, aux-missing, label-missing, shape-mismatch, empty-mask;
        UsageError bad-argument.

    Traps: the name KD-topk also labels plain truncation elsewhere (`missing="none"`), and the names
    vary between versions of the paper.

    Source: arXiv:2002.03532, universe / domain / instance knowledge; sparse forms derived for this
        project.
    """
    if kind not in _SIGNALS:
        raise UsageError("bad-argument", "unknown kind", got=kind, expected=", ".join(_SIGNALS))
    if targets.signal not in _SIGNALS[kind]:
        raise TargetsError(
            "targets-mismatch",
            f"kd_partial(kind={kind!r}) cannot be computed from {targets.signal} targets",
            got=targets.signal,
            expected=", ".join(_SIGNALS[kind]),
            hint="forward_kl(missing=...) is full distillation from stored ids"
            if kind == "kd"
            else None,
        )
    from_table = kind in ("sim", "rel")
    at = counted_positions(
        align(student_logits, targets, labels, mask, upcast=from_table), labelled="kd_partial"
    )
    assert at.labels_N is not None
    label_N1 = at.labels_N[:, None]
    student_T = 1.0 if kind in ("ls", "sim") else temperature

    if kind == "kd":
        assert isinstance(at.targets, DenseTargets)
        distill_N = dense_divergence(
            at.student_NV,
            at.targets.logits,
            torch.ones_like(at.labels_N, dtype=torch.bool),
            _cross_entropy_terms,
            student_temperature=student_T,
            teacher_temperature=temperature,
        )
        log_q_y_N = _log_q(at, label_N1, 1.0)[:, 0]
    elif from_table:
        rho_NV = _table_rows(table, at, kind)
        log_q_NV = torch.log_softmax(at.student_NV / student_T, -1)
        distill_N = -vecdot(rho_NV, log_q_NV[:, : rho_NV.shape[-1]])
        if student_T != 1:
            log_q_NV = torch.log_softmax(at.student_NV, -1)
        log_q_y_N = log_q_NV.gather(-1, label_N1)[:, 0]
    else:
        if kind == "ls":
            ids_NK, rho_NK = label_N1[:, :0], label_N1[:, :0].to(at.dtype)
            rest_N = rho_NK.new_ones(rho_NK.shape[0])
        elif kind == "pt":
            log_rho_N = _label_logprob(at, temperature, "kd_partial(kind='pt')")
            ids_NK, rho_NK = label_N1, log_rho_N.exp()[:, None]
            rest_N = -torch.expm1(log_rho_N)
        else:
            ids_NK, rho_NK, rest_N = _largest(at, temperature, k)
        distill_N, log_q_y_N = _flat_rest(at, ids_NK, rho_NK, rest_N, student_T)
    loss_N = (kd_weight * student_T**2) * distill_N - (1 - kd_weight) * log_q_y_N
    return at.reduce(loss_N, reduction, with_count)


def instance_weights(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor,
    mask: Tensor | None = None,
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    squared: bool = True,
) -> Tensor:
    """omega: the ratio of the KD gradient to the CE gradient at the label's logit, per row,
    detached.

        omega = (1 - lambda) + lambda T (p_T(y) - q_T(y)) / (1 - q(y))      squared=True, with the
        T^2 factor omega = (1 - lambda) + lambda / T (p_T(y) - q_T(y)) / (1 - q(y))    squared=False

    Distillation acts as a per-sample weight on the label's cross-entropy; train `(omega *
    ce).mean()` to keep only that part of it. omega > 1 - lambda exactly where the teacher is surer
    of the label than the student; it may be negative, and is large where the student is sure (1 -
    q(y) is kept above the dtype's epsilon).

    Args:
        student_logits: float [..., V].
        targets: any signal that holds the label's probability (dense; stored ids or
            `label_logprob`); T != 1 also needs `lse` and `lse_at[T]`, except for dense targets.
        labels: int64 [...].
        mask: bool [...], True counts.
        kd_weight: lambda.
        temperature: T.
        squared: whether the distillation loss it imitates carries T^2.

    Returns: float [...], 0 where no label counts.
    Raises: TargetsError aux-missing, shape-mismatch, empty-mask.
    Source: instance knowledge of arXiv:2002.03532; formula derived for this project.
    """
    rows = align(student_logits.detach(), targets, labels, mask, upcast=False)
    at = counted_positions(rows, labelled="instance_weights")
    assert at.labels_N is not None
    label_N1 = at.labels_N[:, None]
    p_y_N = _label_logprob(at, temperature, "instance_weights").exp()
    # 1 - q(y) by the logsumexp of the other ids: a difference would be noise for a sure student.
    _, log_others_N, _ = sparse_logprobs(
        at.student_NV, label_N1, torch.ones_like(label_N1[:, 0], dtype=torch.bool), num_excluded=1
    )
    q_y_N = _log_q(at, label_N1, temperature).exp()[:, 0]
    others_N = log_others_N.exp().clamp_min(torch.finfo(at.dtype).eps)
    scale = kd_weight * (temperature if squared else 1 / temperature)
    omega_N = (1 - kd_weight) + scale * (p_y_N - q_y_N) / others_N
    omega = at.reduce(omega_N, "none", False)
    assert isinstance(omega, Tensor)
    return omega


def similarity_table(class_weights: Tensor, *, power: float = 0.3, softness: float = 0.3) -> Tensor:
    """softmax_j( clip(cos(w_y, w_j), 0)^power / softness ), float [V, V]: the `table` of kind
    "sim".

    Args:
        class_weights: float [V, D], rows of the teacher's output layer.
        power, softness: about 0.3 in secondary accounts of the paper, unverified.

    A negative cosine has no fractional power, so it counts as 0 (our choice).
    """
    weights_VD = torch.nn.functional.normalize(at_least_float32(class_weights), dim=-1)
    cosine_VV = (weights_VD @ weights_VD.T).clamp_min(0.0)
    return torch.softmax(cosine_VV.pow(power) / softness, -1)


def relation_table(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Mean of p_T over the samples of each label, float [V, V]: the `table` of kind "rel".

    Args:
        logits: teacher logits [..., V], or batches of them.
        labels: int64 [...] or batches of them; negative labels are skipped.
        temperature: T.

    A label without a sample gets the uniform row.
    """
    batches = [logits] if isinstance(logits, Tensor) else logits
    label_batches = [labels] if isinstance(labels, Tensor) else labels
    vocab_size = batches[0].shape[-1]
    device = batches[0].device
    sum_VV = torch.zeros(vocab_size, vocab_size, dtype=torch.float64, device=device)
    count_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    for batch, batch_labels in zip(batches, label_batches, strict=True):
        labels_N = batch_labels.reshape(-1)
        keep_N = labels_N >= 0
        probs_NV = torch.softmax(batch.reshape(-1, vocab_size)[keep_N].double() / temperature, -1)
        sum_VV.index_add_(0, labels_N[keep_N], probs_NV)
        count_V += torch.bincount(labels_N[keep_N], minlength=vocab_size)
    mean_VV = sum_VV / count_V.clamp_min(1)[:, None]
    mean_VV[count_V == 0] = 1 / vocab_size
    return mean_VV.to(at_least_float32(batches[0]).dtype)


def _cross_entropy_terms(log_p: Tensor, log_q: Tensor) -> Terms:
    """-sum p log q."""
    p = log_p.exp()
    return Terms(-(p * log_q).sum(-1), -p)


def _label_logprob(at: Positions, temperature: float, needed_by: str) -> Tensor:
    """log p_T(label) [N], from the logits, the stored ids or `label_logprob`."""
    assert at.labels_N is not None
    dtype = at.dtype
    label_N1 = at.labels_N[:, None]
    if isinstance(at.targets, DenseTargets):
        log_p_NV = torch.log_softmax(dense_logits(at) / temperature, -1)
        return log_p_NV.gather(-1, label_N1)[:, 0]
    logprob_N = at.targets.label_logprob
    if isinstance(at.targets, TopKTargets):
        is_label_NK = at.targets.ids == label_N1
        inside_N = is_label_NK.any(-1)
        stored_N = torch.where(is_label_NK, at.targets.logprobs.to(dtype), 0.0).sum(-1)
        if logprob_N is not None:
            logprob_N = torch.where(inside_N, stored_N, logprob_N.to(dtype))
        elif bool(inside_N.all()):
            logprob_N = stored_N
    if logprob_N is None:
        raise TargetsError(
            "aux-missing",
            f"{needed_by} needs the teacher's probability of each label",
            hint="capture with --aux label_logprob",
        )
    return tempered_logprobs(logprob_N.to(dtype), at.targets, temperature, needed_by)


def _largest(at: Positions, temperature: float, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, K], p_T on them [N, K] and the mass outside [N]."""
    dtype = at.dtype
    targets = at.targets
    if isinstance(targets, DenseTargets):
        if k is None or not 0 <= k <= targets.vocab_size:
            raise UsageError(
                "bad-argument",
                "kd_partial(kind='topk') from dense targets needs k",
                got=k,
                expected=f"0..{targets.vocab_size}",
            )
        teacher_NV = dense_logits(at)
        order_NV = torch.sort(teacher_NV, dim=-1, descending=True, stable=True).indices
        log_p_NV = torch.log_softmax(teacher_NV / temperature, -1)
        ids_NK = order_NV[:, :k]
        rest_N = log_p_NV.gather(-1, order_NV[:, k:]).exp().sum(-1)
        return ids_NK, log_p_NV.gather(-1, ids_NK).exp(), rest_N
    assert isinstance(targets, TopKTargets)
    if k is not None:
        whole = at.rows.targets
        # Always-ids behind a top-K list are not the next largest.
        num_ranked = whole.k if isinstance(whole, TopKTargets) else targets.k
        if not 1 <= k <= num_ranked:
            raise UsageError(
                "bad-argument", "not that many ids are stored", got=k, expected=f"1..{num_ranked}"
            )
        targets = targets.truncated(k)
    rho_NK = tempered_logprobs(
        targets.logprobs.to(dtype), targets, temperature, "kd_partial(kind='topk')"
    ).exp()
    if temperature == 1 and targets.log_tail is not None:
        return targets.ids, rho_NK, targets.log_tail.to(dtype).exp()
    # Rounded log-probs may sum to slightly more than 1.
    return targets.ids, rho_NK, (1 - rho_NK.sum(-1)).clamp_min(0.0)


def _flat_rest(
    at: Positions, ids_NK: Tensor, rho_NK: Tensor, rest_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """H(rho, q_T) per row with `rest` spread evenly outside `ids`, and log q(label) at temperature
    1.

    H = -[ sum_S (rho_i - each) log q_T(i) + each sum_V log q_T ], each = rest / (V - K).
    """
    assert at.labels_N is not None
    label_N1 = at.labels_N[:, None]
    vocab_size = at.targets.vocab_size
    valid_NK = ids_NK != PAD_ID
    num_outside_N = vocab_size - valid_NK.sum(-1)
    each_N1 = torch.where(num_outside_N > 0, rest_N / num_outside_N.clamp_min(1), 0.0)[:, None]
    log_q_NU, _, sum_log_q_N = sparse_logprobs(
        at.student_NV,
        torch.cat([ids_NK, label_N1], -1),
        torch.ones_like(num_outside_N, dtype=torch.bool),
        sum_vocab=vocab_size,
        temperature=temperature,
    )
    weights_NK = torch.where(valid_NK, rho_NK - each_N1, 0.0)
    # 0 log 0 = 0, on the side of the student too.
    log_q_NK = torch.where(weights_NK != 0, log_q_NU[:, :-1], 0.0)
    sum_log_q_N = torch.where(each_N1[:, 0] > 0, sum_log_q_N, 0.0)
    distill_N = -(weights_NK * log_q_NK).sum(-1) - each_N1[:, 0] * sum_log_q_N
    if temperature == 1:
        return distill_N, log_q_NU[:, -1]
    return distill_N, _log_q(at, label_N1, 1.0)[:, 0]


def _log_q(at: Positions, ids_NU: Tensor, temperature: float) -> Tensor:
    """Student log-probs at `ids`, [N, U]."""
    everywhere_N = torch.ones_like(ids_NU[:, 0], dtype=torch.bool)
    return sparse_logprobs(at.student_NV, ids_NU, everywhere_N, temperature=temperature).logprobs


def _table_rows(table: Tensor | None, at: Positions, kind: str) -> Tensor:
    vocab_size = at.targets.vocab_size
    if table is None or table.shape != (vocab_size, vocab_size):
        builder = "similarity_table" if kind == "sim" else "relation_table"
        raise UsageError(
            "bad-argument",
            f"kd_partial(kind={kind!r}) needs table",
            got=None if table is None else list(table.shape),
            expected=f"[{vocab_size}, {vocab_size}], rows by label",
            hint=f"build it once per teacher with logitstore.losses.{builder}",
        )
    assert at.labels_N is not None
    return table.to(device=at.student_NV.device, dtype=at.dtype)[at.labels_N]
