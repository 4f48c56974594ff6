"""Columns of a record, as the header lists them.

An array's axis 0 counts samples, positions, or the entries of a ragged group. A group belongs to
samples or positions; the column `num_<group>` on that axis says how many entries each owner has.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from logitstore.spec.document import Strict

__all__ = ["Column", "DType", "Group", "Schema"]

DType = Literal["bool", "uint8", "uint16", "uint32", "uint64", "int32", "float16", "float32"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class Column(Strict):
    """One array of a record.

    Attributes:
        name: unique name.
        dtype: numpy name of the values a reader sees.
        axis: "sample", "position", or the name of a group.
        inner: sizes of further axes, such as (K,).
        step: when set, values are stored as integer multiples of -step (nats) and `dtype` is what
            they decode to; the largest error is step / 2 with nearest rounding, step with
            stochastic rounding.
    """

    name: Name
    dtype: DType
    axis: Name
    inner: tuple[Annotated[int, Field(ge=1, le=1 << 24)], ...] = ()
    step: Annotated[float, Field(gt=0)] | None = None


class Group(Strict):
    """A ragged group of entries.

    Attributes:
        name: what `Column.axis` refers to; owners carry the count column `num_<name>`.
        owner: "sample" or "position".
        id_column: column of token ids (ascending inside a position) that the zarr container merges
            with the position to `pair = id * P + position`, P positions in a chunk's arrays, or
            None.
        pairs: name of that merged array, given exactly when id_column is.
        text: True when the entries of an owner are the UTF-8 bytes of one string.
    """

    name: Name
    owner: Literal["sample", "position"]
    id_column: Name | None = None
    pairs: Name | None = None
    text: bool = False

    @property
    def count_column(self) -> str:
        """Name of the column that counts each owner's entries."""
        return f"num_{self.name}"


class Schema(Strict):
    """All columns and groups of a record, in stored order."""

    columns: tuple[Column, ...]
    groups: tuple[Group, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [c.name for c in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("column names must be unique")
        by_name = {c.name: c for c in self.columns}
        groups = {g.name: g for g in self.groups}
        if len(groups) != len(self.groups):
            raise ValueError("group names must be unique")
        if {"sample", "position"} & groups.keys():
            raise ValueError("'sample' and 'position' are not group names")
        for column in self.columns:
            if column.axis not in ("sample", "position") and column.axis not in groups:
                raise ValueError(f"column {column.name}: no axis {column.axis!r}")
        lengths = by_name.get("sample_lengths")
        if lengths is None or lengths.axis != "sample" or lengths.dtype != "uint32":
            raise ValueError("column sample_lengths (uint32, axis sample) is mandatory")
        for group in self.groups:
            count = by_name.get(group.count_column)
            if count is None or count.axis != group.owner or count.inner:
                raise ValueError(f"group {group.name}: needs {group.count_column} on {group.owner}")
            if (group.id_column is None) != (group.pairs is None):
                raise ValueError(f"group {group.name}: id_column and pairs come together")
            if group.id_column is not None:
                ids = by_name.get(group.id_column)
                if ids is None or ids.axis != group.name or group.owner != "position":
                    raise ValueError(f"group {group.name}: id_column must be one of its columns")
                if group.pairs in by_name or f"num_{group.pairs}" in by_name.keys() - {
                    group.count_column
                }:
                    raise ValueError(f"group {group.name}: pairs must not be named like a column")
        return self

    def column(self, name: str) -> Column | None:
        """The column of that name, or None."""
        return self._columns_by_name.get(name)

    def group(self, name: str) -> Group | None:
        """The group of that name, or None."""
        return self._groups_by_name.get(name)

    # Every chunk that is decoded looks up every column.
    @cached_property
    def _columns_by_name(self) -> dict[str, Column]:
        return {column.name: column for column in self.columns}

    @cached_property
    def _groups_by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    # Decoders look their plans up by schema, for every chunk.
    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.columns, self.groups))
