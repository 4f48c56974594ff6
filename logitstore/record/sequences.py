"""What follows from tokens and segments: labels, masks, position ids. Derived, never stored.

A classification record has no tokens: its label, if the corpus has labels, is a column.

Row t of a sequence is the teacher's distribution over token t + 1 of the same segment, so labels[t]
is tokens[t + 1] and nothing is ever shifted afterwards. The last row of a segment predicts nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitstore.record.record import Record

__all__ = ["IGNORE", "has_label", "labels", "loss_mask", "position_ids"]

# Label of a row that predicts nothing; the value losses and trainers ignore.
IGNORE = -100


def has_label(record: Record) -> NDArray[np.bool_]:
    """bool [P]: the next position belongs to the same sample and segment.

    A classification record has a label at every position, or at none.
    """
    if _is_classification(record):
        labelled = record.schema.column("label") is not None
        return np.full(record.num_positions, labelled, np.bool_)
    out = np.zeros(record.num_positions, np.bool_)
    if record.num_positions:
        segment = record["segment_ids"]
        out[:-1] = segment[1:] == segment[:-1]
        out[record.sample_offsets()[1:] - 1] = False
    return out


def labels(record: Record) -> NDArray[np.int64]:
    """int64 [P]: the next token, or -100 on the last row of each segment; for classification the
    class, or -100 where the corpus has no labels."""
    out = np.full(record.num_positions, IGNORE, np.int64)
    if _is_classification(record):
        return record["label"].astype(np.int64) if has_label(record).any() else out
    rows = np.flatnonzero(has_label(record))
    out[rows] = record["tokens"][rows + 1]
    return out


def loss_mask(record: Record) -> NDArray[np.bool_]:
    """bool [P]: rows that count. The stored mask where there is one, and never a row of a sequence
    without a label; a teacher's answer about an image counts whether the image has a label or
    not."""
    if _is_classification(record):
        mask = np.ones(record.num_positions, np.bool_)
    else:
        mask = has_label(record)
    stored = record.get("loss_mask")
    return mask if stored is None else mask & stored


def position_ids(record: Record) -> NDArray[np.int64]:
    """int64 [P]: 0, 1, 2, ... restarting at every segment."""
    count = record.num_positions
    index = np.arange(count, dtype=np.int64)
    starts = np.zeros(count, np.bool_)
    starts[record.sample_offsets()[:-1]] = True
    if "segment_ids" in record and count:
        segment = record["segment_ids"]
        starts[1:] |= segment[1:] != segment[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def _is_classification(record: Record) -> bool:
    return record.schema.column("tokens") is None
