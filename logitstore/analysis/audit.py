"""Audit: run the teacher again on a random slice of a store and compare.

Stored log-probs are compared with fresh ones, id by id. Sampled parts cannot be compared id by id,
so their hit rates are: an id of probability p must be among N draws with probability 1 - (1 - p)^N,
the most probable tail id of a threshold record with probability p / tau. The z-scores of those
counts are standard normal for an honest store. Always-ids are compared as stored log-probs; draws
come from the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.analysis.inputs import examples_of
from logitstore.corpora import Sample
from logitstore.record import Record
from logitstore.record.random import uniform
from logitstore.spec.errors import AlignmentError, UsageError
from logitstore.spec.header import Header
from logitstore.store import Store
from logitstore.store import open as open_store
from logitstore.targets import (
    DenseTargets,
    SampledTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
    from_records,
)
from logitstore.teachers import (
    DTYPES,
    Classifier,
    Teacher,
    TeacherOptions,
    load_classifier,
    load_teacher,
)

__all__ = ["TOLERANCE", "Audit", "Difference", "HitRate", "audit"]

# Samples compared unless told otherwise; examples of one forward pass.
_SEQUENCES, _EXAMPLES = 8, 256

# Mean |stored - fresh| that an honest store keeps below, nats. SmolLM2-135M in bfloat16 against
# float32: 0.09 for the 64 largest log-probs, 0.12 for lse; records in steps of 1/16 nat: 0.02.
TOLERANCE = 0.25

# An honest store's z-score exceeds this once in 16,000 tests.
_SUSPICIOUS_Z = 4.0


@dataclass
class Difference:
    """Differences of one quantity, |stored - fresh|, nats.

    Attributes:
        count, total, largest: over all compared values.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """0 when nothing was compared."""
        return self.total / self.count if self.count else 0.0

    def add(self, stored: Tensor, fresh: Tensor) -> None:
        """Compare values; where both are -inf they agree."""
        same = stored == fresh
        delta = (stored.double() - fresh.double()).abs().masked_fill(same, 0.0)
        self.count += delta.numel()
        if delta.numel():
            self.total += float(delta.sum())
            self.largest = max(self.largest, float(delta.max()))


@dataclass
class HitRate:
    """How often ids of known probability were drawn.

    Attributes:
        hits, expected, variance: sums over positions.
    """

    hits: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def z(self) -> float:
        """Standard normal for an honest store."""
        return (self.hits - self.expected) / math.sqrt(self.variance) if self.variance else 0.0

    def add(self, hit: Tensor, probability: Tensor) -> None:
        """Count hits of chances."""
        self.hits += int(hit.sum())
        self.expected += float(probability.double().sum())
        self.variance += float((probability.double() * (1 - probability.double())).sum())


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        samples, positions: compared.
        logprobs: of the ids the record holds exactly.
        aux: field -> difference, of every stored field that follows from fresh logits.
        hit_rates: test -> hit rate, for sampled parts.
        same_weights: whether the teacher's fingerprint is the one the store recorded; None where
            either has none.
        tolerance: see `audit`.
    """

    samples: int = 0
    positions: int = 0
    logprobs: Difference = field(default_factory=Difference)
    aux: dict[str, Difference] = field(default_factory=dict)
    hit_rates: dict[str, HitRate] = field(default_factory=dict)
    same_weights: bool | None = None
    tolerance: float = TOLERANCE

    @property
    def doubts(self) -> list[str]:
        """What an honest store of this teacher would not show, in words; empty when all is well."""
        compared = {"log-probs": self.logprobs, **self.aux}
        found = [
            f"{name}: {d.mean:.3g} nats off on average, where {self.tolerance:g} may be"
            for name, d in compared.items()
            if not d.mean <= self.tolerance
        ]
        return found + [
            f"{name}: drawn {h.hits} times where {h.expected:.1f} are expected (z = {h.z:+.1f})"
            for name, h in self.hit_rates.items()
            if not abs(h.z) <= _SUSPICIOUS_Z
        ]

    @property
    def ok(self) -> bool:
        """True when there are no `doubts`."""
        return not self.doubts

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""

        def of(d: Difference) -> dict[str, Any]:
            return {"count": d.count, "mean": d.mean, "max": d.largest}

        return {
            "samples": self.samples,
            "positions": self.positions,
            "logprobs": of(self.logprobs),
            "aux": {name: of(d) for name, d in self.aux.items()},
            "hit_rates": {
                name: {"hits": h.hits, "expected": h.expected, "z": h.z}
                for name, h in self.hit_rates.items()
            },
            "same_weights": self.same_weights,
            "tolerance": self.tolerance,
            "doubts": self.doubts,
            "ok": self.ok,
        }


def audit(
    store: str | os.PathLike[str] | Store,
    teacher: str | Teacher | Classifier,
    *,
    samples: int | None = None,
    seed: int = 0,
    chosen: Sequence[int] = (),
    corpus: Sequence[str] = (),
    options: TeacherOptions | None = None,
    tolerance: float = TOLERANCE,
) -> Audit:
    """Run `teacher` over `samples` samples of a store, drawn by `seed`, and compare.

    Args:
        teacher: a loaded one, or `hf:PATH_OR_ID` or `py:module:function`.
        samples: None: 8 sequences, or 256 samples of a classifier.
        chosen: numbers of the samples that are meant, in place of random ones.
        corpus: files or patterns that a classification store was captured from: it keeps no inputs.
        options: how to run a teacher given by name; with dtype "auto", in the dtype that the store
            recorded.
        tolerance: largest mean |stored - fresh| of log-probs and fields, nats, that raises no
            doubts.

    Raises: UsageError bad-argument for a signal that is no distribution over the vocabulary, and
    for a classification store without its corpus; AlignmentError tokenizer-mismatch; CorpusError
    corpus-changed; TeacherError teacher-load; whatever reading the store raises.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    try:
        header = opened.header
        if header.signal.kind in ("graph", "scores"):
            raise UsageError(
                "bad-argument",
                "its records are no distributions that fresh ones could be compared with",
                where=opened.location,
                got=f"a store of {header.signal}",
                expected="dense, topk, sampled or threshold records",
            )
        sequences = header.sample_kind == "sequence"
        if isinstance(teacher, str):
            load = load_teacher if sequences else load_classifier
            teacher = load(teacher, _as_captured(header, options))
        count = len(set(chosen)) or min(
            samples or (_SEQUENCES if sequences else _EXAMPLES), len(opened)
        )
        order = np.argsort(uniform(seed, 0, np.arange(len(opened)), 0), kind="stable")
        numbers = sorted(set(chosen) or order[:count].tolist())
        records = [opened.sample(number) for number in numbers]
        _check_vocabulary(opened, teacher.vocab_size)
        found = Audit(tolerance=tolerance)
        recorded, given = header.teacher.fingerprint, teacher.describe().fingerprint
        found.same_weights = recorded == given if recorded and given else None
        if sequences:
            model = cast(Teacher, teacher)
            _check_tokenizer(opened, model)
            for record in records:
                sample = _window(record)
                _compare([record], header, sample.labels, model.blocks([sample]), found)
        else:
            classifier = cast(Classifier, teacher)
            examples = examples_of(opened, records, corpus)
            for start in range(0, count, _EXAMPLES):
                part = examples[start : start + _EXAMPLES]
                labels_P = np.concatenate([example.labels for example in part])
                blocks = classifier.blocks(part)
                _compare(records[start : start + len(part)], header, labels_P, blocks, found)
        return found
    finally:
        if opened is not store:
            opened.close()


