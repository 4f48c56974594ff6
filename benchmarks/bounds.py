"""Information bounds of top-K and RS-KD records in bytes per token, by plug-in entropies.

They bound coders without context: ids independent of each other given the corpus' frequencies.
Entropies carry the Miller-Madow correction. The id-probability pairing has to be stored, so top-K
ids are charged as a list; only the order inside runs of equal stored probabilities is free. RS-KD
ids are charged as a list less the free order inside runs of equal counts, and counts as the
entropy of the whole partition of the draws, or count by count, whichever is less.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

__all__ = ["entropy_bits", "rskd_bound", "set_bound", "topk_bound"]

Ints = NDArray[np.int64]


def entropy_bits(values: NDArray[Any]) -> float:
    """Entropy of the empirical distribution, bits per value, Miller-Madow corrected."""
    _, counts = np.unique(values, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum() + (len(counts) - 1) / (2 * counts.sum() * np.log(2)))


def topk_bound(ids_PK: Ints, steps_PK: Ints) -> dict[str, float]:
    """`steps` are the stored probabilities as integers (float16 bits, or multiples of a step)."""
    positions, k = ids_PK.shape
    id_bytes = k * entropy_bits(ids_PK) / 8
    delta = np.diff(steps_PK, axis=1, prepend=0)
    step_bytes = sum(entropy_bits(delta[:, rank]) for rank in range(k)) / 8
    row = np.arange(positions)[:, None] << 17
    _, run = np.unique(row + steps_PK, return_counts=True)
    free = _log2_factorial(run).sum() / positions / 8
    total = id_bytes + step_bytes - free
    return {"ids": id_bytes, "logprobs": step_bytes, "free order": -float(free), "total": total}


def rskd_bound(counts_P: Ints, ids_E: Ints, draws_E: Ints) -> dict[str, float]:
    """`draws` says how often each id was drawn; entries position by position."""
    positions = len(counts_P)
    row = np.repeat(np.arange(positions), counts_P)
    _, run = np.unique(row * (1 << 20) + draws_E, return_counts=True)
    id_bytes = (len(ids_E) * entropy_bits(ids_E) - _log2_factorial(run).sum()) / positions / 8
    order = np.lexsort((-draws_E, row))
    descending = draws_E[order]
    ends = np.cumsum(counts_P)
    partition = Counter(
        descending[end - count : end].tobytes() for end, count in zip(ends, counts_P, strict=True)
    )
    share = np.array(list(partition.values())) / positions
    whole = -(share * np.log2(share)).sum() + (len(share) - 1) / (2 * positions * np.log(2))
    # Count by count: given the draws left and the count before.
    begin = np.repeat(ends - counts_P, counts_P)
    before = np.cumsum(descending) - descending
    left = int(descending[: counts_P[0]].sum()) - (before - before[begin])
    previous = np.where(np.arange(len(descending)) == begin, 0, np.roll(descending, 1))
    context = left * (1 << 20) + previous
    by_context = np.argsort(context, kind="stable")
    starts = np.flatnonzero(np.diff(context[by_context])) + 1
    bits = sum(len(p) * entropy_bits(p) for p in np.split(descending[by_context], starts))
    count_bytes = min(float(whole), bits / positions) / 8
    return {"ids": id_bytes, "counts": count_bytes, "total": id_bytes + count_bytes}


def set_bound(ids_E: Ints, positions: int) -> float:
    """Bytes a token of each position's set of ids, every id independent with its own frequency."""
    _, counts = np.unique(ids_E, return_counts=True)
    f = counts / positions
    f = f[f < 1]
    return float(-(f * np.log2(f) + (1 - f) * np.log2(1 - f)).sum() / 8)


def _log2_factorial(n: NDArray[Any]) -> NDArray[np.float64]:
    return gammaln(n + 1) / np.log(2)
