"""Distillation losses computed from the record alone: one module per paper."""

from logitstore.losses.augmentation import (
    EntropyBracket,
    cutmix_pick,
    cutmix_scores,
    entropy_bracket,
    pool_mean,
    t_stddev,
    t_stddev_bound,
)
from logitstore.losses.contract import LOSSES, MISSING, LossAndCount, LossInfo
from logitstore.losses.cross_entropy import cross_entropy
from logitstore.losses.divergences import Bracket, jsd, jsd_bracket, tvd, tvd_bracket
from logitstore.losses.dual_head import AuxiliaryHead, dual_head, gradient_alignment
from logitstore.losses.fused_linear import fused_linear_kd
from logitstore.losses.kd_partial import (
    instance_weights,
    kd_partial,
    relation_table,
    similarity_table,
)
from logitstore.losses.kd_with_ce import sparse_kd_with_ce
from logitstore.losses.kl import forward_kl, reverse_kl
from logitstore.losses.llp import llp_distribution, llp_rank
from logitstore.losses.pld import pld
from logitstore.losses.sparse_logprobs import SparseLogprobs, sparse_logprobs
from logitstore.losses.topkd import ScaledLogits, top_scaled_logits, topkd
from logitstore.losses.ttm import ttm, wttm
from logitstore.losses.weighted import random_sampling_kd, threshold_kd

__all__ = [
    "LOSSES",
    "MISSING",
    "AuxiliaryHead",
    "Bracket",
    "EntropyBracket",
    "LossAndCount",
    "LossInfo",
    "ScaledLogits",
    "SparseLogprobs",
    "cross_entropy",
    "cutmix_pick",
    "cutmix_scores",
    "dual_head",
    "entropy_bracket",
    "forward_kl",
    "fused_linear_kd",
    "gradient_alignment",
    "instance_weights",
    "jsd",
    "jsd_bracket",
    "kd_partial",
    "llp_distribution",
    "llp_rank",
    "pld",
    "pool_mean",
    "random_sampling_kd",
    "relation_table",
    "reverse_kl",
    "similarity_table",
    "sparse_kd_with_ce",
    "sparse_logprobs",
    "t_stddev",
    "t_stddev_bound",
    "threshold_kd",
    "top_scaled_logits",
    "topkd",
    "ttm",
    "tvd",
    "tvd_bracket",
    "wttm",
]
