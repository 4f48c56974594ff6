"""Weighted cross-entropy: the form that CE, RS-KD, threshold KD and top-K forward KL share.

    loss_R = constant - sum_u w_u log q_u - w_tail log s - background * sum_{v < V} log q_v

with s the student's mass outside the first `num_excluded` ids. Label cross-entropy is one more id,
so that CE + KD costs one pass over the vocabulary.

Letters: R rows, U ids of a row, V vocabulary of the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitstore.losses.contract import Rows
from logitstore.losses.rows import (
    kept_rows,
    refuse_temperature,
    require_labels,
    student_precision,
    weighted_rows,
)
from logitstore.losses.sparse_logprobs import SparseLogprobs, sparse_logprobs
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import TopKTargets, WeightedTargets

__all__ = ["SparseTarget", "kd_and_ce_target", "label_target", "sparse_target"]


@dataclass(frozen=True)
class SparseTarget:
    """Weights of a weighted cross-entropy; rows that do not count hold zeros.

    Attributes:
        ids: int64 [R, U]; -1 pads.
        weights: float [R, U]; 0 at padding.
        constant: float [R], the part that does not depend on the student.
        num_excluded: the first ids of each row that the tail is taken outside of; 0 when there is
            no tail.
        tail_weight: float [R] or None.
        background: float [R] or None, weight of every id below `vocab_size` beside its own.
        vocab_size: V.
    """

    ids: Tensor
    weights: Tensor
    constant: Tensor
    vocab_size: int
    num_excluded: int = 0
    tail_weight: Tensor | None = None
    background: Tensor | None = None

    def loss(self, student_RV: Tensor, mask_R: Tensor, temperature: float = 1.0) -> Tensor:
        """float [R], nats; student [R, V] raw logits. Gradient (sum of weights) q - w."""
        out = sparse_logprobs(
            student_RV,
            self.ids,
            mask_R,
            num_excluded=self.num_excluded,
            sum_vocab=0 if self.background is None else self.vocab_size,
            temperature=temperature,
        )
        return self.loss_of(out)

    def loss_of(self, out: SparseLogprobs) -> Tensor:
        """float [R] from the student's log-probs at `ids`."""
        # 0 log 0 = 0, on the side of the student too: -inf at an id of weight 0 says nothing.
        logprobs_RU = torch.where(self.weights != 0, out.logprobs, 0.0)
        loss_R = self.constant - (self.weights * logprobs_RU).sum(-1)
        if self.tail_weight is not None:
            log_tail_R = torch.where(self.tail_weight > 0, out.log_tail, 0.0)
            loss_R = loss_R - self.tail_weight * log_tail_R
        if self.background is not None:
            total_R = torch.where(self.background > 0, out.total, 0.0)
            loss_R = loss_R - self.background * total_R
        return loss_R

    def take(self, index_L: Tensor | slice) -> SparseTarget:
        """Some of the rows."""
        return self._map(lambda x: x[index_L])

    def _scaled(self, factor: float) -> SparseTarget:
        return dataclasses.replace(self._map(lambda x: x * factor), ids=self.ids)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseTarget:
        tensors: dict[str, Any] = {
            name: function(value)
            for name in ("ids", "weights", "constant", "tail_weight", "background")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **tensors)


def sparse_target(rows: Rows, name: str, missing: str, temperature: float = 1.0) -> SparseTarget:
    """KL(target || q) from top-K, sampled or threshold targets as a weighted cross-entropy.

    Args:
        rows: from `align`.
        name: the loss, for messages.
        missing: treatment of the mass a top-K record does not hold (any but renormalize_both).
        temperature: T of the teacher side.
    """
    if isinstance(rows.targets, WeightedTargets):
        refuse_temperature(rows.targets, name, temperature)
        weighted = weighted_rows(rows)
        weights_RU = student_precision(weighted.weights, rows)
        constant_R = torch.xlogy(weights_RU, weights_RU).sum(-1)
        return SparseTarget(weighted.ids, weights_RU, constant_R, rows.targets.vocab_size)
    if isinstance(rows.targets, TopKTargets):
        return _topk_target(rows, name, missing, temperature)
    raise TargetsError(
        "targets-mismatch",
        f"{name} needs sparse targets",
        got=rows.targets.signal,
        expected="topk, sampled or threshold",
    )


