"""Dense targets: every raw logit. Sensible for classification and for reference computations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from logitstore.targets.base import Targets, pad_rows

__all__ = ["DenseTargets"]


@dataclass(frozen=True, kw_only=True)
class DenseTargets(Targets):
    """Raw logits of the whole vocabulary.

    Attributes:
        logits: float [N, V] flat or [B, T, V] (any leading shape) padded. -inf marks an id that
            cannot occur.
    """

    signal: ClassVar[str] = "dense"

    logits: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> DenseTargets:
        """Padded targets from teacher logits [..., V], dtype kept."""
        return cls(logits=logits, vocab_size=logits.shape[-1])

    @property
    def logprobs(self) -> Tensor:
        """log-softmax of the logits, at least float32, same shape."""
        return torch.log_softmax(at_least_float32(self.logits), dim=-1)

    def padded(self, length: int | None = None) -> Self:
        if self.lengths is None:
            return self
        length = self._padded_length(length)
        scalars = self._padded_scalars(length)
        return dataclasses.replace(
            self, logits=pad_rows(self.logits, self.lengths, length, 0), **scalars
        )

    def dense(self, vocab_size: int | None = None) -> Tensor:
        probs = self.logprobs.exp()
        extra = (vocab_size or self.vocab_size) - probs.shape[-1]
        return torch.nn.functional.pad(probs, (0, extra)) if extra > 0 else probs


def at_least_float32(x: Tensor) -> Tensor:
    """Half types become float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
