"""Logits-based finetuning: supervised finetuning on label and teacher candidates mixed.

Letters: R rows, N of them count, V vocabulary, K candidates, C candidates with the label's slot,
U = C + 1 ids whose student log-prob is needed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, Rows, align, loss, reduce
from logitstore.losses.rows import dense_rows, kept_rows, require_labels
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.spec.errors import UsageError
from logitstore.targets import DenseTargets, Targets

__all__ = ["logits_sft"]


@loss(
    signals={"dense": "exact", "topk": "exact", "threshold": "approximate"},
    needs_labels=True,
    source="arXiv:2505.24461 (EMNLP 2025); figure rule inferred from the printed example",
    aliases=("logits_based_finetuning", "lbf"),
)
def logits_sft(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    rule: Literal["figure", "released"] = "figure",
    k: int = 5,
    alpha: float | None = None,
    delta: float = 1.0,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """alpha x cross-entropy with the label + (1 - alpha) x KL(target || student), nats.

    figure (default): the k largest teacher probabilities, the label's set to 1 (or inserted), all
    divided by their sum. The label's share is 1 / (1 + the others') >= 1/2. Mean over rows.

    released: the k probabilities divided by their sum; the label only enters the cross-entropy.
    The KL is summed over a sample's rows without its first, divided by their number, and averaged
    over samples; the cross-entropy is averaged over all rows of the batch.

    Args:
        student_logits: float [..., V], the teacher's tokenizer.
        targets: topk with K >= k is exact (cut to k; the residual is normalised away by
            definition). Fewer stored ids are fewer candidates, at `threshold` records the head's.
        labels: int64 [...], needed at every row that counts; without a mask, -100 does not count.
        mask: bool [...], True counts: the answer tokens.
        rule: "figure" or "released".
        k: candidates; the authors store 5.
        alpha: weight of the cross-entropy; None means 0 for figure and the authors' 0.9 for
            released.
        delta: progressive distillation, the target becomes delta target + (1 - delta) softmax
            (student), whose gradient flows through both places as released; 1 turns it off.
        reduction: "none" gives values per row whose mean over counted rows is the loss; the
            released rule weighs a row's KL by N / (samples x (rows of its sample - 1)), so that
            its "sum" and count do not add up over batches as the figure rule's do.

    Raises: TargetsError label-missing, shape-mismatch, empty-mask; UsageError bad-argument.

    Published code and our choice: gamma, a factor of the candidates, cancels in the normalisation
    and is no parameter, nor is the temperature, which is accepted and ignored; the trainer injects
    no label; the first answer token gets no KL and the last, whose row has no candidates (the end
    of turn), adds 0 and still counts in the divisor: "released" does the same, and a sample of one
    answer token, which divides by zero there, has no KL here. log(softmax) underflows to NaN there;
    here it is log-softmax in float32 or better.

    Source: arXiv:2505.24461, figure 2 and section 3; dvlab-research/Logits-Based-Finetuning.
    """
    if rule not in ("figure", "released"):
        raise UsageError("bad-argument", "unknown rule", got=rule, expected="figure or released")
    if not 0 <= delta <= 1:
        raise UsageError("bad-argument", "delta is a share", got=delta, expected="0 to 1")
    if alpha is None:
        alpha = 0.9 if rule == "released" else 0.0
    rows = align(student_logits, targets, labels, mask, upcast=False)
    labels_R = require_labels(rows, "logits_sft", "")
    ids_RC, weights_RC = _candidates(rows, k)
    if rule == "figure":
        ids_RC, weights_RC = _with_label(ids_RC, weights_RC, labels_R)
    # Rows without candidates stay zero.
    sum_R1 = weights_RC.sum(-1, keepdim=True)
    target_RC = weights_RC / sum_R1.masked_fill(sum_R1 == 0, 1.0)
    ids_RU = torch.cat([ids_RC, labels_R[:, None]], -1)
    log_q_RU = sparse_logprobs(rows.student_RV, ids_RU, rows.mask_R).logprobs
    log_q_RC = log_q_RU[:, :-1]
    kl_R = _sparse_kl(target_RC.to(log_q_RC), log_q_RC, delta)
    if rule == "released":
        kl_R = kl_R * _released_weights(rows).to(kl_R)
    loss_R = (1 - alpha) * kl_R - alpha * log_q_RU[:, -1]
    return reduce(loss_R, rows, reduction, with_count)


def _candidates(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities [R, K] of the k best candidates; -1 and 0 where there are fewer."""
    if isinstance(rows.targets, DenseTargets):
        top = dense_rows(rows).topk(min(k, rows.targets.vocab_size))
        return top.indices, top.values.exp()
    kept = kept_rows(rows, "logits_sft")
    # Always-ids stand behind the stored ones, whatever their probability.
    top = kept.logprobs.topk(min(k, kept.ids.shape[-1]))
    return kept.ids.gather(-1, top.indices), top.values.exp()


