"""Statistics of a chunk or shard, and how they merge. Sums are float64 and added in stored
order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.record.record import Record
from logitstore.record.sequences import has_label, loss_mask
from logitstore.spec.statistics import CumulativeMass, Histogram, Measure, Reliability, Statistics

__all__ = ["RELIABILITY_BINS", "merge", "statistics_of"]

# measure -> (low, width, bins) of its histogram
_BINS: dict[str, tuple[float, float, int]] = {
    "entropy": (0.0, 0.25, 56),  # nats; log(2^20) = 13.9
    "top1_prob": (0.0, 0.05, 20),
    "label_logprob": (-20.0, 0.25, 80),  # nats
    "label_rank_log2": (0.0, 1.0, 17),  # log2(1 + rank), ranks saturate at 65,535
    "kept_mass": (0.0, 0.02, 50),
    "num_ids": (0.0, 1.0, 129),
}

RELIABILITY_BINS = 15


def statistics_of(record: Record) -> Statistics:
    """Statistics of a record, from whichever of these columns it holds.

    Measures: entropy, top1_prob, kept_mass and num_ids over all positions; label_logprob and
    label_rank_log2 (log2 of 1 + rank) over positions whose loss_mask is 1.
    """
    mask = loss_mask(record) & has_label(record)
    values = dict(_position_values(record))
    for name, column in (("label_logprob", "label_logprob"), ("label_rank_log2", "label_rank")):
        if column in record:
            labelled = record[column][mask].astype(np.float64)
            values[name] = np.log2(1 + labelled) if column == "label_rank" else labelled
    reliability = None
    if "top1_prob" in values and "label_rank" in record:
        reliability = _reliability(values["top1_prob"][mask], record["label_rank"][mask] == 0)
    return Statistics(
        labels=int(mask.sum()),
        measures={name: _measure(name, v) for name, v in sorted(values.items())},
        reliability=reliability,
    )


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all parts together, added in the order given."""
    labels = 0
    measures: dict[str, Measure] = {}
    reliability: Reliability | None = None
    mass: CumulativeMass | None = None
    for part in parts:
        labels += part.labels
        for name, measure in part.measures.items():
            held = measures.get(name)
            measures[name] = measure if held is None else _add(held, measure)
        if part.reliability is not None:
            reliability = _add_reliability(reliability, part.reliability)
        if part.cumulative_mass is not None:
            mass = _add_mass(mass, part.cumulative_mass)
    return Statistics(
        labels=labels, measures=measures, reliability=reliability, cumulative_mass=mass
    )


def _position_values(record: Record) -> Iterable[tuple[str, NDArray[np.float64]]]:
    if "entropy" in record:
        yield "entropy", record["entropy"].astype(np.float64)
    if "top1_logprob" in record:
        yield "top1_prob", np.exp(record["top1_logprob"].astype(np.float64))
    elif "logprobs" in record and record["logprobs"].ndim == 2:
        yield "top1_prob", np.exp(record["logprobs"][:, 0].astype(np.float64))
    elif "logprobs" in record:
        first = record.group_offsets("ids")[:-1]
        yield "top1_prob", np.exp(record["logprobs"][first].astype(np.float64))
    if "log_tail" in record:
        yield "kept_mass", -np.expm1(record["log_tail"].astype(np.float64))
    elif "tail_logprob" in record:
        yield "kept_mass", -np.expm1(record["tail_logprob"].astype(np.float64))
    counts = [record[c] for c in ("num_ids", "num_heads", "num_tails") if c in record]
    if counts:
        yield "num_ids", np.sum(np.stack(counts).astype(np.float64), axis=0)


def _measure(name: str, values: NDArray[np.float64]) -> Measure:
    # A log-prob of -inf (a label the teacher excludes) counts in the lowest bin and at -1e4 in
    # sums.
    values = np.clip(values, -1e4, 1e4)
    low, width, bins = _BINS[name]
    index = np.clip(np.floor((values - low) / width), 0, bins - 1).astype(np.int64)
    return Measure(
        count=len(values),
        total=float(values.sum()),
        total_squares=float(np.square(values).sum()),
        least=float(values.min()) if len(values) else 0.0,
        greatest=float(values.max()) if len(values) else 0.0,
        histogram=Histogram(low=low, width=width, counts=_ints(np.bincount(index, minlength=bins))),
    )


def _reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> Reliability:
    bins = RELIABILITY_BINS
    index = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    return Reliability(
        counts=_ints(np.bincount(index, minlength=bins)),
        correct=_ints(np.bincount(index[correct], minlength=bins)),
        confidence=tuple(float(x) for x in np.bincount(index, weights=confidence, minlength=bins)),
    )


def _add(a: Measure, b: Measure) -> Measure:
    if not a.count or not b.count:
        return b if not a.count else a
    return Measure(
        count=a.count + b.count,
        total=a.total + b.total,
        total_squares=a.total_squares + b.total_squares,
        least=min(a.least, b.least),
        greatest=max(a.greatest, b.greatest),
        histogram=Histogram(
            low=a.histogram.low,
            width=a.histogram.width,
            counts=_sum(a.histogram.counts, b.histogram.counts),
        ),
    )


def _add_reliability(a: Reliability | None, b: Reliability) -> Reliability:
    if a is None:
        return b
    return Reliability(
        counts=_sum(a.counts, b.counts),
        correct=_sum(a.correct, b.correct),
        confidence=_sum(a.confidence, b.confidence),
    )


def _add_mass(a: CumulativeMass | None, b: CumulativeMass) -> CumulativeMass:
    if a is None:
        return b
    # Writers of other versions may have chosen other ranks: what both tell can be added.
    ks = tuple(k for k in a.ks if k in set(b.ks))
    one, other = _at_ranks(a, ks), _at_ranks(b, ks)
    return CumulativeMass(
        positions=a.positions + b.positions,
        ks=ks,
        mass=_sum(one.mass, other.mass),
        reach={
            level: _sum(counts, other.reach[level])
            for level, counts in one.reach.items()
            if level in other.reach
        },
    )


def _at_ranks(found: CumulativeMass, ks: tuple[int, ...]) -> CumulativeMass:
    """The curve at some of its ranks; a position that reached a level at one left out counts at the
    next that is kept."""
    if ks == found.ks:
        return found
    kept = [found.ks.index(k) for k in ks]
    ends = [0, *(i + 1 for i in kept)]
    return CumulativeMass(
        positions=found.positions,
        ks=ks,
        mass=tuple(found.mass[i] for i in kept),
        reach={
            level: tuple(sum(counts[i:j]) for i, j in pairwise(ends))
            for level, counts in found.reach.items()
        },
    )


def _sum(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _ints(counts: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(c) for c in counts)
