"""Decoding threshold records: from slots and implied masses to ids with weights.

What is stored is described in `logitstore.signals.threshold`: the realised next token is not stored
at all (its id is the label, its probability `label_logprob`), the first head slot holds the log of
the tail's mass, the largest head probability is what is missing to 1, every tail id weighs the
same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.record.record import Record
from logitstore.record.sequences import IGNORE, labels

__all__ = ["ThresholdEntries", "decode_threshold"]


class ThresholdEntries(NamedTuple):
    """Entries of P positions, one position after another: heads descending, then tail ids
    ascending.

    Attributes:
        ids: int64 [E].
        weights: float64 [E]; of a position, with its always-ids, they add up to 1.
        num_heads, num_tails: int64 [P]; a label that is no always-id counts as a head.
        tail_mass: float64 [P], mass outside the heads.
        is_label: bool [E].
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    num_heads: NDArray[np.int64]
    num_tails: NDArray[np.int64]
    tail_mass: NDArray[np.float64]
    is_label: NDArray[np.bool_]


def decode_threshold(record: Record, always_ids: tuple[int, ...]) -> ThresholdEntries:
    """All entries of a threshold record. Needs the signal's columns, labels and `label_logprob`."""
    num_positions = record.num_positions
    heads = record["num_heads"].astype(np.int64)
    tails = record["num_tails"].astype(np.int64)
    slot_owner = np.repeat(np.arange(num_positions), heads)
    value = np.exp(record["head_logprobs"].astype(np.float64))
    first = (np.cumsum(heads) - heads)[heads > 0]

    label = labels(record)
    label_probs = np.exp(record["label_logprob"].astype(np.float64))
    has_label = label != IGNORE
    known = np.zeros(num_positions)
    if always_ids:
        always = np.exp(record["always_logprobs"].astype(np.float64))
        # A label among the always-ids is one entry, theirs.
        has_label &= ~(label[:, None] == np.array(always_ids)).any(-1)
        known = always.sum(-1)
    known = known + np.where(has_label, label_probs, 0.0)

    tail_mass = np.maximum(1.0 - known, 0.0)
    tail_mass[heads > 0] = value[first]
    value[first] = 0.0
    others = np.bincount(slot_owner, weights=value, minlength=num_positions)
    top = np.maximum(1.0 - known - tail_mass - others, 0.0)
    value[first] = top[heads > 0]

    label_at = np.flatnonzero(has_label)
    tail_owner = np.repeat(np.arange(num_positions), tails)
    owner = np.concatenate([slot_owner, label_at, tail_owner])
    ids = np.concatenate(
        [record["head_ids"].astype(np.int64), label[label_at], record["tail_ids"].astype(np.int64)]
    )
    tail_weight = (tail_mass / np.maximum(tails, 1))[tail_owner]
    weights = np.concatenate([value, label_probs[label_at], tail_weight])
    kind = np.repeat([0, 1, 2], [len(slot_owner), len(label_at), len(tail_owner)])
    # Heads keep the teacher's order, which rounding may blur in their weights; the label joins them
    # by weight.
    slot = np.arange(len(slot_owner)) - (np.cumsum(heads) - heads)[slot_owner]
    above = value > label_probs[slot_owner]
    label_place = np.bincount(slot_owner, weights=above, minlength=num_positions)[label_at] - 0.5
    place = np.concatenate([slot, label_place, ids[len(slot_owner) + len(label_at) :]])
    order = np.lexsort((place, kind == 2, owner))
    return ThresholdEntries(
        ids[order], weights[order], heads + has_label, tails, tail_mass, kind[order] == 1
    )