def _with_label(ids_RK: Tensor, weights_RK: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the label's weight by 1, in a slot of its own."""
    weights_RK = weights_RK.masked_fill(ids_RK == labels_R[:, None], 0.0)
    one_R1 = weights_RK.new_ones(labels_R.shape[0], 1)
    return torch.cat([ids_RK, labels_R[:, None]], -1), torch.cat([weights_RK, one_R1], -1)


def _sparse_kl(target_RC: Tensor, log_q_RC: Tensor, delta: float) -> Tensor:
    """KL(delta t + (1 - delta) q || q) over the whole vocabulary, from the support of t."""
    in_support_RC = target_RC > 0
    # Outside the support log q never matters; 0 keeps infinities out of the arithmetic.
    log_q_RC = torch.where(in_support_RC, log_q_RC, 0.0)
    log_target_RC = target_RC.log().masked_fill(~in_support_RC, 0.0)
    if delta == 1:
        return (target_RC * (log_target_RC - log_q_RC)).sum(-1)
    if delta == 0:
        return torch.zeros_like(target_RC[:, 0]) * log_q_RC.sum(-1)
    log_mixed_RC = torch.logaddexp(log_target_RC + math.log(delta), log_q_RC + math.log1p(-delta))
    terms_RC = log_mixed_RC.exp() * (log_mixed_RC - log_q_RC)
    q_in_support_R = torch.where(in_support_RC, log_q_RC.exp(), 0.0).sum(-1)
    # Everywhere else the mixture is (1 - delta) q.
    rest_R = (1 - delta) * math.log1p(-delta) * (1 - q_in_support_R)
    return torch.where(in_support_RC, terms_RC, 0.0).sum(-1) + rest_R


def _released_weights(rows: Rows) -> Tensor:
    """[R]: 0 for a sample's first row, else N / (samples with KL x (rows of its sample - 1))."""
    num_rows = rows.mask_R.numel()
    row_R = torch.arange(num_rows, device=rows.mask_R.device)
    if len(rows.leading) >= 2:
        sample_R = row_R // rows.leading[-1]
    elif rows.targets.lengths is not None:
        ends_B = rows.targets.lengths.to(row_R.device).cumsum(0)
        sample_R = torch.bucketize(row_R, ends_B, right=True)
    else:
        sample_R = torch.zeros_like(row_R)
    rows_B = torch.bincount(sample_R[rows.mask_R], minlength=int(sample_R[-1]) + 1)
    num_samples = (rows_B > 1).sum().clamp_min(1)
    # float64: dividing integers would give float32.
    weight_B = rows_B.sum().double() / (num_samples * (rows_B - 1).clamp_min(1))
    before_B = rows_B.cumsum(0) - rows_B
    rank_R = rows.mask_R.cumsum(0) - 1 - before_B[sample_R]
    return weight_B[sample_R].masked_fill(rank_R < 1, 0.0)