def _as_captured(header: Header, options: TeacherOptions | None) -> TeacherOptions:
    """How to run the teacher again: what is left open, as it was run for the store."""
    options = options or TeacherOptions(threads=header.teacher.threads_per_worker or 1)
    recorded = header.teacher.compute_dtype
    if options.dtype == "auto" and recorded in DTYPES:
        options = replace(options, dtype=recorded)
    return options


def _check_vocabulary(store: Store, vocab_size: int) -> None:
    if vocab_size != store.header.vocab_size:
        raise AlignmentError(
            "tokenizer-mismatch",
            "this teacher has another vocabulary than the store",
            where=store.location,
            got=vocab_size,
            expected=store.header.vocab_size,
        )


def _check_tokenizer(store: Store, teacher: Teacher) -> None:
    held = store.header.tokenizer
    fingerprint = teacher.tokenizer.table.fingerprint
    if held is not None and held.fingerprint != fingerprint:
        raise AlignmentError(
            "tokenizer-mismatch",
            "this teacher reads other tokens than the store holds",
            where=store.location,
            got=f"tokenizer {fingerprint}",
            expected=held.fingerprint,
        )


def _window(record: Record) -> Sample:
    """The sequence that a record is of."""
    tokens = record["tokens"].astype(np.int64)
    return Sample(
        key=record.sample_keys()[0],
        tokens=tokens,
        segment_ids=record["segment_ids"].astype(np.int64),
        byte_end=np.zeros_like(tokens),
    )


def _compare(
    records: Sequence[Record],
    header: Header,
    labels_P: NDArray[np.int64],
    blocks: Iterable[Tensor],
    found: Audit,
) -> None:
    """Compare samples with the teacher's fresh rows, which follow their positions."""
    targets = from_records(list(records), header)
    labels = torch.from_numpy(labels_P)
    found.samples += len(records)
    found.positions += len(labels)
    start = 0
    for block_RV in blocks:
        logits_RV = block_RV.float().cpu()
        rows = slice(start, start + len(logits_RV))
        start = rows.stop
        logp_RV = torch.log_softmax(logits_RV, -1)
        _compare_aux(targets, rows, logits_RV, logp_RV, labels[rows], found)
        _compare_signal(targets, rows, logp_RV, labels[rows], found)


