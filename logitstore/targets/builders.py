"""Flat targets of each signal from a record's columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.spec.header import Header
from logitstore.spec.signals import SampledSpec
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
    return torch.from_numpy(column.astype(np.float32))


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
    # The largest uint32 marks a candidate slot that was left empty.
    ids = record["ids"].astype(np.int64)
    ids[ids == np.iinfo(np.uint32).max] = PAD_ID
    return ScoresTargets(ids=torch.from_numpy(ids), scores=as_float32(record["scores"]), **common)


def topk(record: Record, header: Header, common: Common) -> TopKTargets:
    """ids and log-probs; a nucleus record is padded to its longest position."""
    ids, logprobs = as_int64(record["ids"]), as_float32(record["logprobs"])
    if "num_ids" in record:
        counts = as_int64(record["num_ids"])
        width = int(counts.max()) if counts.numel() else 1
        ids = pad_rows(ids, counts, width, PAD_ID)
        logprobs = pad_rows(logprobs, counts, width, -torch.inf)
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
    """Decode head and tail: see `logitstore.signals.threshold` for what the slots hold.

    Every position gets its realised next token as an exact head entry. Head entries come in
    descending order, then the tail by ascending id. Weights of a position and its always-ids add up
    to 1.
    """
    num_positions = record.num_positions
    heads = record["num_heads"].astype(np.int64)
    tails = record["num_tails"].astype(np.int64)
    slot_owner = np.repeat(np.arange(num_positions), heads)
    value = np.exp(record["head_logprobs"].astype(np.float64))
    first = (np.cumsum(heads) - heads)[heads > 0]

    label = labels(record)
    has_label = label != IGNORE
    known = np.where(has_label, np.exp(record["label_logprob"].astype(np.float64)), 0.0)
    if "always_logprobs" in record:
        always = np.exp(record["always_logprobs"].astype(np.float64))
        is_always = (label[:, None] == np.array(header.always_ids)).any(-1)
        # A label among the always-ids is one entry, theirs.
        has_label = has_label & ~is_always
        known = np.where(has_label, known, 0.0) + always.sum(-1)

    tail_mass = np.maximum(1.0 - known, 0.0)
    tail_mass[heads > 0] = value[first]
    value[first] = 0.0
    others = np.bincount(slot_owner, weights=value, minlength=num_positions)
    top = np.maximum(1.0 - known - tail_mass - others, 0.0)
    value[first] = top[heads > 0]

    label_at = np.flatnonzero(has_label)
    tail_owner = np.repeat(np.arange(num_positions), tails)
    owner = np.concatenate([slot_owner, label_at, tail_owner])
    ids = np.concatenate(
        [record["head_ids"].astype(np.int64), label[label_at], record["tail_ids"].astype(np.int64)]
    )
    label_probs = np.exp(record["label_logprob"].astype(np.float64))[label_at]
    tail_weight = (tail_mass / np.maximum(tails, 1))[tail_owner]
    weights = np.concatenate([value, label_probs, tail_weight])
    is_tail = np.zeros(len(ids), np.bool_)
    is_tail[len(ids) - len(tail_owner) :] = True
    order = np.lexsort((ids, np.where(is_tail, 0.0, -weights), is_tail, owner))
    num_heads = heads + has_label
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail_mass)
    return ThresholdTargets(
        ids=torch.from_numpy(ids[order]),
        weights=torch.from_numpy(weights[order].astype(np.float32)),
        num_ids=torch.from_numpy(num_heads + tails),
        num_heads=torch.from_numpy(num_heads.astype(np.int64)),
        log_tail=torch.from_numpy(log_tail.astype(np.float32)),
        **common,
    )