def label_target(rows: Rows, name: str) -> SparseTarget:
    """Cross-entropy with the labels."""
    labels_R = require_labels(rows, name, "")
    dtype = torch.promote_types(rows.student_RV.dtype, torch.float32)
    return SparseTarget(
        torch.where(rows.mask_R, labels_R, -1)[:, None],
        rows.mask_R[:, None].to(dtype),
        torch.zeros_like(labels_R, dtype=dtype),
        rows.targets.vocab_size,
    )


def kd_and_ce_target(
    rows: Rows, name: str, missing: str, ce_weight: float, kd_weight: float
) -> SparseTarget:
    """kd_weight * KL + ce_weight * label cross-entropy as one target; a term of weight 0 is left
    out."""
    if kd_weight < 0 or ce_weight < 0 or kd_weight + ce_weight == 0:
        raise UsageError(
            "bad-argument",
            f"{name}: weights of loss terms must not be negative, nor both 0",
            got=f"kd_weight={kd_weight}, ce_weight={ce_weight}",
        )
    if kd_weight == 0:
        return label_target(rows, name)._scaled(ce_weight)
    kd = sparse_target(rows, name, missing)._scaled(kd_weight)
    if ce_weight == 0:
        return kd
    ce = label_target(rows, name)._scaled(ce_weight)
    return dataclasses.replace(
        kd,
        # kd's ids stay first: the tail is taken outside of them.
        ids=torch.cat([kd.ids, ce.ids], -1),
        weights=torch.cat([kd.weights, ce.weights], -1),
        constant=kd.constant + ce.constant,
    )


def _topk_target(rows: Rows, name: str, missing: str, temperature: float) -> SparseTarget:
    kept = kept_rows(rows, name, temperature)
    ids_RK, p_RK, vocab = kept.ids, kept.probs, kept.vocab_size
    head_constant_R = torch.xlogy(p_RK, p_RK).sum(-1)
    if missing == "renormalize":
        log_kept_R1 = torch.logsumexp(kept.logprobs, -1, keepdim=True)
        p_RK = (kept.logprobs - log_kept_R1).exp().masked_fill(ids_RK < 0, 0.0)
        return SparseTarget(ids_RK, p_RK, torch.xlogy(p_RK, p_RK).sum(-1), vocab)
    if missing == "none":
        return SparseTarget(ids_RK, p_RK, head_constant_R, vocab)
    r_R = kept.require_tail(f"{name} with missing={missing!r}").exp()
    if missing == "ghost":
        constant_R = head_constant_R + torch.xlogy(r_R, r_R)
        return SparseTarget(ids_RK, p_RK, constant_R, vocab, ids_RK.shape[-1], r_R)
    if missing == "uniform":
        # Residual over the V - K other ids: background everywhere, taken back at the kept ones.
        each_R = r_R / (vocab - kept.num_kept).clamp_min(1)
        weights_RK = torch.where(ids_RK >= 0, p_RK - each_R[:, None], 0.0)
        constant_R = head_constant_R + torch.xlogy(r_R, each_R)
        return SparseTarget(ids_RK, weights_RK, constant_R, vocab, background=each_R)
    if missing == "uniform_all":
        each_R = r_R / vocab
        raised_RK = torch.where(ids_RK >= 0, p_RK + each_R[:, None], 0.0)
        outside_R = (vocab - kept.num_kept) * torch.xlogy(each_R, each_R)
        constant_R = torch.xlogy(raised_RK, raised_RK).sum(-1) + outside_R
        return SparseTarget(ids_RK, p_RK, constant_R, vocab, background=each_R)
    assert missing == "label", missing
    labels_R = require_labels(rows, name, " with missing='label'")
    at_label_RK = (ids_RK == labels_R[:, None]) & rows.mask_R[:, None]
    outside_R = ~at_label_RK.any(-1) & rows.mask_R
    weights_RK = p_RK + torch.where(at_label_RK, r_R[:, None], 0.0)
    label_weight_R = torch.where(outside_R, r_R, 0.0)
    constant_R = torch.xlogy(weights_RK, weights_RK).sum(-1)
    return SparseTarget(
        torch.cat([ids_RK, torch.where(outside_R, labels_R, -1)[:, None]], -1),
        torch.cat([weights_RK, label_weight_R[:, None]], -1),
        constant_R + torch.xlogy(label_weight_R, label_weight_R),
        vocab,
    )
