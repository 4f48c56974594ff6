"""Encoders: logits to records, vectorised torch on any device."""

from logitstore.signals import topk as _topk  # noqa: F401  (registers the encoder)
from logitstore.signals.encoder import Encoder, encoder
from logitstore.signals.selection import TopK, exact_topk

__all__ = ["Encoder", "TopK", "encoder", "exact_topk"]
