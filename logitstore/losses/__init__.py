"""Distillation losses computed from the record alone: one module per paper."""

from logitstore.losses.contract import LOSSES, MISSING, LossAndCount, LossInfo
from logitstore.losses.cross_entropy import cross_entropy
from logitstore.losses.divergences import Bracket, jsd, jsd_bracket, tvd, tvd_bracket
from logitstore.losses.kd_with_ce import sparse_kd_with_ce
from logitstore.losses.kl import forward_kl, reverse_kl
from logitstore.losses.weighted import random_sampling_kd, threshold_kd

__all__ = [
    "LOSSES",
    "MISSING",
    "Bracket",
    "LossAndCount",
    "LossInfo",
    "cross_entropy",
    "forward_kl",
    "jsd",
    "jsd_bracket",
    "random_sampling_kd",
    "reverse_kl",
    "sparse_kd_with_ce",
    "threshold_kd",
    "tvd",
    "tvd_bracket",
]
