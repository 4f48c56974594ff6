"""Whole teacher rows rebuilt from a top-K list under an assumption about the tail.

For divergences that look at every id. Costs [R, V]; losses that are weighted cross-entropies do not
need it (`sparse_target`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logitstore.losses.contract import Rows
from logitstore.losses.dense_divergence import LOG_ZERO
from logitstore.losses.rows import KeptRows, require_labels
from logitstore.targets.dense import at_least_float32

__all__ = ["completed_logprobs", "student_logprobs"]


def completed_logprobs(rows: Rows, kept: KeptRows, missing: str, name: str) -> Tensor:
    """log p of all ids, float [R, V of the student], with `missing` = renormalize, uniform,
    uniform_all or label."""
    num_rows, width = rows.student_RV.shape
    vocab = kept.vocab_size
    mask_R1 = rows.mask_R[:, None]
    # A column past the vocabulary takes what padding would write.
    place_RK = torch.where(kept.ids >= 0, kept.ids, width)
    logprobs_RK = kept.logprobs
    each_R = torch.full_like(logprobs_RK[:, 0], -torch.inf)
    if missing == "renormalize":
        logprobs_RK = logprobs_RK - torch.logsumexp(logprobs_RK, -1, keepdim=True)
    else:
        log_r_R = kept.require_tail(f"{name} with missing={missing!r}")
        if missing == "uniform":
            each_R = log_r_R - (vocab - kept.num_kept).clamp_min(1).to(log_r_R.dtype).log()
        elif missing == "uniform_all":
            each_R = log_r_R - math.log(vocab)
            logprobs_RK = torch.logaddexp(logprobs_RK, each_R[:, None])
    out_RV = logprobs_RK.new_full((num_rows, width + 1), -torch.inf)
    out_RV[:, :vocab] = each_R[:, None]
    out_RV.scatter_(-1, place_RK, logprobs_RK)
    if missing == "label":
        labels_R1 = require_labels(rows, name, " with missing='label'")[:, None]
        raised_R1 = torch.logaddexp(out_RV.gather(-1, labels_R1), log_r_R[:, None])
        out_RV.scatter_(-1, labels_R1, raised_R1)
    return torch.where(mask_R1, out_RV[:, :width], 0.0)


def student_logprobs(rows: Rows, temperature: float = 1.0, vocab: int | None = None) -> Tensor:
    """log softmax(student / T) over the first `vocab` ids (default: all), float [R, V].

    Rows that do not count are uniform. A logit of -inf becomes LOG_ZERO, so that 0 log 0 = 0 in
    gradients too.
    """
    logits_RV = at_least_float32(rows.student_RV)[:, :vocab]
    logits_RV = logits_RV.masked_fill(~rows.mask_R[:, None], 0.0)
    logprobs_RV = torch.log_softmax(logits_RV / temperature, -1)
    return logprobs_RV.clamp_min(LOG_ZERO)
