"""Top-K targets: the K most probable ids and their exact log-probs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from logitstore.spec.errors import TargetsError
from logitstore.targets.base import PAD_ID, Targets, pad_rows
from logitstore.targets.dense import at_least_float32

__all__ = ["TopKTargets"]


@dataclass(frozen=True, kw_only=True)
class TopKTargets(Targets):
    """K ids per position in descending teacher order (ties: lowest id first) with their log-probs.

    Attributes:
        ids: int64 [..., K]; -1 where a nucleus-truncated position holds fewer than K.
        logprobs: float [..., K], log p(id) over the whole vocabulary, nats; -inf where ids is -1.
        log_tail: float [...], log of the mass outside `ids`, nats; -inf when nothing is outside.
    """

    signal: ClassVar[str] = "topk"

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor | None = None

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        k: int,
        *,
        labels: Tensor | None = None,
        temperatures: Sequence[float] = (),
    ) -> TopKTargets:
        """Exact targets from teacher logits [..., V], with log_tail, lse, entropy and what is asked
        for.

        Args:
            logits: float [..., V]; half types are upcast to float32.
            k: ids to keep, 1 to V.
            labels: int64 [...], realised tokens; adds label_logprob and label_rank (negative:
                none).
            temperatures: each adds `lse_at[T]`.
        """
        vocab_size = logits.shape[-1]
        if not 1 <= k <= vocab_size:
            raise TargetsError(
                "k-exceeds-vocabulary",
                "cannot keep that many ids",
                got=k,
                expected=f"1..{vocab_size}",
            )
        z = at_least_float32(logits)
        lse = torch.logsumexp(z, -1)
        # Stable descending sort = ties by lowest id; this constructor is for references, not for
        # capture.
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices
        ids, rest = order[..., :k], order[..., k:]
        logprobs_all = z - lse[..., None]
        fields: dict[str, Tensor] = {}
        if labels is not None:
            has_label = labels >= 0
            safe = labels.clamp_min(0)
            label_logprob = logprobs_all.gather(-1, safe[..., None])[..., 0]
            fields["label_logprob"] = torch.where(has_label, label_logprob, 0.0)
            fields["label_rank"] = (order == safe[..., None]).int().argmax(-1)
        return cls(
            vocab_size=vocab_size,
            ids=ids,
            logprobs=logprobs_all.gather(-1, ids),
            log_tail=torch.logsumexp(logprobs_all.gather(-1, rest), -1)
            if k < vocab_size
            else torch.full_like(lse, -torch.inf),
            lse=lse,
            lse_at={t: torch.logsumexp(z / t, -1) for t in temperatures},
            entropy=torch.special.entr(logprobs_all.exp()).sum(-1),
            logit_mean=z.mean(-1),
            **fields,
        )

    @property
    def k(self) -> int:
        """K, ids per position."""
        return self.ids.shape[-1]

    def padded(self, length: int | None = None) -> Self:
        if self.lengths is None:
            return self
        length = self._padded_length(length)
        fields = self._padded_scalars(length)
        if self.log_tail is not None:
            fields["log_tail"] = pad_rows(self.log_tail, self.lengths, length, -torch.inf)
        return dataclasses.replace(
            self,
            ids=pad_rows(self.ids, self.lengths, length, PAD_ID),
            logprobs=pad_rows(self.logprobs, self.lengths, length, -torch.inf),
            **fields,
        )

    def truncated(self, k: int) -> TopKTargets:
        """The exact top-k record inside this one; the dropped mass joins log_tail."""
        if k >= self.k:
            return self
        dropped = self.logprobs[..., k:]
        log_tail = torch.logsumexp(dropped, -1)
        if self.log_tail is not None:
            log_tail = torch.logaddexp(log_tail, self.log_tail.to(log_tail.dtype))
        return dataclasses.replace(
            self,
            ids=self.ids[..., :k],
            logprobs=self.logprobs[..., :k],
            log_tail=None if self.log_tail is None else log_tail,
        )

    def dense(self, vocab_size: int | None = None) -> Tensor:
        probs = at_least_float32(self.logprobs).exp()
        out = probs.new_zeros(*probs.shape[:-1], vocab_size or self.vocab_size)
        # Padding has probability 0, so adding it to id 0 changes nothing.
        return out.scatter_add_(-1, self.ids.clamp_min(0), probs)