def _compare_aux(
    targets: Targets,
    rows: slice,
    logits_RV: Tensor,
    logp_RV: Tensor,
    labels_R: Tensor,
    found: Audit,
) -> None:
    label_logp = logp_RV.gather(-1, labels_R.clamp_min(0)[:, None])[:, 0]
    fresh = {
        "label_logprob": torch.where(labels_R >= 0, label_logp, 0.0),
        "entropy": torch.special.entr(logp_RV.exp()).sum(-1),
        "top1_logprob": logp_RV.amax(-1),
        "lse": torch.logsumexp(logits_RV, -1),
        "logit_mean": logits_RV.mean(-1),
    }
    if targets.always_ids is not None:
        fresh["always_logprobs"] = logp_RV[:, targets.always_ids]
    for name, values in fresh.items():
        stored = getattr(targets, name)
        if stored is not None:
            found.aux.setdefault(name, Difference()).add(stored[rows], values)
    for temperature, stored in targets.lse_at.items():
        values = torch.logsumexp(logits_RV / temperature, -1)
        found.aux.setdefault(f"lse_at {temperature:g}", Difference()).add(stored[rows], values)
    if isinstance(targets, TopKTargets) and targets.log_tail is not None:
        ids = targets.ids[rows]
        kept = torch.zeros_like(logp_RV, dtype=torch.bool).scatter_(-1, ids.clamp_min(0), True)
        tail = torch.logsumexp(logp_RV.masked_fill(kept, -torch.inf), -1)
        found.aux.setdefault("log_tail", Difference()).add(targets.log_tail[rows], tail)


def _compare_signal(
    targets: Targets, rows: slice, logp_RV: Tensor, labels_R: Tensor, found: Audit
) -> None:
    if isinstance(targets, DenseTargets):
        found.logprobs.add(targets.logprobs[rows], logp_RV)
    elif isinstance(targets, TopKTargets):
        ids = targets.ids[rows]
        valid = ids >= 0
        fresh = logp_RV.gather(-1, ids.clamp_min(0))
        found.logprobs.add(targets.logprobs[rows][valid], fresh[valid])
    elif isinstance(targets, SampledTargets | ThresholdTargets):
        position = targets.position_of_entry()
        inside = (position >= rows.start) & (position < rows.stop)
        row, ids = position[inside] - rows.start, targets.ids[inside]
        drawn = torch.zeros_like(logp_RV, dtype=torch.bool)
        drawn[row, ids] = True
        free_RV = logp_RV
        if targets.always_ids is not None:
            free_RV = logp_RV.index_fill(-1, targets.always_ids, -torch.inf)
        if isinstance(targets, SampledTargets):
            _sampled_hits(targets, drawn, free_RV, labels_R, found)
        else:
            head = targets.head_mask()[inside]
            weights = targets.weights[inside]
            found.logprobs.add(weights[head].log(), logp_RV[row[head], ids[head]])
            exact = torch.zeros_like(drawn)
            exact[row[head], ids[head]] = True
            _tail_hits(targets, rows, drawn, exact, free_RV, found)


def _sampled_hits(
    targets: SampledTargets, drawn: Tensor, free_RV: Tensor, labels_R: Tensor, found: Audit
) -> None:
    """The realised token, and the most probable one: drawn as often as 1 - (1 - p)^N says.

    `free_RV`: log-probs, -inf for ids that are never drawn.
    """
    proposal = torch.log_softmax(free_RV * targets.power, -1)
    top = free_RV.argmax(-1)
    for name, ids in (("label", labels_R), ("top-1", top)):
        # A label may be an always-id, and a row's mass may lie on always-ids alone.
        possible = free_RV.gather(-1, ids.clamp_min(0)[:, None])[:, 0] > -torch.inf
        rows = ((ids >= 0) & possible).nonzero()[:, 0]
        p = proposal[rows, ids[rows]].double().exp()
        chance = -torch.expm1(targets.rounds * torch.log1p(-p.clamp_max(1 - 1e-12)))
        found.hit_rates.setdefault(name, HitRate()).add(drawn[rows, ids[rows]], chance)


def _tail_hits(
    targets: ThresholdTargets,
    rows: slice,
    drawn: Tensor,
    exact: Tensor,
    free_RV: Tensor,
    found: Audit,
) -> None:
    """The most probable id outside the head: stored with probability p / tau.

    `free_RV`: log-probs, -inf for ids that are never drawn.
    """
    num_tails = (targets.num_ids - targets.num_heads)[rows]
    probe = free_RV.masked_fill(exact, -torch.inf).argmax(-1)
    sampled = num_tails > 0
    index = sampled.nonzero()[:, 0]
    p = free_RV[index, probe[index]].double().exp()
    tau = targets.log_tail[rows][index].double().exp() / num_tails[index]
    chance = (p / tau).clamp(0, 1)
    hit = drawn[index, probe[index]]
    found.hit_rates.setdefault("largest of the tail", HitRate()).add(hit, chance)
