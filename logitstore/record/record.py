"""A record: the arrays of consecutive whole samples, as numpy.

Letters: S samples, P positions of all of them, K kept ids, E entries of a ragged group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.spec.errors import FormatError
from logitstore.spec.schema import Column, Group, Schema

__all__ = ["Record"]

Array = NDArray[Any]


class Record:
    """Arrays by column name, positions of all samples one after another.

    A record may hold only some columns of its schema (a column selection), but always
    `sample_lengths` and the count column of every group it has entries of.

    Attributes:
        schema: what the columns mean.
        arrays: name -> array; axis 0 counts samples [S], positions [P] or a group's entries [E].
    """

    def __init__(self, schema: Schema, arrays: Mapping[str, Array]) -> None:
        """Checks names, dtypes and lengths.

        Raises: FormatError chunk-malformed.
        """
        self.schema = schema
        self.arrays: dict[str, Array] = dict(arrays)
        lengths = self.arrays.get("sample_lengths")
        if lengths is None:
            raise _malformed("sample_lengths", "is missing", "uint32 [S]")
        self.num_samples = len(lengths)
        self.num_positions = int(lengths.sum(dtype=np.int64))
        for name, array in self.arrays.items():
            column = schema.column(name)
            if column is None:
                raise _malformed(name, "is not in the schema", "a column of the header")
            shape = (self._axis_length(column.axis), *column.inner)
            if array.dtype != np.dtype(column.dtype) or array.shape != shape:
                raise _malformed(
                    name,
                    f"has dtype {array.dtype} and shape {array.shape}",
                    f"{column.dtype} {shape}",
                )

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str) -> Array | None:
        """The column, or None when this record does not hold it."""
        return self.arrays.get(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(a.nbytes for a in self.arrays.values())

    def sample_offsets(self) -> NDArray[np.int64]:
        """int64 [S + 1]: sample i holds positions offsets[i] to offsets[i + 1]."""
        return _offsets(self.arrays["sample_lengths"])

    def group_offsets(self, group: Group | str) -> NDArray[np.int64]:
        """int64 [owners + 1]: owner i holds entries offsets[i] to offsets[i + 1]."""
        name = group if isinstance(group, str) else group.name
        return _offsets(self.arrays[f"num_{name}"])

    def sample_keys(self) -> list[str]:
        """Stable names of the samples, or an empty list when the store keeps none."""
        data = self.arrays.get("sample_key")
        if data is None:
            return []
        offsets = self.group_offsets("sample_key")
        raw = data.tobytes()
        return [raw[a:b].decode() for a, b in pairwise(offsets)]

    def slice(self, start: int, stop: int) -> Record:
        """Samples start to stop; arrays are views."""
        position = self.sample_offsets()
        bounds = {"sample": (start, stop), "position": (int(position[start]), int(position[stop]))}
        for group in self.schema.groups:
            if group.count_column in self.arrays:
                entry = self.group_offsets(group)
                low, high = bounds[group.owner]
                bounds[group.name] = (int(entry[low]), int(entry[high]))
        arrays = {}
        for name, array in self.arrays.items():
            low, high = bounds[self._column(name).axis]
            arrays[name] = array[low:high]
        return Record(self.schema, arrays)

    def sample(self, index: int) -> Record:
        """One sample."""
        return self.slice(index, index + 1)

    def select(self, columns: Iterable[str]) -> Record:
        """Only these columns (with sample_lengths and the counts their groups need)."""
        keep = columns_needed(self.schema, columns)
        return Record(self.schema, {n: a for n, a in self.arrays.items() if n in keep})

    @staticmethod
    def concat(records: Sequence[Record]) -> Record:
        """Samples of several records of one schema, in order."""
        first = records[0]
        if len(records) == 1:
            return first
        return Record(
            first.schema,
            {n: np.concatenate([r.arrays[n] for r in records]) for n in first.arrays},
        )

    def _column(self, name: str) -> Column:
        column = self.schema.column(name)
        assert column is not None
        return column

    def _axis_length(self, axis: str) -> int:
        if axis == "sample":
            return self.num_samples
        if axis == "position":
            return self.num_positions
        counts = self.arrays.get(f"num_{axis}")
        if counts is None:
            raise _malformed(f"num_{axis}", "is missing", f"the count column of group {axis}")
        return int(counts.sum(dtype=np.int64))


def columns_needed(schema: Schema, columns: Iterable[str]) -> set[str]:
    """`columns` with sample_lengths and every count column their groups need.

    Raises: FormatError chunk-malformed for a name that is not in the schema.
    """
    keep = {"sample_lengths"}
    for name in columns:
        column = schema.column(name)
        if column is None:
            raise _malformed(
                name, "is not in the schema", ", ".join(c.name for c in schema.columns)
            )
        keep.add(name)
        group = schema.group(column.axis)
        if group is not None:
            keep.add(group.count_column)
    return keep


def _offsets(counts: Array) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=offsets[1:])
    return offsets


def _malformed(name: str, what: str, expected: str) -> FormatError:
    return FormatError("chunk-malformed", f"column {name} {what}", expected=expected)
