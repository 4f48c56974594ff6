"""The ids a position keeps, with what is known about each and about the mass outside.

Letters: P positions of the sample, E entries of a position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.record.threshold import ThresholdEntries, decode_threshold
from logitstore.spec.header import Header
from logitstore.spec.signals import EMPTY_SLOT, SampledSpec, ThresholdSpec

__all__ = ["EXPLAINED", "Entries", "SampleEntries", "log_softmax"]

# What each way of knowing the mass outside means, for the page.
EXPLAINED = {
    "exact": "summed over the whole vocabulary at capture",
    "estimated": "1 − the sum of the stored, rounded probabilities",
    "unknown": "a random sample does not tell it; its weights estimate the whole distribution",
    "none": "every id is stored",
    "undefined": "scores are no distribution",
}


@dataclass(frozen=True)
class Entries:
    """What one position keeps, the heaviest first.

    Attributes:
        ids: int64 [E].
        values: float64 [E]; probabilities, estimates of them for drawn ids, or raw scores.
        exact: bool [E]; False for ids that were drawn at random.
        ranked: how many leading entries stand at their true rank.
        counts: how often each id was drawn, for `sampled`.
        num_heads: for `threshold`: the first so many are kept exactly, the others were drawn.
        outside: teacher mass outside the exact ids, None when it is not known.
        outside_kind: a key of `EXPLAINED`.
        label_logprob: of the realised next token, when known.
        top1: the teacher's most probable id, when known.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    exact: NDArray[np.bool_]
    ranked: int
    outside: float | None
    outside_kind: str
    counts: NDArray[np.int64] | None = None
    num_heads: int | None = None
    label: int | None = None
    label_logprob: float | None = None
    label_rank: int | None = None
    top1: int | None = None
    always: dict[int, float] = field(default_factory=dict)

    def cumulative_mass(self) -> NDArray[np.float64] | None:
        """float64 [k]: mass of the 1, 2, ..., k most probable ids, as far as the record tells.

        None where ranks are not known: drawn ids, and scores.
        """
        if not self.ranked or self.outside_kind == "undefined":
            return None
        return np.minimum(self.values[: self.ranked].cumsum(), 1.0)


