"""Distillation losses computed from the record alone: one module per paper.

Other names the field uses (`rskd`, `kd`, `lbf`, ...) and the nn.Module form of every loss
(`ForwardKL`, `RandomSamplingKD`, ...) are attributes of this package too.
"""

from collections.abc import Callable
from typing import Any

from logitstore.losses import modules
from logitstore.losses.augmentation import (
    EntropyBracket,
    cutmix_pick,
    cutmix_scores,
    entropy_bracket,
    pool_mean,
    t_stddev,
    t_stddev_bound,
)
from logitstore.losses.byte_alignment import ByteGroup, byte_ends, byte_groups, matched_ids
from logitstore.losses.contract import LOSSES, MISSING, LossAndCount, LossInfo
from logitstore.losses.cross_entropy import cross_entropy
from logitstore.losses.divergences import Bracket, jsd, jsd_bracket, tvd, tvd_bracket
from logitstore.losses.dual_head import AuxiliaryHead, dual_head, gradient_alignment
from logitstore.losses.fused_linear import fused_linear_kd
from logitstore.losses.gld import gld, gromov_wasserstein_square, topk_wasserstein
from logitstore.losses.gold import gold
from logitstore.losses.kd_partial import (
    instance_weights,
    kd_partial,
    relation_table,
    similarity_table,
)
from logitstore.losses.kl import forward_kl, reverse_kl
from logitstore.losses.llp import llp_distribution, llp_rank
from logitstore.losses.logits_sft import logits_sft
from logitstore.losses.metrics import (
    AcceptanceRate,
    Agreement,
    Calibration,
    Perplexity,
    RecordKL,
    acceptance,
    ece,
    expected_block_tokens,
    perplexity,
    record_kl,
    top1_agreement,
)
from logitstore.losses.modules import FusedLinearKD, LossModule
from logitstore.losses.pld import pld
from logitstore.losses.sinkhorn import sinkhorn
from logitstore.losses.sparse_kd_with_ce import sparse_kd_with_ce
from logitstore.losses.sparse_logprobs import SparseLogprobs, sparse_logprobs
from logitstore.losses.topkd import ScaledLogits, top_scaled_logits, topkd
from logitstore.losses.ttm import ttm, wttm
from logitstore.losses.uld import uld
from logitstore.losses.weighted import random_sampling_kd, threshold_kd

__all__ = [
    "LOSSES",
    "MISSING",
    "AcceptanceRate",
    "Agreement",
    "AuxiliaryHead",
    "Bracket",
    "ByteGroup",
    "Calibration",
    "EntropyBracket",
    "FusedLinearKD",
    "LossAndCount",
    "LossInfo",
    "LossModule",
    "Perplexity",
    "RecordKL",
    "ScaledLogits",
    "SparseLogprobs",
    "acceptance",
    "byte_ends",
    "byte_groups",
    "cross_entropy",
    "cutmix_pick",
    "cutmix_scores",
    "dual_head",
    "ece",
    "entropy_bracket",
    "expected_block_tokens",
    "forward_kl",
    "fused_linear_kd",
    "gld",
    "gold",
    "gradient_alignment",
    "gromov_wasserstein_square",
    "instance_weights",
    "jsd",
    "jsd_bracket",
    "kd_partial",
    "llp_distribution",
    "llp_rank",
    "logits_sft",
    "matched_ids",
    "perplexity",
    "pld",
    "pool_mean",
    "random_sampling_kd",
    "record_kl",
    "relation_table",
    "reverse_kl",
    "similarity_table",
    "sinkhorn",
    "sparse_kd_with_ce",
    "sparse_logprobs",
    "t_stddev",
    "t_stddev_bound",
    "threshold_kd",
    "top1_agreement",
    "top_scaled_logits",
    "topk_wasserstein",
    "topkd",
    "ttm",
    "tvd",
    "tvd_bracket",
    "uld",
    "wttm",
]


def __getattr__(name: str) -> Callable[..., Any]:
    """Aliases and nn.Module forms, from what is registered."""
    for info in LOSSES.values():
        if name in info.aliases and info.function is not None:
            return info.function
    if name in modules.module_names():
        module_class: type[LossModule] = getattr(modules, name)
        return module_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
