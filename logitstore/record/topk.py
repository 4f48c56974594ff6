"""Fewer ids of a top-K record, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.record.record import Record
from logitstore.spec.signals import Q8_MOST_STEPS, Q8_STEP

__all__ = ["narrow_topk"]


def narrow_topk(
    record: Record, *, k: int, p: float | None = None, q8: bool = False
) -> dict[str, NDArray[Any]]:
    """The record's columns with the first k ids of each position; what is dropped joins log_tail.

    Args:
        record: of a top-K store; holds `ids` and `logprobs`.
        k: at most as many as are stored.
        p: of these only the smallest prefix of this mass; the columns are then ragged.
        q8: round log-probs to the nearest 1/16 nat, but for the largest, which stays as
            `top1_logprob`.
    """
    columns = dict(record.arrays)
    if "num_ids" in record:
        counts = record["num_ids"].astype(np.int64)
        width = max(int(counts.max()) if len(counts) else 0, 1)
        held = np.arange(width) < counts[:, None]
        logprobs = np.full(held.shape, -np.inf)
        ids = np.zeros(held.shape, np.uint32)
        logprobs[held], ids[held] = record["logprobs"], record["ids"]
    else:
        logprobs, ids = record["logprobs"].astype(np.float64), record["ids"]
        held = np.ones(ids.shape, np.bool_)
    keep = held.copy()
    keep[:, k:] = False
    if p is not None:
        probs = np.exp(logprobs)
        keep &= (np.cumsum(probs, axis=1) - probs) < p
    dropped = np.where(held & ~keep, np.exp(logprobs), 0.0).sum(1)
    if "log_tail" in record:
        with np.errstate(divide="ignore"):
            tail = np.log(dropped + np.exp(record["log_tail"].astype(np.float64)))
        columns["log_tail"] = np.where(dropped > 0, tail, record["log_tail"])
    if q8:
        # As at a capture, the largest can stay exact beside the rounded ones.
        columns.setdefault("top1_logprob", logprobs[:, 0])
        logprobs = np.clip(np.rint(logprobs / -Q8_STEP), 0, Q8_MOST_STEPS) * -Q8_STEP
    if p is None:
        columns["ids"], columns["logprobs"] = ids[:, :k], logprobs[:, :k]
    else:
        columns["num_ids"] = keep.sum(1)
        columns["ids"], columns["logprobs"] = ids[keep], logprobs[keep]
    return columns
