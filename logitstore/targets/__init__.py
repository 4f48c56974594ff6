"""Records as torch tensors that losses accept."""

from logitstore.targets.base import PAD_ID, Targets
from logitstore.targets.context import GraphTargets, ScoresTargets
from logitstore.targets.dense import DenseTargets
from logitstore.targets.records import from_records
from logitstore.targets.topk import TopKTargets
from logitstore.targets.weighted import Entries, SampledTargets, ThresholdTargets, WeightedTargets

__all__ = [
    "PAD_ID",
    "DenseTargets",
    "Entries",
    "GraphTargets",
    "SampledTargets",
    "ScoresTargets",
    "Targets",
    "ThresholdTargets",
    "TopKTargets",
    "WeightedTargets",
    "from_records",
]
