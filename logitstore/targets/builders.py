"""Flat targets of each signal from a record's columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.record import Record
from logitstore.record.threshold import decode_threshold
from logitstore.spec.header import Header
from logitstore.spec.signals import EMPTY_SLOT, SampledSpec
from logitstore.targets.base import PAD_ID, pad_rows
from logitstore.targets.context import GraphTargets, ScoresTargets
from logitstore.targets.dense import DenseTargets
from logitstore.targets.topk import TopKTargets
from logitstore.targets.weighted import SampledTargets, ThresholdTargets

__all__ = [
    "as_float32",
    "as_int64",
    "dense",
    "graph",
    "sampled",
    "scores",
    "threshold",
    "topk",
]

Common = dict[str, Any]


def as_int64(column: NDArray[Any]) -> Tensor:
    """An integer column as an int64 tensor that owns its memory."""
    return torch.from_numpy(column.astype(np.int64))


def as_float32(column: NDArray[Any]) -> Tensor:
    """A float column as a float32 tensor that owns its memory."""
    # torch converts float16 some fifty times as fast as numpy, but warns of read-only arrays.
    source = column if column.flags.writeable else column.copy()
    return torch.from_numpy(source).to(torch.float32, copy=True)


def dense(record: Record, header: Header, common: Common) -> DenseTargets:
    """Raw logits."""
    return DenseTargets(logits=as_float32(record["logits"]), **common)


def graph(record: Record, header: Header, common: Common) -> GraphTargets:
    """Per-segment sums; co-activation as a full symmetric matrix, nodes padded to the most of any
    segment."""
    num_segments = as_int64(record["num_segments"])
    num_positions = as_int64(record["graph_positions"])
    if "row_sums" in record:
        row_sums = as_float32(record["row_sums"])
        k = row_sums.shape[-1]
        upper = np.triu_indices(k)
        full = np.zeros((len(row_sums), k, k), np.float32)
        full[:, upper[0], upper[1]] = record["coactivation"]
        full[:, upper[1], upper[0]] = record["coactivation"]
        return GraphTargets(
            row_sums=row_sums,
            num_positions=num_positions,
            num_segments=num_segments,
            coactivation=torch.from_numpy(full),
            **common,
        )
    first = np.cumsum(record["num_segments"], dtype=np.int64) - record["num_segments"]
    sample = np.repeat(np.arange(record.num_samples), record["num_nodes"])
    segment = first[sample] + record["node_segments"]
    counts = torch.from_numpy(np.bincount(segment, minlength=num_positions.numel()))
    width = max(int(counts.max()) if counts.numel() else 0, 1)
    return GraphTargets(
        row_sums=pad_rows(as_float32(record["node_sums"]), counts, width, 0.0),
        node_ids=pad_rows(as_int64(record["node_ids"]), counts, width, PAD_ID),
        num_positions=num_positions,
        num_segments=num_segments,
        **common,
    )


def scores(record: Record, header: Header, common: Common) -> ScoresTargets:
    """Candidate ids and raw scores."""
    ids = record["ids"].astype(np.int64)
    ids[ids == EMPTY_SLOT] = PAD_ID
    return ScoresTargets(ids=torch.from_numpy(ids), scores=as_float32(record["scores"]), **common)


def topk(record: Record, header: Header, common: Common) -> TopKTargets:
    """ids and log-probs; a nucleus record is padded to its longest position.

    Where the top-1 log-prob is stored beside log-probs in steps, it replaces the first of them.
    """
    ids, logprobs = as_int64(record["ids"]), as_float32(record["logprobs"])
    if "num_ids" in record:
        counts = as_int64(record["num_ids"])
        width = int(counts.max()) if counts.numel() else 1
        ids = pad_rows(ids, counts, width, PAD_ID)
        logprobs = pad_rows(logprobs, counts, width, -torch.inf)
    if "top1_logprob" in record and len(logprobs):
        logprobs[:, 0] = as_float32(record["top1_logprob"])
    log_tail = as_float32(record["log_tail"]) if "log_tail" in record else None
    return TopKTargets(ids=ids, logprobs=logprobs, log_tail=log_tail, **common)


def sampled(record: Record, header: Header, common: Common) -> SampledTargets:
    """Weights counts / rounds times the mass they were drawn from, or the stored importance
    weights."""
    spec = header.signal
    assert isinstance(spec, SampledSpec)
    counts = as_int64(record["counts"])
    num_ids = as_int64(record["num_ids"])
    if "weights" in record:
        weights = as_float32(record["weights"])
    else:
        weights = counts.float() / spec.rounds
        if "always_logprobs" in record:
            mass = 1 - np.exp(record["always_logprobs"].astype(np.float64)).sum(-1)
            owner = np.repeat(np.arange(record.num_positions), record["num_ids"])
            weights = weights * torch.from_numpy(mass.clip(min=0)[owner]).float()
    return SampledTargets(
        ids=as_int64(record["ids"]),
        counts=counts,
        weights=weights,
        num_ids=num_ids,
        rounds=spec.rounds,
        power=spec.power,
        **common,
    )


def threshold(record: Record, header: Header, common: Common) -> ThresholdTargets:
    """Head (the realised next token always among it) in descending order, then the tail."""
    entries = decode_threshold(record, header.always_ids)
    with np.errstate(divide="ignore"):
        log_tail = np.log(entries.tail_mass)
    return ThresholdTargets(
        ids=torch.from_numpy(entries.ids),
        weights=as_float32(entries.weights),
        num_ids=torch.from_numpy(entries.num_heads + entries.num_tails),
        num_heads=torch.from_numpy(entries.num_heads),
        log_tail=as_float32(log_tail),
        **common,
    )
