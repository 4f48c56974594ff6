"""Drawing ids from unnormalised weights by inverse CDF, in two levels.

One running sum over a vocabulary loses small weights in float32 and costs a float64 row of 1 MiB at
V = 131,072. Here float64 sums of blocks are searched first, then one short running sum inside the
chosen block. Letters: R rows, V vocabulary, N points per row, E some of all rows' points.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["InverseCdf"]

_BLOCK = 128

# Points looked up at once: a block is read for each of them, so that this bounds what is held
# (some 40 MB on a CPU) whatever the number of rows and points.
_POINTS = 1 << 14


class InverseCdf:
    """Inverse of the running sum of `weights_RV` over ascending ids.

    Attributes:
        total: float64 [R], sum of each row's weights.
    """

    def __init__(self, weights_RV: Tensor) -> None:
        """`weights_RV`: float [R, V], non-negative."""
        vocab_size = weights_RV.shape[-1]
        spare = -vocab_size % _BLOCK
        padded = torch.nn.functional.pad(weights_RV, (0, spare)) if spare else weights_RV
        self._blocks = padded.unflatten(-1, (-1, _BLOCK))
        self._sums = self._blocks.sum(-1, dtype=torch.float64)
        self._ends = self._sums.cumsum(-1)
        self.total = self._ends[:, -1].contiguous()

    def pick(self, points_RN: Tensor) -> Tensor:
        """int64 [R, N]: for each point in [0, total) the id whose interval of the running sum holds
        it.

        An id of weight 0 is never picked, except in rows whose total is 0 (there the result is 0).
        """
        last = torch.nextafter(self.total, torch.zeros_like(self.total))[:, None]
        points = torch.minimum(points_RN.double(), last).clamp_min(0)
        block = torch.searchsorted(self._ends, points, right=True)
        block = block.clamp_max(self._ends.shape[-1] - 1)
        start = (self._ends - self._sums).gather(-1, block)
        row = torch.arange(len(points), device=points.device)[:, None].expand_as(points)
        parts = [
            self._inside(*part)
            for part in zip(
                row.flatten().split(_POINTS),
                block.flatten().split(_POINTS),
                (points - start).flatten().split(_POINTS),
                strict=True,
            )
        ]
        index = torch.cat(parts).view_as(block) if parts else block
        ids = block * _BLOCK + index
        return torch.where(self.total[:, None] > 0, ids, 0)

    def _inside(self, row_E: Tensor, block_E: Tensor, point_E: Tensor) -> Tensor:
        """int64 [E]: index inside their blocks of points counted from the block's begin."""
        running = self._blocks[row_E, block_E].double().cumsum(-1)
        # The two levels round differently by about 1e-16 of the total, so a point may fall just
        # beyond its block: it then belongs to the block's last id of positive weight.
        end = running[:, -1]
        local = torch.minimum(point_E, torch.nextafter(end, torch.zeros_like(end))).clamp_min(0)
        return (running <= local[:, None]).sum(-1).clamp_max(_BLOCK - 1)
