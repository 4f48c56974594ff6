"""The per-position measures a heat map shows, where each comes from, and its scale.

Every scale runs from sure to unsure, so that a stronger colour always means the same: the teacher
is less sure, was more wrong, or the store holds less of what it said. Scales are fixed, never
fitted to a sample: the same colour is the same value everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.display.entries import SampleEntries, log_softmax
from logitstore.record import Record
from logitstore.record.sequences import IGNORE, has_label, labels
from logitstore.spec.header import Header

__all__ = ["MEASURES", "Measured", "Scale", "derives_from_logits", "measure_sample"]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A measure's name for people and its colours.

    Attributes:
        name: in URLs and JSON.
        title, unit: for people.
        breaks: values at which the next level begins, from sure to unsure; level 0 lies before the
            first.
        aux: the `precompute --aux` name that stores it; None when no flag does.
    """

    name: str
    title: str
    unit: str
    breaks: tuple[float, ...]
    aux: str | None
    digits: int = 3

    @property
    def rising(self) -> bool:
        """Whether greater values are less sure."""
        return self.breaks[-1] > self.breaks[0]

    def as_dict(self, *, source: str, how: str) -> dict[str, Any]:
        """For pages and their script."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "source": source,
            "how": how,
            "breaks": list(self.breaks),
            "rising": self.rising,
            "digits": self.digits,
        }

    def levels(self, values: Values) -> NDArray[np.int64]:
        """int64, 0 to len(breaks); -1 where there is no value."""
        sign = 1.0 if self.rising else -1.0
        found = np.searchsorted(sign * np.array(self.breaks), sign * values, side="right")
        return np.where(np.isnan(values), -1, found).astype(np.int64)


MEASURES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale("entropy", "Entropy", "nats", (0.5, 1, 2, 3, 4, 5, 6), "entropy", 2),
        Scale(
            "top1_prob",
            "Top-1 probability",
            "",
            (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1),
            "top1_logprob",
        ),
        Scale(
            "label_logprob",
            "Label log-prob",
            "nats",
            (-0.25, -0.7, -1.5, -3, -5, -7, -10),
            "label_logprob",
            2,
        ),
        Scale("label_rank", "Label rank", "", (1, 2, 5, 10, 50, 200, 1000), "label_rank", 0),
        Scale("kept_mass", "Kept mass", "", (0.99, 0.97, 0.95, 0.9, 0.8, 0.65, 0.5), "log_tail", 4),
    )
}


@dataclass(frozen=True)
class Measured:
    """A measure over the positions of one sample.

    Attributes:
        source: "stored", "derived" or "unavailable".
        how: where it comes from, or why it is not there and what would store it.
        values: float64 [P], NaN where the measure has no value; None when unavailable.
    """

    scale: Scale
    source: str
    how: str
    values: Values | None


def derives_from_logits(record: Record, names: Iterable[str]) -> bool:
    """Whether any of these measures takes a pass over the whole vocabulary of every position."""
    if "logits" not in record:
        return False
    return any(name in _COLUMNS and _COLUMNS[name] not in record for name in names)


def measure_sample(
    entries: SampleEntries, names: Iterable[str] = tuple(MEASURES)
) -> dict[str, Measured]:
    """These measures of a sample; default: all, in the order of `MEASURES`."""
    record, header = entries.record, entries.header
    names = tuple(names)
    dense = log_softmax(record["logits"]) if derives_from_logits(record, names) else None
    found: dict[str, Measured] = {}
    for name in names:
        scale = MEASURES[name]
        source, how, values = _FINDERS[name](record, entries, dense)
        if values is None:
            found[name] = Measured(scale, "unavailable", how or _missing(scale, header), None)
        else:
            found[name] = Measured(scale, source, how, np.asarray(values, np.float64))
    return found


# Where a measure is stored as a column, that column.
_COLUMNS = {
    "entropy": "entropy",
    "top1_prob": "top1_logprob",
    "label_logprob": "label_logprob",
    "label_rank": "label_rank",
}

Found = tuple[str, str, Any]
_NONE: Found = ("", "", None)


def _entropy(record: Record, entries: SampleEntries, dense: Values | None) -> Found:
    if "entropy" in record:
        return "stored", "computed over the whole vocabulary at capture", record["entropy"]
    if dense is not None:
        # An id that cannot occur adds nothing.
        terms = np.exp(dense) * np.where(np.isfinite(dense), dense, 0.0)
        return "derived", "from the stored logits", -terms.sum(-1)
    return _NONE


def _top1(record: Record, entries: SampleEntries, dense: Values | None) -> Found:
    if "top1_logprob" in record:
        return "stored", "column top1_logprob", np.exp(record["top1_logprob"].astype(np.float64))
    if dense is not None:
        return "derived", "from the stored logits", np.exp(dense.max(-1))
    kind = entries.header.signal.kind
    if kind == "topk":
        ids = record.schema.column("ids")
        first: Any = (
            record["logprobs"][:, 0] if ids is not None and ids.axis == "position" else None
        )
        if first is None:
            first = record["logprobs"][record.group_offsets("ids")[:-1]]
        return "derived", "the first kept id", np.exp(first.astype(np.float64))
    if kind == "threshold":
        tops = [entries.at(p) for p in range(record.num_positions)]
        values = [np.nan if e is None or e.top1 is None else e.values[0] for e in tops]
        return "derived", "the largest head; no value where no id reaches tau", np.array(values)
    return _NONE


def _label_logprob(record: Record, entries: SampleEntries, dense: Values | None) -> Found:
    known = has_label(record)
    if "label_logprob" in record:
        values = record["label_logprob"].astype(np.float64)
        return "stored", "of the realised next token", np.where(known, values, np.nan)
    if dense is not None and known.any():
        label = labels(record)
        values = dense[np.arange(len(label)), np.where(known, label, 0)]
        return "derived", "from the stored logits", np.where(known, values, np.nan)
    return _NONE


def _label_rank(record: Record, entries: SampleEntries, dense: Values | None) -> Found:
    known = has_label(record)
    if "label_rank" in record:
        values = record["label_rank"].astype(np.float64)
        return "stored", "0 is the most probable id", np.where(known, values, np.nan)
    if dense is not None and known.any():
        label = np.where(labels(record) == IGNORE, 0, labels(record))
        own = dense[np.arange(len(label)), label]
        return (
            "derived",
            "from the stored logits",
            np.where(known, (dense > own[:, None]).sum(-1), np.nan),
        )
    return _NONE


def _kept_mass(record: Record, entries: SampleEntries, dense: Values | None) -> Found:
    if "logits" in record:
        return "derived", "every id is stored", np.ones(record.num_positions)
    if "log_tail" in record:
        values = -np.expm1(record["log_tail"].astype(np.float64))
        return "stored", "1 − exp(log_tail), summed over the whole vocabulary", values
    kind = entries.header.signal.kind
    if kind == "topk":
        owner = record.schema.column("ids")
        if owner is not None and owner.axis == "position":
            return (
                "derived",
                "sum of the stored, rounded probabilities",
                np.exp(record["logprobs"].astype(np.float64)).sum(-1),
            )
        sums = [e.values.sum() for p in range(record.num_positions) if (e := entries.at(p))]
        return "derived", "sum of the stored, rounded probabilities", np.array(sums)
    if kind == "threshold":
        heads = [
            1.0 - (e.outside or 0.0) for p in range(record.num_positions) if (e := entries.at(p))
        ]
        return "stored", "mass of the exact head; drawn ids stand for the rest", np.array(heads)
    if kind == "sampled":
        return "", "The mass outside a random sample says nothing about the teacher.", None
    return "", f"A {kind} record has no kept mass.", None


_FINDERS: dict[str, Callable[[Record, SampleEntries, Values | None], Found]] = {
    "entropy": _entropy,
    "top1_prob": _top1,
    "label_logprob": _label_logprob,
    "label_rank": _label_rank,
    "kept_mass": _kept_mass,
}


def _missing(scale: Scale, header: Header) -> str:
    if header.signal.kind == "scores":
        return "Scores of given candidates are no distribution."
    if scale.name.startswith("label") and header.sample_kind == "classification":
        return "The corpus had no labels, or the capture did not keep this field."
    return f"Not stored. A capture with --aux {scale.aux} stores it."
