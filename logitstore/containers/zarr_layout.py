"""Which Zarr v3 arrays a shard object holds, and their metadata, from header and layout alone.

Letters: C chunks, S samples of a chunk at most, P positions, E entries of a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from logitstore.containers.codecs import ZSTD_LEVEL
from logitstore.spec.commit import Layout
from logitstore.spec.schema import Group, Schema

__all__ = ["StoredArray", "array_metadata", "group_metadata", "pairs_dtype", "stored_arrays"]

# What a reader accepts in zarr.json: none of these runs code.
ALLOWED_CODECS = frozenset(
    {"bytes", "zstd", "crc32c", "numcodecs.pcodec", "numcodecs.fixedscaleoffset"}
)

_ONE_BYTE = ("bool", "uint8")


@dataclass(frozen=True)
class StoredArray:
    """One Zarr array of shape [C, *size] with chunks [1, *size].

    Attributes:
        name: array name; that of a column unless `role` says otherwise.
        dtype: of the values a stock reader sees.
        axis: "chunk" (one value a chunk), "sample", "position" or a group's name.
        inner: sizes of further axes.
        step: values are multiples of -step, stored as uint16.
        role: "column"; "pairs" for id * P + position; "num_pairs" for the entries of a chunk.
        group: of a pairs or num_pairs array.
    """

    name: str
    dtype: str
    axis: str
    inner: tuple[int, ...] = ()
    step: float | None = None
    role: Literal["column", "pairs", "num_pairs"] = "column"
    group: Group | None = None

    @property
    def stored_dtype(self) -> str:
        """Type that the codec after the step filter sees."""
        return self.dtype if self.step is None else "uint16"

    @property
    def is_pco(self) -> bool:
        """Coded by pco; one-byte types are coded by zstd."""
        return self.stored_dtype not in _ONE_BYTE

    @property
    def pco_level(self) -> int:
        """How hard pco tries; readers need not know.

        A tokenizer's ids have no smooth distribution: on real top-64 rows, the finer bins of level
        11 save 9 % of the ids' bytes over level 8, for 11 ms more a chunk of 2,048 positions. Level
        12 saves 10 % for 19 ms; elsewhere neither saves anything.
        """
        ids = self.role == "column" and self.dtype == "uint32" and self.axis != "sample"
        return 11 if ids else 8

    def size(self, layout: Layout) -> tuple[int, ...]:
        """Padded sizes of one chunk of the array, without the chunk axis."""
        if self.axis == "chunk":
            return ()
        outer = {"sample": layout.samples, "position": layout.positions}.get(self.axis)
        return (layout.entries[self.axis] if outer is None else outer, *self.inner)

    def key(self, chunk: int) -> str:
        """Name of the ZIP entry that holds one chunk."""
        return f"{self.name}/c/{chunk}" + "/0" * (self._rank - 1)

    @property
    def _rank(self) -> int:
        return 1 if self.axis == "chunk" else 2 + len(self.inner)


def pairs_dtype(positions: int, vocab_size: int) -> str:
    """Type of id * P + position: uint32 where every such number fits."""
    return "uint32" if positions * vocab_size <= 1 << 32 else "uint64"


@lru_cache(maxsize=64)
def stored_arrays(schema: Schema, pairs: str) -> tuple[StoredArray, ...]:
    """Arrays in stored order; `pairs` is the type of pairs arrays.

    A group with pairs stores `num_<pairs>` and `<pairs>` where its id column stands; its id and
    count columns follow from them.
    """
    arrays: list[StoredArray] = []
    by_id = {g.id_column: g for g in schema.groups if g.id_column is not None}
    derived = {g.count_column for g in schema.groups if g.id_column is not None}
    for column in schema.columns:
        group = by_id.get(column.name)
        if group is not None:
            assert group.pairs is not None
            part = partial(StoredArray, group=group)
            arrays.append(part(f"num_{group.pairs}", "uint32", "chunk", role="num_pairs"))
            arrays.append(part(group.pairs, pairs, group.name, role="pairs"))
        elif column.name not in derived:
            arrays.append(
                StoredArray(column.name, column.dtype, column.axis, column.inner, column.step)
            )
    return tuple(arrays)


def group_metadata() -> bytes:
    """zarr.json of the root group."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": {}})


def array_metadata(array: StoredArray, layout: Layout, chunks: int) -> bytes:
    """zarr.json of an array."""
    size = array.size(layout)
    names = ["chunk"]
    if array.axis != "chunk":
        names += [array.axis, *(f"{array.name}_{i}" for i in range(len(array.inner)))]
    fill: Any = False if array.dtype == "bool" else 0.0 if "float" in array.dtype else 0
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [chunks, *size],
            "data_type": array.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *size]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": list(_codecs(array)),
            "dimension_names": names,
            "attributes": {},
            "storage_transformers": [],
        }
    )


def _codecs(array: StoredArray) -> Iterable[dict[str, Any]]:
    if array.step is not None:
        code = {"float16": "<f2", "float32": "<f4"}[array.dtype]
        yield {
            "name": "numcodecs.fixedscaleoffset",
            "configuration": {
                "offset": 0,
                "scale": -1.0 / array.step,
                "dtype": code,
                "astype": "<u2",
            },
        }
    if array.is_pco:
        yield {"name": "numcodecs.pcodec", "configuration": {"level": array.pco_level}}
    else:
        yield {"name": "bytes"}
        yield {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}}
    yield {"name": "crc32c"}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
