"""The format's random function on tensors: the int64 twin of `logitstore.record.random`.

torch has no unsigned 64-bit arithmetic everywhere, but int64 multiplication wraps the same way, and
a logical right shift is an arithmetic one with the sign bits masked off. A test compares both bit
by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.record.random import GOLDEN, MIX_1, MIX_2

__all__ = ["bits", "uniform"]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN, _MIX_1, _MIX_2 = _signed(GOLDEN), _signed(MIX_1), _signed(MIX_2)


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def bits(seed: int, key: Tensor, position: Tensor, draw: Tensor) -> Tensor:
    """int64 holding the 64 bits of `logitstore.record.random.bits`, for broadcast int64 tensors."""
    state = _mix(torch.tensor(_signed(seed), dtype=torch.int64, device=key.device))
    for word in (key, position, draw):
        state = _mix((state + _GOLDEN) ^ word)
    return state


def uniform(seed: int, key: Tensor, position: Tensor, draw: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits; on devices without float64 call `bits` instead."""
    return _shift(bits(seed, key, position, draw), 11).double() * 2.0**-53
