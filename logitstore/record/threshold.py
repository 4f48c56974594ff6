"""Decoding threshold records: from stored and implied masses to ids with weights.

What is stored is described in `logitstore.signals.threshold`: the realised next token is not stored
at all (its id is the label, its probability `label_logprob`), the probability of the head whose
log-prob reads 0 is what is missing to 1, the tail ids of a position share the tail's mass equally.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.record.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.spec.signals import HEAD_STEP

__all__ = ["ThresholdEntries", "decode_threshold"]


class ThresholdEntries(NamedTuple):
    """Entries of P positions, one position after another: heads in the teacher's order as far as
    it is stored (the largest first, the others by rounded weight), then tail ids ascending.

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
    """All entries of a threshold record. Needs the signal's columns and, where the store has
    labels, those and `label_logprob`."""
    num_positions = record.num_positions
    heads = record["num_heads"].astype(np.int64)
    tails = record["num_tails"].astype(np.int64)
    head_owner = np.repeat(np.arange(num_positions), heads)
    value = np.exp(record["head_logprobs"].astype(np.float64))
    is_largest = value == 1

    label = labels(record)
    has_label = label != IGNORE
    label_probs = np.zeros(num_positions)
    if has_label.any():
        label_probs = np.exp(record["label_logprob"].astype(np.float64))
    known = np.zeros(num_positions)
    if always_ids:
        always = np.exp(record["always_logprobs"].astype(np.float64))
        # A label among the always-ids is one entry, theirs.
        has_label &= ~(label[:, None] == np.array(always_ids)).any(-1)
        known = always.sum(-1)
    known = known + np.where(has_label, label_probs, 0.0)

    tail_mass = np.maximum(1.0 - known, 0.0)
    tail_mass[heads > 0] = np.exp(record["tail_logprob"].astype(np.float64))[heads > 0]
    value[is_largest] = 0.0
    others = np.bincount(head_owner, weights=value, minlength=num_positions)
    top = np.maximum(1.0 - known - tail_mass - others, 0.0)
    value[is_largest] = top[head_owner[is_largest]]

    # Ascending steps are descending log-probs; the largest head, which reads 0, comes first even
    # where rounding left another one a larger weight. The label joins the heads by weight.
    steps = np.rint(record["head_logprobs"] / -HEAD_STEP).astype(np.int64)
    order = np.argsort(head_owner * 65_536 + steps, kind="stable")
    slot = np.empty(len(order), np.int64)
    slot[order] = _index_in_owner(heads)
    ahead = np.bincount(head_owner, value > label_probs[head_owner], num_positions).astype(np.int64)
    behind_label = has_label[head_owner] & (slot >= ahead[head_owner])

    label_at = np.flatnonzero(has_label)
    tail_owner = np.repeat(np.arange(num_positions), tails)
    num_heads = heads + has_label
    begin = np.cumsum(num_heads + tails) - num_heads - tails
    place = np.concatenate(
        [
            begin[head_owner] + slot + behind_label,
            begin[label_at] + ahead[label_at],
            (begin + num_heads)[tail_owner] + _index_in_owner(tails),
        ]
    )
    ids = np.empty(len(place), np.int64)
    ids[place] = np.concatenate([record["head_ids"], label[label_at], record["tail_ids"]])
    weights = np.empty(len(place))
    tail_weight = tail_mass / np.maximum(tails, 1)
    weights[place] = np.concatenate([value, label_probs[label_at], tail_weight[tail_owner]])
    is_label = np.zeros(len(place), np.bool_)
    is_label[place[len(slot) : len(slot) + len(label_at)]] = True
    return ThresholdEntries(ids, weights, num_heads, tails, tail_mass, is_label)


def _index_in_owner(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, .. for the entries of each owner."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
