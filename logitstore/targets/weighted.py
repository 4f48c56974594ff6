"""Sampled targets: unbiased sparse weights. RS-KD samples and threshold samples share one loss.

Entries are ragged: `num_*` [N] says how many entries each position has, entry arrays [E] hold them
    one
position after another. `padded()` gives rectangular [B, T, U] ids and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from logitstore.targets.base import PAD_ID, Targets, pad_rows

__all__ = ["Entries", "SampledTargets", "ThresholdTargets", "WeightedTargets"]


@dataclass(frozen=True)
class Entries:
    """Sparse weights in rectangular form: ids int64 [..., U] (-1 pads) and weights float [...,
    U]."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class WeightedTargets(Targets):
    """Ids with weights w, E[w] = p: the form every weighted cross-entropy takes.

    Always held flat in its entries; `lengths` [B] tells samples apart.

    Attributes:
        ids: int64 [E], positions one after another; inside a position ids are distinct.
        weights: float [E].
        num_ids: int64 [N], entries of each position; sums to E.
    """

    ids: Tensor
    weights: Tensor
    num_ids: Tensor

    @property
    def num_positions(self) -> int:
        """N."""
        return self.num_ids.numel()

    def position_of_entry(self) -> Tensor:
        """int64 [E]: which of the N positions an entry belongs to."""
        return torch.repeat_interleave(
            torch.arange(self.num_ids.numel(), device=self.num_ids.device),
            self.num_ids,
            output_size=self.ids.numel(),
        )

    def entries(self) -> Entries:
        """[N, U] rectangular ids and weights, U the most entries of any position."""
        width = max(int(self.num_ids.max()) if self.num_ids.numel() else 0, 1)
        return Entries(
            pad_rows(self.ids, self.num_ids, width, PAD_ID),
            pad_rows(self.weights, self.num_ids, width, 0.0),
        )

    def padded(self, length: int | None = None) -> Self:
        """Weighted targets stay flat; use `padded_entries` for [B, T, U] ids and weights."""
        return self

    def padded_entries(self, length: int | None = None) -> Entries:
        """[B, T, U] ids and weights."""
        rows = self.entries()
        if self.lengths is None:
            return rows
        length = self._padded_length(length)
        return Entries(
            pad_rows(rows.ids, self.lengths, length, PAD_ID),
            pad_rows(rows.weights, self.lengths, length, 0.0),
        )

    def dense(self, vocab_size: int | None = None) -> Tensor:
        """Float [N, V] (or [B, T, V] when `lengths` is known): the weights, 0 elsewhere."""
        width = vocab_size or self.vocab_size
        out_NV = self.weights.new_zeros(self.num_positions, width)
        out_NV[self.position_of_entry(), self.ids] = self.weights
        return (
            out_NV
            if self.lengths is None
            else pad_rows(out_NV, self.lengths, self._padded_length(None), 0.0)
        )


@dataclass(frozen=True, kw_only=True)
class SampledTargets(WeightedTargets):
    """RS-KD: ids drawn with replacement, weights counts / rounds (importance-corrected for power !=
    1).

    Attributes:
        counts: int64 [E], how often each id was drawn; sums to `rounds` per position.
        rounds: N of the paper.
        power: exponent of the proposal, q0 proportional to p^power; 1 draws from p.

    Source: arXiv:2503.16870.
    """

    signal: ClassVar[str] = "sampled"

    counts: Tensor
    rounds: int
    power: float = 1.0

    @classmethod
    def from_counts(
        cls, ids: Tensor, counts: Tensor, *, rounds: int, vocab_size: int
    ) -> SampledTargets:
        """From rectangular ids [..., U] (-1 pads) and counts [..., U] drawn with power 1.

        A leading [B, T] becomes `lengths` of T each, so that [B, T, V] student logits meet it.
        """
        valid = (ids >= 0) & (counts > 0)
        kept = counts[valid]
        leading = ids.shape[:-1]
        lengths = torch.full((leading[0],), leading[1]) if len(leading) == 2 else None
        return cls(
            vocab_size=vocab_size,
            lengths=lengths,
            ids=ids[valid].long(),
            counts=kept.long(),
            weights=kept.double() / rounds,
            num_ids=valid.sum(-1).reshape(-1),
            rounds=rounds,
        )


@dataclass(frozen=True, kw_only=True)
class ThresholdTargets(WeightedTargets):
    """Threshold (variance-optimal) sampling: head ids exact, tail ids of one position weigh the
    same.

    `ids` and `weights` hold head then tail of each position; the head comes in descending order.

    Attributes:
        num_heads: int64 [N], how many of a position's entries are the exact head.
        log_tail: float [N], log of the mass outside the head, nats.

    Source: Fearnhead & Clifford 2003 (JRSS B 65:4); Szegedy & Thorup 2007; arXiv:0803.0473.
    """

    signal: ClassVar[str] = "threshold"

    num_heads: Tensor
    log_tail: Tensor

    def head_mask(self) -> Tensor:
        """bool [E]: True for entries whose weight is the exact probability."""
        start = torch.cumsum(self.num_ids, 0) - self.num_ids
        position = self.position_of_entry()
        index = torch.arange(self.ids.numel(), device=self.ids.device) - start[position]
        return index < self.num_heads[position]
