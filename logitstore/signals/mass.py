"""The cumulative-mass curve of a teacher: how much of a distribution its k most probable ids hold.

It needs whole distributions, which a store does not keep, so it is collected while they are there:
from one position in 64, chosen by a hash of sample key and position alone. The same positions of a
corpus are taken for every signal, seed, batch size and number of workers.

A position's masses are rounded to multiples of 2^-24, so that sums in float64 are exact, and equal
in any order, up to 2^29 positions.

Letters: R rows of a chunk, N those that are taken, V vocabulary, K ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.record.random import bits
from logitstore.spec.statistics import CumulativeMass

__all__ = ["LEVELS", "ONE_IN", "MassCurve", "ranks", "taken"]

# One position in so many is taken.
ONE_IN = 64
# Masses for which the number of ids that reach them is counted; keys of `CumulativeMass.reach`.
LEVELS = ("0.90", "0.95", "0.99")
# Of the random function; no store's seed, so that all stores of a corpus take the same positions.
_SEED = 0x6D617373  # "mass"
_STEP = 2.0**-24


def ranks(vocab_size: int) -> tuple[int, ...]:
    """The k of the curve: 1, 2, 3, 4, 6, 8, 12, 16, ... and V."""
    powers = [1 << n for n in range(vocab_size.bit_length())]
    found = {*powers, *(p + p // 2 for p in powers if p > 1)}
    return (*sorted(k for k in found if k < vocab_size), vocab_size)


def taken(keys: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which positions count. Keys are `record.random.key_of`, as signed integers."""
    return bits(_SEED, keys.view(np.uint64), positions, 0) % np.uint64(ONE_IN) == 0


class MassCurve:
    """Sums over the positions that were taken so far."""

    def __init__(self, vocab_size: int) -> None:
        self._ks = ranks(vocab_size)
        self._starts = np.array([0, *self._ks[:-1]])
        self._positions = 0
        self._mass = np.zeros(len(self._ks))
        self._reach = np.zeros((len(LEVELS), len(self._ks)), np.int64)

    def add(self, weights_RV: Tensor, taken_R: NDArray[np.bool_]) -> None:
        """Count the rows that are taken.

        Args:
            weights_RV: float32, probabilities up to a factor per row.
            taken_R: see `taken`.
        """
        rows = np.flatnonzero(taken_R)
        if not len(rows):
            return
        chosen_NV = weights_RV[torch.from_numpy(rows).to(weights_RV.device)]
        sums = np.add.reduceat(_descending(chosen_NV), self._starts, axis=-1, dtype=np.float64)
        mass_NK = sums.cumsum(-1)
        mass_NK = np.rint(mass_NK / mass_NK[:, -1:] / _STEP) * _STEP
        self._positions += len(rows)
        self._mass += mass_NK.sum(0)
        for level, name in enumerate(LEVELS):
            first_N = (mass_NK >= float(name)).argmax(-1)
            self._reach[level] += np.bincount(first_N, minlength=len(self._ks))

    def total(self) -> CumulativeMass | None:
        """For a commit; None when no position was taken."""
        if not self._positions:
            return None
        return CumulativeMass(
            positions=self._positions,
            ks=self._ks,
            mass=tuple(self._mass.tolist()),
            reach={n: tuple(self._reach[i].tolist()) for i, n in enumerate(LEVELS)},
        )


def _descending(rows_NV: Tensor) -> NDArray[np.float32]:
    """Each row sorted, the largest first."""
    if rows_NV.device.type == "cpu":
        # Ten times as fast as torch's sort, which carries indices along.
        return np.sort(rows_NV.numpy(), axis=-1)[:, ::-1]
    return np.asarray(torch.sort(rows_NV, dim=-1, descending=True).values.cpu().numpy())
