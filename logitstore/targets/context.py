"""Targets that are not a distribution over a vocabulary: graph statistics and scored candidates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from logitstore.targets.base import PAD_ID, Targets, pad_rows

__all__ = ["GraphTargets", "ScoresTargets"]


@dataclass(frozen=True, kw_only=True)
class GraphTargets(Targets):
    """Outer products of top-k logits summed over each segment's valid positions (InfiGFusion).

    Attributes:
        coactivation: float [G, k, k], C = sum_t v_t v_t^T, one per segment, symmetric; None when
            only f is kept.
        row_sums: float [G, k], f = C 1.
        num_positions: int64 [G], valid positions summed.
        num_segments: int64 [B], segments of each sample; sums to G.
        node_ids: int64 [G, n] vocabulary form only: the ids behind the rows, -1 pads.

    Source: arXiv:2505.13893.
    """

    signal: ClassVar[str] = "graph"

    row_sums: Tensor
    num_positions: Tensor
    num_segments: Tensor
    coactivation: Tensor | None = None
    node_ids: Tensor | None = None

    def padded(self, length: int | None = None) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class ScoresTargets(Targets):
    """Scores of given candidates (link-prediction contexts, answer choices).

    Attributes:
        ids: int64 [..., C], candidate ids; -1 pads.
        scores: float32 [..., C], raw teacher scores.
    """

    signal: ClassVar[str] = "scores"

    ids: Tensor
    scores: Tensor

    def padded(self, length: int | None = None) -> Self:
        if self.lengths is None:
            return self
        length = self._padded_length(length)
        scalars = self._padded_scalars(length)
        return dataclasses.replace(
            self,
            ids=pad_rows(self.ids, self.lengths, length, PAD_ID),
            scores=pad_rows(self.scores, self.lengths, length, 0.0),
            **scalars,
        )

    def valid(self) -> Tensor:
        """bool [..., C]: True where a candidate is given."""
        return self.ids != PAD_ID

    def dense(self, vocab_size: int | None = None) -> Tensor:
        """Softmax over the given candidates scattered to [..., V]; only meaningful when ids are
        classes."""
        masked = self.scores.masked_fill(~self.valid(), -torch.inf)
        probs = torch.softmax(masked, -1)
        out = probs.new_zeros(*probs.shape[:-1], vocab_size or self.vocab_size)
        return out.scatter_add_(-1, self.ids.clamp_min(0), probs)
