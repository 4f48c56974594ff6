"""A vocabulary split over the ranks of a process group: which ids are here, and what ranks agree
on.

Letters: C rows worked on together, U ids of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from logitstore.spec.errors import UsageError

__all__ = ["VocabularyShard"]


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows [start, start + size) of an LM head, ranks of `group` holding the others.

    Attributes:
        start: first vocabulary id of this rank.
        size: ids of this rank.
        total: ids of all ranks together.
        largest: most ids of any rank; what all ranks plan their chunks by.
        group: process group; None when this process holds the whole vocabulary.
    """

    start: int
    size: int
    total: int
    largest: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, size: int, group: dist.ProcessGroup | None, device: torch.device
    ) -> VocabularyShard:
        """The shard of a rank that holds `size` ids; ranks hold consecutive ids in rank order."""
        if group is None:
            return cls(0, size, size, size)
        if not dist.is_initialized():
            raise UsageError(
                "bad-argument",
                "a vocabulary-sharded head needs torch.distributed to be initialised",
                where="group",
            )
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([size], device=device), group=group)
        all_sizes = [int(s) for s in sizes]
        return cls(sum(all_sizes[: group.rank()]), size, sum(all_sizes), max(all_sizes), group)

    def local(self, ids_CU: Tensor) -> Tensor:
        """Addresses in this rank's columns; `size` (one column past the end) for all other ids."""
        local_CU = ids_CU - self.start
        here_CU = (ids_CU >= 0) & (local_CU >= 0) & (local_CU < self.size)
        return torch.where(here_CU, local_CU, self.size)

    def num_below(self, vocab: int) -> int:
        """How many of this rank's ids are below `vocab`."""
        return min(max(vocab - self.start, 0), self.size)

    def logsumexp(self, x_C: Tensor) -> Tensor:
        """log of the sum over ranks of exp(x)."""
        if self.group is None:
            return x_C
        top_C = x_C.clone()
        dist.all_reduce(top_C, dist.ReduceOp.MAX, group=self.group)
        # Nothing anywhere: -inf - -inf would be NaN.
        top_C = top_C.masked_fill(torch.isneginf(top_C), 0.0)
        return self.sum((x_C - top_C).exp()).log() + top_C

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.group is None:
            return x
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x
