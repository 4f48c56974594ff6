"""Exact top-k with the format's order: descending value, ties by lowest id."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TopK", "exact_topk"]

# Width of the blocks whose maxima the two-stage search looks at first.
_BLOCK = 64


class TopK(NamedTuple):
    """values [P, k] and ids int64 [P, k], values descending, equal values by ascending id."""

    values: Tensor
    ids: Tensor


def exact_topk(z_PV: Tensor, k: int) -> TopK:
    """The k largest of each row.

    `torch.topk` leaves the order of equal values open, so rows that tie are repaired: inside the
    kept ids by two small stable sorts, at the cut by taking the lowest ids among the values equal
    to the last. With bf16 output layers two thirds of rows tie at rank 64; with float32 ones almost
    none.

    Shapes: z float [P, V] without NaN; 1 <= k <= V.
    """
    vocab_size = z_PV.shape[-1]
    wide = min(k + 1, vocab_size)
    values, ids = _topk_any_order(z_PV, wide)
    ties_P = (values[:, 1:] == values[:, :-1]).any(-1)
    if bool(ties_P.any()):
        rows = ties_P.nonzero()[:, 0]
        if wide > k:
            cut = (values[rows, k] == values[rows, k - 1]).nonzero()[:, 0]
            if cut.numel():
                cut_rows = rows[cut]
                values[cut_rows, :k], ids[cut_rows, :k] = _lowest_ids_at_cut(z_PV[cut_rows], k)
        tied_values, tied_ids = values[rows, :k], ids[rows, :k]
        by_id = torch.argsort(tied_ids, dim=-1)
        tied_values, tied_ids = tied_values.gather(-1, by_id), tied_ids.gather(-1, by_id)
        by_value = torch.argsort(tied_values, dim=-1, descending=True, stable=True)
        values[rows, :k] = tied_values.gather(-1, by_value)
        ids[rows, :k] = tied_ids.gather(-1, by_value)
    return TopK(values[:, :k], ids[:, :k])


def _topk_any_order(z_PV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk, or on CPU two exact stages: k best blocks by maximum, then top-k inside them.

    Every one of the k largest values lies in a block whose maximum is among the k largest maxima,
    so nothing is lost. Measured at V = 128,256, k = 64: 3.3 reads of the logits instead of 5.4.
    """
    vocab_size = z_PV.shape[-1]
    num_blocks = vocab_size // _BLOCK
    if z_PV.device.type != "cpu" or num_blocks < 4 * k or k > 256:
        found = torch.topk(z_PV, k, sorted=True)
        return found.values, found.indices
    body = num_blocks * _BLOCK
    blocks = z_PV[:, :body].unflatten(-1, (num_blocks, _BLOCK))
    best_blocks = torch.topk(blocks.amax(-1), k, sorted=False).indices
    candidates = blocks.gather(1, best_blocks[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    if body < vocab_size:
        candidates = torch.cat([candidates, z_PV[:, body:]], -1)
    found = torch.topk(candidates, k, sorted=True)
    index = found.indices
    inside = index < k * _BLOCK
    block = best_blocks.gather(-1, torch.where(inside, index // _BLOCK, 0))
    ids = torch.where(inside, block * _BLOCK + index % _BLOCK, index - k * _BLOCK + body)
    return found.values, ids


def _lowest_ids_at_cut(z_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of rows whose k-th and (k+1)-th values are equal: everything larger, then the lowest
    ids."""
    last = torch.topk(z_RV, k, sorted=True).values[:, -1:]
    above = z_RV > last
    equal = z_RV == last
    room = k - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1) <= room))
    ids = keep.nonzero()[:, 1].reshape(-1, k)
    return z_RV.gather(-1, ids), ids