class SampleEntries:
    """Entries of any position of one sample."""

    def __init__(self, record: Record, header: Header) -> None:
        self.record = record
        self.header = header
        self.labels = labels(record)

    def at(self, position: int) -> Entries | None:
        """What the position keeps; None for signals that keep no ids of a position."""
        signal = self.header.signal
        build: Callable[[int], dict[str, Any]] | None = {
            "topk": self._topk,
            "sampled": self._sampled,
            "threshold": self._threshold,
            "dense": self._dense,
            "scores": self._scores,
        }.get(signal.kind)
        if build is None:
            return None
        return Entries(**build(position), **self.label(position), always=self._always(position))

    def _topk(self, p: int) -> dict[str, Any]:
        record = self.record
        ids, logprobs = self._group("ids", "logprobs", p)
        logprobs = logprobs.astype(np.float64)
        if "top1_logprob" in record and len(logprobs):
            logprobs[0] = record["top1_logprob"][p]
        values = np.exp(logprobs)
        kind, outside = "estimated", float(max(0.0, 1.0 - values.sum()))
        if "log_tail" in record:
            kind, outside = "exact", float(np.exp(np.float64(record["log_tail"][p])))
        ids = ids.astype(np.int64)
        return {
            "ids": ids,
            "values": values,
            "exact": np.ones(len(ids), np.bool_),
            "ranked": len(ids),
            "outside": outside,
            "outside_kind": kind,
            "top1": int(ids[0]) if len(ids) else None,
        }

    def _sampled(self, p: int) -> dict[str, Any]:
        ids, counts = self._group("ids", "counts", p)
        if "weights" in self.record:
            _, weights = self._group("ids", "weights", p)
            values = weights.astype(np.float64)
        else:
            # Draws are from what the always-ids leave.
            rest = max(0.0, 1.0 - sum(np.exp(v) for v in self._always(p).values()))
            assert isinstance(self.header.signal, SampledSpec)
            values = counts / self.header.signal.rounds * rest
        order = np.argsort(-values, kind="stable")
        return {
            "ids": ids.astype(np.int64)[order],
            "values": values[order],
            "counts": counts.astype(np.int64)[order],
            "exact": np.zeros(len(ids), np.bool_),
            "ranked": 0,
            "outside": None,
            "outside_kind": "unknown",
        }

    @cached_property
    def _decoded(self) -> tuple[ThresholdEntries, NDArray[np.int64]]:
        entries = decode_threshold(self.record, self.header.always_ids)
        sizes = entries.num_heads + entries.num_tails
        return entries, np.concatenate([[0], np.cumsum(sizes)])

    def _threshold(self, p: int) -> dict[str, Any]:
        entries, offsets = self._decoded
        part = slice(int(offsets[p]), int(offsets[p + 1]))
        heads = int(entries.num_heads[p])
        ids, values = entries.ids[part], entries.weights[part]
        exact = np.arange(len(ids)) < heads
        order = np.concatenate(
            [np.argsort(-values[:heads], kind="stable"), np.arange(heads, len(ids))]
        )
        # A label alone says nothing about its rank: it is kept however improbable it is. Whatever
        # reaches tau is among the heads, so that all of these stand at their rank.
        assert isinstance(self.header.signal, ThresholdSpec)
        tau = self.header.signal.tau_value
        reach = 0 if tau is None else int((values[:heads] >= tau).sum())
        stored_heads = int(self.record["num_heads"][p])
        ids = ids[order.astype(np.int64)]
        return {
            "ids": ids,
            "values": values[order.astype(np.int64)],
            "exact": exact,
            "ranked": max(stored_heads, reach),
            "num_heads": heads,
            "outside": float(entries.tail_mass[p]),
            "outside_kind": "exact",
            "top1": int(ids[0]) if max(stored_heads, reach) else None,
        }

    def _dense(self, p: int) -> dict[str, Any]:
        logprobs = log_softmax(self.record["logits"][p])
        order = np.argsort(-logprobs, kind="stable")
        return {
            "ids": order.astype(np.int64),
            "values": np.exp(logprobs[order]),
            "exact": np.ones(len(order), np.bool_),
            "ranked": len(order),
            "outside": 0.0,
            "outside_kind": "none",
            "top1": int(order[0]),
        }

    def _scores(self, p: int) -> dict[str, Any]:
        ids, scores = self.record["ids"][p], self.record["scores"][p].astype(np.float64)
        ids, scores = ids[ids != EMPTY_SLOT], scores[ids != EMPTY_SLOT]
        order = np.argsort(-scores, kind="stable")
        return {
            "ids": ids.astype(np.int64)[order],
            "values": scores[order],
            "exact": np.ones(len(ids), np.bool_),
            "ranked": 0,
            "outside": None,
            "outside_kind": "undefined",
        }

    def label(self, p: int) -> dict[str, Any]:
        """What is known of the realised next token: `label`, `label_logprob`, `label_rank`."""
        label = int(self.labels[p])
        if label == IGNORE:
            return {}
        record = self.record
        out: dict[str, Any] = {"label": label}
        if "label_logprob" in record:
            out["label_logprob"] = float(record["label_logprob"][p])
        if "label_rank" in record:
            out["label_rank"] = int(record["label_rank"][p])
        return out

    def _always(self, p: int) -> dict[int, float]:
        if "always_logprobs" not in self.record:
            return {}
        logprobs = self.record["always_logprobs"][p]
        return {i: float(v) for i, v in zip(self.header.always_ids, logprobs, strict=True)}

    def _group(self, ids: str, values: str, p: int) -> tuple[NDArray[Any], NDArray[Any]]:
        column = self.record.schema.column(ids)
        assert column is not None
        if column.axis == "position":
            return self.record[ids][p], self.record[values][p]
        start, stop = self._offsets[p : p + 2]
        return self.record[ids][start:stop], self.record[values][start:stop]

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return self.record.group_offsets("ids")


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Natural log-probs of raw logits, over the last axis, in float64."""
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)), np.float64)
