"""The codings that stored records are compared with: raw, packed entries, Arrow and Parquet.

Each takes the columns of one chunk as numpy arrays and gives bytes, and reads them back.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["CODINGS", "Coding", "pack_entries", "unpack_entries"]

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Coding:
    """Name, and functions from columns to bytes and back."""

    name: str
    encode: Callable[[Columns], bytes]
    decode: Callable[[bytes, Columns], Columns]


def pack_entries(ids: NDArray[Any], small: NDArray[Any], id_bits: int) -> NDArray[np.uint8]:
    """24-bit entries: an id of `id_bits` bits and a small number in the rest. uint8 [..., 3]."""
    word = ids.astype(np.uint32) | (small.astype(np.uint32) << np.uint32(id_bits))
    return np.ascontiguousarray(word.astype("<u4")[..., None].view(np.uint8)[..., :3])


def unpack_entries(data: NDArray[np.uint8], id_bits: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """ids uint32 and small numbers uint8."""
    word = np.zeros((*data.shape[:-1], 4), np.uint8)
    word[..., :3] = data
    number = word.view("<u4")[..., 0]
    return number & np.uint32((1 << id_bits) - 1), (number >> np.uint32(id_bits)).astype(np.uint8)


def _raw_encode(columns: Columns) -> bytes:
    return b"".join(np.ascontiguousarray(a).tobytes() for a in columns.values())


def _raw_decode(data: bytes, like: Columns) -> Columns:
    out, at = {}, 0
    for name, array in like.items():
        part = np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
        out[name] = part.copy()
        at += array.nbytes
    return out


def _table(columns: Columns) -> pa.Table:
    """One row per position: [P, K] arrays as fixed-size lists, entries as lists."""
    arrays: dict[str, pa.Array] = {}
    positions = next(len(a) for n, a in columns.items() if n.startswith("num_") or a.ndim == 2)
    for name, array in columns.items():
        if array.ndim == 2:
            flat = pa.array(array.ravel())
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        elif name.startswith("num_"):
            continue
        elif len(array) == positions and name == "tail_logprob":
            arrays[name] = pa.array(array)
        else:
            offsets = np.zeros(positions + 1, np.int32)
            offsets[1:] = np.cumsum(columns[counts_of(name)])
            arrays[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(array))
    return pa.table(arrays)


def counts_of(column: str) -> str:
    """The count column of an entry column."""
    return {"head": "num_heads", "tail": "num_tails"}.get(column.split("_")[0], "num_ids")


def _columns_back(table: pa.Table, like: Columns) -> Columns:
    out: Columns = {}
    for name, array in like.items():
        if name.startswith("num_"):
            continue
        column = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
            if pa.types.is_list(column.type):
                out[counts_of(name)] = np.diff(column.offsets.to_numpy())
            column = column.flatten()
        out[name] = column.to_numpy(zero_copy_only=False).reshape(array.shape)
    return out


def _arrow_encode(columns: Columns) -> bytes:
    table, sink = _table(columns), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _arrow_decode(data: bytes, like: Columns) -> Columns:
    return _columns_back(pa.ipc.open_file(data).read_all(), like)


def _parquet_encode(columns: Columns) -> bytes:
    table, sink = _table(columns), io.BytesIO()
    leaves = {
        field.name + (".list.element" if pa.types.is_nested(field.type) else ""): field.type
        for field in table.schema
    }
    # One-byte values have nothing to split.
    split = {
        path: "BYTE_STREAM_SPLIT"
        for path, kind in leaves.items()
        if (kind.value_type if pa.types.is_nested(kind) else kind).bit_width > 8
        and not pa.types.is_uint16(kind.value_type if pa.types.is_nested(kind) else kind)
    }
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding=split,
    )
    return sink.getvalue()


def _parquet_decode(data: bytes, like: Columns) -> Columns:
    return _columns_back(pq.read_table(io.BytesIO(data), use_threads=False), like)


CODINGS = [
    Coding("raw", _raw_encode, _raw_decode),
    Coding("Arrow IPC zstd", _arrow_encode, _arrow_decode),
    Coding("Parquet zstd, BYTE_STREAM_SPLIT", _parquet_encode, _parquet_decode),
]
