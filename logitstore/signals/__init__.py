"""Encoders: logits to records, vectorised torch on any device."""

from logitstore.signals import dense as _dense  # noqa: F401  (importing registers an encoder)
from logitstore.signals import graph as _graph  # noqa: F401
from logitstore.signals import sampled as _sampled  # noqa: F401
from logitstore.signals import threshold as _threshold  # noqa: F401
from logitstore.signals import topk as _topk  # noqa: F401
from logitstore.signals.encoder import Completion, Encoder, encoder
from logitstore.signals.mass import MassCurve
from logitstore.signals.selection import TopK, exact_topk

__all__ = ["Completion", "Encoder", "MassCurve", "TopK", "encoder", "exact_topk"]
