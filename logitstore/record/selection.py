"""Which samples of a store a dataset uses: a hold-out by key, and conditions on stored values.

A filter is a sequence of conditions (field, operator, value) that must all hold, in the form that
Parquet readers use:

    filter=[("labels", ">=", 32), ("entropy.mean", ">", 0.5), ("label_logprob.min", ">", -12.0)]

It is plain data: it travels to worker processes, into saved states and into messages as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.record.random import key_of, uniform
from logitstore.record.record import Record
from logitstore.record.sequences import loss_mask
from logitstore.record.views import image_key
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header

__all__ = ["Condition", "Selection", "Split", "in_holdout", "parse_conditions"]

Split = Literal["train", "validation"]
Value = str | int | float | list[str] | list[int] | list[float]
Bools = NDArray[np.bool_]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda values, allowed: np.isin(values, allowed),
    "not in": lambda values, refused: ~np.isin(values, refused),
}
_STATISTICS = ("mean", "min", "max")
# The hold-out must not move when a user tries another shuffle.
_HOLDOUT_SEED = 0


@dataclass(frozen=True)
class Condition:
    """One comparison of a sample's value.

    Attributes:
        field: `length` (positions), `labels` (positions that count), `sample_key`, `label` (the
            class, classification only), `view` (number of the view of its image), or
            `<column>.mean|min|max` over the positions that count, for any stored column with one
            value per position. A sample without such positions fails.
    """

    field: str
    operator: str
    value: Value

    def as_json(self) -> list[Any]:
        """[field, operator, value]."""
        return [self.field, self.operator, self.value]

    @property
    def columns(self) -> set[str]:
        """Stored columns that deciding it needs, beside lengths, segments and mask."""
        if self.field in ("length", "labels"):
            return set()
        return {self.field.partition(".")[0]}

    def holds(self, record: Record) -> Bools:
        """bool [S]."""
        values, defined = self._values(record)
        return np.asarray(_COMPARE[self.operator](values, self.value)) & defined

    def _values(self, record: Record) -> tuple[NDArray[Any], Bools]:
        always = np.ones(record.num_samples, bool)
        if self.field == "length":
            return record["sample_lengths"], always
        if self.field == "sample_key":
            return np.array(record.sample_keys(), dtype=object), always
        if self.field in ("label", "view"):
            return record[self.field], always
        counted_P = loss_mask(record)
        sample_P = np.repeat(np.arange(record.num_samples), record["sample_lengths"])[counted_P]
        counts_S = np.bincount(sample_P, minlength=record.num_samples)
        if self.field == "labels":
            return counts_S, always
        name, _, statistic = self.field.partition(".")
        values_P = record[name][counted_P].astype(np.float64)
        if statistic == "mean":
            sums_S = np.bincount(sample_P, values_P, minlength=record.num_samples)
            return sums_S / np.maximum(counts_S, 1), counts_S > 0
        lowest = statistic == "min"
        out_S = np.full(record.num_samples, np.inf if lowest else -np.inf)
        (np.minimum if lowest else np.maximum).at(out_S, sample_P, values_P)
        return out_S, counts_S > 0


def parse_conditions(
    filter: Iterable[Sequence[Any]] | None, header: Header
) -> tuple[Condition, ...]:
    """The conditions of a `filter=` argument.

    Raises: UsageError bad-argument.
    """
    return tuple(_parse(entry, header) for entry in filter or ())


def _parse(entry: Sequence[Any], header: Header) -> Condition:
    if isinstance(entry, str) or len(entry) != 3:
        raise _bad(entry, "is no condition", "(field, operator, value)")
    name, symbol, value = entry
    fields = _fields(header)
    if name not in fields:
        raise _bad(entry, f"has no field {name!r} to look at", ", ".join(fields))
    if symbol not in _COMPARE:
        raise _bad(entry, f"has no operator {symbol!r}", ", ".join(_COMPARE))
    if symbol in ("in", "not in"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise _bad(entry, "compares with one value", "a list")
        value = list(value)
    kinds = (str,) if name == "sample_key" else (int, float)
    if not all(isinstance(v, kinds) for v in (value if isinstance(value, list) else [value])):
        raise _bad(entry, "compares unlike things", " or ".join(k.__name__ for k in kinds))
    return Condition(name, symbol, value)


def _fields(header: Header) -> list[str]:
    fields = ["length", "sample_key"]
    if header.sample_kind == "sequence":
        fields.append("labels")
    elif header.schema_.column("label") is not None:
        fields.append("label")
    if header.schema_.column("view") is not None:
        fields.append("view")
    structure = {"tokens", "segment_ids", "loss_mask", "label"}
    for column in header.schema_.columns:
        if column.axis == "position" and not column.inner and column.name not in structure:
            fields += [f"{column.name}.{statistic}" for statistic in _STATISTICS]
    return fields


@dataclass(frozen=True)
class Selection:
    """What decides whether a sample is used, by itself.

    Attributes:
        holdout: share of samples in the validation split, [0, 1).
        split: which side of the hold-out.
        conditions: of `filter=`.
    """

    holdout: float = 0.0
    split: Split = "train"
    conditions: tuple[Condition, ...] = ()

    @property
    def columns(self) -> set[str] | None:
        """Stored columns to look at, or None when every sample is used."""
        if not self.holdout and not self.conditions:
            return None
        columns = {"sample_key"} if self.holdout else set()
        return columns.union(*(c.columns for c in self.conditions))

    def keeps(self, record: Record) -> Bools:
        """bool [S]: which of a chunk's samples are used."""
        keep_S = np.ones(record.num_samples, bool)
        if self.holdout:
            keys = record.sample_keys()
            if record.schema.column("view") is not None:
                # All views of an image stand on one side.
                keys = [image_key(key) for key in keys]
            held_S = np.array([in_holdout(key, self.holdout) for key in keys])
            keep_S &= held_S if self.split == "validation" else ~held_S
        for condition in self.conditions:
            keep_S &= condition.holds(record)
        return keep_S


def in_holdout(sample_key: str, share: float) -> bool:
    """Whether a sample belongs to the validation split: a function of its name alone.

    A sample stays on its side whatever is appended, filtered or shuffled, and in every store made
    from the same corpus.
    """
    return float(uniform(_HOLDOUT_SEED, key_of(sample_key), 0, 0)) < share


def _bad(entry: Any, what: str, expected: str) -> UsageError:
    return UsageError(
        "bad-argument", f"filter condition {what}", got=repr(entry), expected=expected
    )
