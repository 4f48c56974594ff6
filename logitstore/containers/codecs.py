"""The two codecs of the zarr container, with sizes checked before anything is decompressed.

pco (the pcodec library, Zarr codec `numcodecs.pcodec`): entropy-coded bins of numbers or their
deltas. A standalone pco file is

    "pco!" 02, number of values (varint), 03, chunks ..., 00

and a chunk carries its own type, count and model, so chunks of two files can stand in one. The
writer uses that: values are compressed when they come, and the padding to a shard's common size,
known only at the end, follows as a chunk of its own, which costs about 15 bytes and leaves the
model of the values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray
from pcodec import ChunkConfig, standalone

__all__ = [
    "PAIRS_SEGMENT",
    "ZSTD_LEVEL",
    "from_steps",
    "pco_chunks",
    "pco_decode",
    "pco_file",
    "steps_of",
    "zstd_decode",
    "zstd_encode",
]

ZSTD_LEVEL = 3

# Pairs ascend by id, so frequent ids with small gaps come first. A model of its own for every few
# thousand of them saves 2 % on real rows and 7 % on synthetic ones; half as many lose it again.
PAIRS_SEGMENT = 4096

_PCO_MAGIC = b"pco!\x02"
_PCO_WRAPPED_VERSION = b"\x03"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def pco_chunks(values: NDArray[Any], level: int, segment: int | None = None) -> bytes:
    """Chunks of a pco file that holds the one-dimensional values; empty for none.

    With `segment`, the values are split evenly into chunks of about that many.
    """
    count = max(1, round(len(values) / segment)) if segment else 1
    return b"".join(_pco_chunk(part, level) for part in np.array_split(values, count) if len(part))


def _pco_chunk(values: NDArray[Any], level: int) -> bytes:
    header = _pco_header(len(values))
    file = standalone.simple_compress(
        np.ascontiguousarray(values), ChunkConfig(compression_level=level)
    )
    assert file.startswith(header), "pcodec writes another file version"
    assert file.endswith(b"\0"), "pcodec writes another file version"
    return bytes(file[len(header) : -1])


def pco_file(chunks: Sequence[bytes], count: int) -> bytes:
    """A standalone pco file of chunks that hold `count` values in all."""
    return b"".join((_pco_header(count), *chunks, b"\0"))


def pco_decode(data: memoryview, count: int, dtype: Any) -> NDArray[Any]:
    """Exactly `count` values of a type.

    Memory is bounded by the result: the library writes into it and never past its end.

    Raises: ValueError.
    """
    values = np.empty(count, dtype)
    try:
        progress = standalone.simple_decompress_into(bytes(data), values)
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from None
    if progress.n_processed != count or not progress.finished:
        raise ValueError(f"does not hold {count} values")
    return values


def zstd_encode(values: NDArray[Any]) -> bytes:
    """One frame with content size and checksum."""
    return bytes(zstd.compress(np.ascontiguousarray(values), ZSTD_LEVEL, True))


def zstd_decode(data: memoryview, count: int, dtype: Any) -> NDArray[Any]:
    """Exactly `count` values of a one-byte type.

    Raises: ValueError, before decompressing, when the frame announces another size.
    """
    announced = _zstd_content_size(data)
    if announced != count:
        raise ValueError(f"zstd frame announces {announced} bytes instead of {count}")
    values = np.empty(count, np.uint8)
    try:
        zstd.decompress(data, values)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if dtype == "bool" and count and values.max() > 1:
        raise ValueError("a bool is neither 0 nor 1")
    return values.view(dtype)


def steps_of(values: NDArray[Any], step: float) -> NDArray[np.uint16]:
    """Multiples m of values = -step * m.

    Raises: ValueError when a value is no such multiple or m exceeds 65,535.
    """
    multiples = np.rint(values.astype(np.float64) / -step)
    exact = np.all((multiples >= 0) & (multiples <= 65_535))
    if not exact or np.any(from_steps(multiples.astype(np.uint16), step, values.dtype) != values):
        raise ValueError(f"values are not multiples of -{step} down to -{step * 65_535}")
    return multiples.astype(np.uint16)


def from_steps(multiples: NDArray[np.uint16], step: float, dtype: Any) -> NDArray[Any]:
    """-step * m, rounded once to dtype: what numcodecs.fixedscaleoffset decodes to."""
    return _step_table(step, np.dtype(dtype).name)[multiples]


@lru_cache(maxsize=8)
def _step_table(step: float, dtype: str) -> NDArray[Any]:
    # Looking up is several times faster than converting to float16.
    return (np.arange(1 << 16) / (-1.0 / step) + 0.0).astype(dtype)


def _pco_header(count: int) -> bytes:
    bits = max(count.bit_length(), 1)
    varint = (bits - 1) | count << 6
    return _PCO_MAGIC + varint.to_bytes((6 + bits + 7) // 8, "little") + _PCO_WRAPPED_VERSION


def _zstd_content_size(data: memoryview) -> int | None:
    """The size a frame's header announces (RFC 8878, section 3.1.1.1)."""
    if len(data) < 5 or data[:4] != _ZSTD_MAGIC:
        raise ValueError("not a zstd frame")
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    if not size_bytes:
        return None
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(data[start : start + size_bytes], "little")
    return size + 256 if size_bytes == 2 else size
