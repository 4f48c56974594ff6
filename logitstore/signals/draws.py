"""Drawing ids from unnormalised weights by inverse CDF, in two levels.

One running sum over a vocabulary loses small weights in float32 and costs a float64 row of 1 MiB at
V = 131,072. Here float64 sums of blocks are searched first, then one short running sum inside the
chosen block. Letters: R rows, V vocabulary, N points per row, B width of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["InverseCdf"]

_BLOCK = 128


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
        num_rows, num_points = points.shape
        rows = torch.arange(num_rows, device=points.device)[:, None].expand(-1, num_points)
        inside = self._blocks[rows, block].double()
        running = inside.cumsum(-1)
        # The two levels round differently by about 1e-16 of the total, so a point may fall just
        # beyond its block: it then belongs to the block's last id of positive weight.
        end = running[..., -1:]
        local = torch.minimum(
            (points - start)[..., None], torch.nextafter(end, torch.zeros_like(end))
        )
        index = (running <= local.clamp_min(0)).sum(-1).clamp_max(_BLOCK - 1)
        ids = block * _BLOCK + index
        return torch.where(self.total[:, None] > 0, ids, 0)
