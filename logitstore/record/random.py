"""The random function of the format: counter-based, the same on every machine, device and batch.

Every draw is a pure function of (seed, sample key, position, draw); nothing depends on batch size,
worker count or order, so a resumed or re-sharded capture takes the same samples.

    mix(x)  = splitmix64 finaliser of x (64-bit, wrapping):
              x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x
              >> 31
    step(h, w) = mix((h + 0x9E3779B97F4A7C15) ^ w)
    bits(seed, key, position, draw) = step(step(step(mix(seed), key), position), draw)
    uniform = (bits >> 11) * 2**-53            in [0, 1), float64
    key     = first 8 bytes, little-endian, of SHA-256(sample_key as UTF-8)

Source: Steele, Lea, Flood 2014 (splitmix64). Test vectors are in `schemas/format-v1.md`. The torch
    twin,
`logitstore.signals.random`, does the same in int64 with masked shifts.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["GOLDEN", "MIX_1", "MIX_2", "bits", "key_of", "uniform"]

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def key_of(sample_key: str) -> int:
    """The 64-bit key of a sample's stable name."""
    return int.from_bytes(hashlib.sha256(sample_key.encode()).digest()[:8], "little")


def bits(
    seed: ArrayLike, key: ArrayLike, position: ArrayLike, draw: ArrayLike
) -> NDArray[np.uint64]:
    """64 random bits for each broadcast element of the four non-negative integer arguments."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, dtype=np.uint64))
        for word in (key, position, draw):
            state = _mix((state + np.uint64(GOLDEN)) ^ np.asarray(word, dtype=np.uint64))
    return state


def uniform(
    seed: ArrayLike, key: ArrayLike, position: ArrayLike, draw: ArrayLike
) -> NDArray[np.float64]:
    """float64 in [0, 1) with 53 random bits."""
    return (bits(seed, key, position, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))
