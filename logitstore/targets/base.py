"""What all targets share: the per-position scalars, flat and padded forms, moving between devices.

Letters: B samples of a batch, T positions of the longest sample, N positions of all samples
    together
(no padding), K kept ids per position, E stored entries of all positions together, V vocabulary.

**Flat** targets hold the N positions of a batch one after another, sample by sample, and `lengths`
[B] says where samples end. **Padded** targets hold [B, T, ...] (or any leading shape) and `lengths`
is None. Ids past the end are -1, log-probs -inf, weights 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from logitstore.spec.errors import TargetsError

__all__ = ["PAD_ID", "Targets", "pad_rows"]

PAD_ID = -1


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Per-position scalars that any signal may carry; leading shape [N] flat, or [B, T] padded.

    Attributes:
        vocab_size: V, the teacher's real vocabulary (padded head rows are not counted).
        lengths: int64 [B], positions per sample, for flat targets; None for padded ones.
        lse: float32, logsumexp of the raw logits, nats; raw logit = log-prob + lse.
        lse_at: temperature -> float32, logsumexp(z / T): p_T(i) = exp(z_i / T - lse_at[T]).
        label_logprob: float32, log p(realised next token), nats; 0 where there is no label.
        label_rank: int64, 0-based rank of the realised token in the teacher's order (saturates at
            65535).
        entropy: float32, -sum p log p over the whole vocabulary, nats.
        top1_logprob: float32, log-prob of the most probable id, nats.
        logit_mean: float32, mean of the raw logits over the vocabulary.
        byte_end: int64, byte offset in the sample's text where the position's token ends.
        always_ids: int64 [A], control tokens whose log-probs are stored at every position.
        always_logprobs: float32 [..., A], their exact log-probs, nats.
    """

    signal: ClassVar[str]
    # Fields whose axis 0 counts entries and not positions; named by subclasses with ragged storage.
    _entry_fields: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    lengths: Tensor | None = None
    lse: Tensor | None = None
    lse_at: Mapping[float, Tensor] = field(default_factory=dict)
    label_logprob: Tensor | None = None
    label_rank: Tensor | None = None
    entropy: Tensor | None = None
    top1_logprob: Tensor | None = None
    logit_mean: Tensor | None = None
    byte_end: Tensor | None = None
    always_ids: Tensor | None = None
    always_logprobs: Tensor | None = None

    @property
    def is_flat(self) -> bool:
        """True when positions follow each other without padding and `lengths` tells samples
        apart."""
        return self.lengths is not None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same targets with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same targets in page-locked memory, so that copies to a GPU can overlap compute."""
        return self.map(lambda t: t.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same targets with `function` applied to every tensor."""
        changes: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = function(value)
            elif isinstance(value, Mapping):
                changes[f.name] = {key: function(t) for key, t in value.items()}
        return dataclasses.replace(self, **changes)

    def padded(self, length: int | None = None) -> Self:
        """[B, T, ...] form; T is the longest sample, or `length` when that is larger."""
        raise NotImplementedError

    def dense(self, vocab_size: int | None = None) -> Tensor:
        """Float32 [..., V]: the stored part as one probability (or weight) per id, 0 elsewhere."""
        raise NotImplementedError

    def _padded_scalars(self, length: int) -> dict[str, Any]:
        """The shared per-position fields in padded form, for subclasses' `padded`."""
        assert self.lengths is not None
        out: dict[str, Any] = {"lengths": None}
        for name in (
            "lse",
            "label_logprob",
            "label_rank",
            "entropy",
            "top1_logprob",
            "logit_mean",
            "byte_end",
            "always_logprobs",
        ):
            value = getattr(self, name)
            if value is not None:
                out[name] = pad_rows(value, self.lengths, length, 0)
        out["lse_at"] = {
            t: pad_rows(value, self.lengths, length, 0) for t, value in self.lse_at.items()
        }
        return out

    def _padded_length(self, length: int | None) -> int:
        assert self.lengths is not None
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        if length is not None and length < longest:
            raise TargetsError(
                "shape-mismatch",
                "targets are longer than the length they should be padded to",
                got=longest,
                expected=f"at most {length} positions",
                hint="give the student the same tokens the store holds (batch.tokens)",
            )
        return max(longest, length or 0)


def pad_rows(rows_N: Tensor, lengths_B: Tensor, length: int, fill: float) -> Tensor:
    """[N, ...] rows of B samples one after another -> [B, length, ...], short samples padded with
    `fill`.

    Equal full-length samples (the usual packed case) are a view, not a copy.
    """
    num_samples = lengths_B.numel()
    inner = rows_N.shape[1:]
    if rows_N.shape[0] == num_samples * length:
        return rows_N.reshape(num_samples, length, *inner)
    out = rows_N.new_full((num_samples, length, *inner), fill)
    keep_BT = torch.arange(length, device=rows_N.device) < lengths_B.to(rows_N.device)[:, None]
    out[keep_BT] = rows_N
    return out
