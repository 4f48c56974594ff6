"""Advice before a capture: what each signal would cost and lose, from a pilot on the user's own
data.

The teacher runs once over a slice of the corpus; every candidate signal encodes the same logits.
Bytes are those of real chunks, speed is that of the real encoder, errors are measured against the
full distribution on a fixed share of the positions.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logitstore.capture import CaptureSettings, Slice, slice_of
from logitstore.capture.chunks import Chunker, sample_encoder
from logitstore.capture.worker import micro_batches
from logitstore.containers import container
from logitstore.record import Record
from logitstore.record.statistics import merge, statistics_of
from logitstore.signals import Encoder, encoder
from logitstore.spec.header import Header
from logitstore.spec.signals import parse_signal
from logitstore.targets import DenseTargets, Targets, TopKTargets, WeightedTargets, from_records

__all__ = ["DEFAULT_SIGNALS", "Advice", "Option", "advise"]

DEFAULT_SIGNALS = (
    "topk:16",
    "topk:64",
    "topk:64,coding=q8",
    "sampled:50",
    "threshold:tau=1/20",
    "threshold:tau=1/40",
    "threshold:tau=1/60",
)

# Of a classifier: few classes, and students that soften.
CLASSIFIER_SIGNALS = ("dense", "topk:5", "sampled:50", "threshold:tau=1/20", "threshold:tau=1/40")
# Up to so many classes a row of float16 logits is no matter of bytes.
_DENSE_CLASSES = 4096

# The published record: others are measured against it.
_REFERENCE = "sampled:50"
# Errors of a language model are measured at every so many positions: a dense row is V floats.
_STRIDE = 16


@dataclass(frozen=True, kw_only=True)
class Option:
    """One signal, on the pilot's positions.

    Attributes:
        signal: as typed.
        bytes_per_token, total_bytes: of shard objects.
        hours: of one worker.
        kept_mass: mean teacher mass of the exactly stored ids; None where none is.
        squared_error: mean over positions of ||w - p||^2, w the weights a student gets without any
            assumption about the rest. The noise of the logit gradient for unbiased signals.
        bias: mean over positions of the L1 distance between the expected weights and p: 0 for
            unbiased signals, the mass outside for top-K. At most twice this is the L1 error of the
            expected gradient (exactly twice for `missing="renormalize"`). Both are None for signals
            that are no distribution.
    """

    signal: str
    bytes_per_token: float
    total_bytes: int
    hours: float
    kept_mass: float | None
    squared_error: float | None
    bias: float | None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Options and a recommendation.

    Attributes:
        options: one per signal, in the order asked for.
        recommended: signal of the option to take; `reason` says why.
        documents, tokens: of the whole capture; `exact_tokens` when counted.
        pilot_tokens: what all this is from.
        teacher_tokens_per_s: of the teacher alone.
    """

    options: tuple[Option, ...]
    recommended: str
    reason: str
    documents: int
    tokens: int
    exact_tokens: bool
    pilot_tokens: int
    teacher_tokens_per_s: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class _Candidate:
    """One signal during the pilot."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.encoder: Encoder = encoder(header)
        self.records: list[Record] = []
        self.seconds = 0.0
        self.squared_error: float | None = None
        self.bias: float | None = None

    def shard_bytes(self) -> tuple[int, int]:
        """Bytes of all records as chunks, and what an object needs beside them."""
        file = io.BytesIO()
        shard = container(self.header.container).writer(file, self.header)
        chunker = Chunker(self.header.chunk_positions)
        for record in self.records:
            for chunk in chunker.add(record):
                shard.add(chunk)
        for chunk in chunker.finish():
            shard.add(chunk)
        chunk_bytes = sum(row.bytes for row in shard.finish().chunks)
        return chunk_bytes, file.tell() - chunk_bytes


def advise(
    settings: CaptureSettings,
    signals: Sequence[str] = (),
    *,
    pilot_tokens: int = 4096,
    on_note: Callable[[str], None] = lambda text: None,
) -> Advice:
    """Run a pilot and compare signals. Writes nothing.

    Args:
        settings: of the capture; its `signal` is not used.
        signals: candidates; none: `DEFAULT_SIGNALS`, or `CLASSIFIER_SIGNALS` as far as the teacher
            has so many classes.
        pilot_tokens: tokens, or samples of a classifier, to run the teacher over.
        on_note: told in words what happens.

    Raises: as `precompute` before anything is captured.
    """
    classifies = settings.task == "classification"
    usual = CLASSIFIER_SIGNALS if classifies else DEFAULT_SIGNALS
    settings = replace(settings, signal=(signals or usual)[0])
    work = slice_of(settings, pilot_tokens, on_note=on_note)
    if not signals:
        signals = [
            s for s in usual if (getattr(parse_signal(s), "k", None) or 0) < work.teacher.vocab_size
        ]
    candidates = {signal: _Candidate(work.header_of(signal)) for signal in signals}
    noun = "samples" if classifies else "tokens"
    on_note(f"running the teacher over {sum(len(s) for s in work.samples)} {noun}")
    stride = 1 if classifies else _STRIDE
    teacher_s, tokens, measured = _run(work, candidates, settings.micro_batch, stride)
    options = tuple(
        _option(signal, c, work, teacher_s, tokens, measured) for signal, c in candidates.items()
    )
    best, reason = _recommend(options)
    if classifies and "dense" in candidates and work.teacher.vocab_size <= _DENSE_CLASSES:
        best = "dense"
        reason = "exact for every loss at any temperature, and classes are few"
    return Advice(
        options=options,
        recommended=best,
        reason=reason,
        documents=work.documents,
        tokens=work.tokens,
        exact_tokens=work.exact_tokens,
        pilot_tokens=tokens,
        teacher_tokens_per_s=tokens / teacher_s,
    )


def _run(
    work: Slice, candidates: dict[str, _Candidate], micro_batch: int, stride: int
) -> tuple[float, int, int]:
    """Teacher once, every candidate on the same blocks: (teacher seconds, tokens, rows
    measured)."""
    teacher: Any = work.teacher
    batches = list(micro_batches(work.samples, micro_batch))
    for _ in teacher.blocks(batches[0][:1]):
        pass  # the first pass through a model is slow for reasons that do not come back
    teacher_s, tokens, measured = 0.0, 0, 0
    for batch in batches:
        encoders = {
            signal: sample_encoder(c.encoder, c.header, batch) for signal, c in candidates.items()
        }
        kept_rows: list[Tensor] = []
        kept_at: list[int] = []
        start = 0
        blocks = iter(teacher.blocks(batch))
        while True:
            clock = time.perf_counter()
            block_RV = next(blocks, None)
            teacher_s += time.perf_counter() - clock
            if block_RV is None:
                break
            for signal, part in encoders.items():
                clock = time.perf_counter()
                part.add(block_RV)
                candidates[signal].seconds += time.perf_counter() - clock
            at = range(-start % stride, len(block_RV), stride)
            kept_rows.append(block_RV[list(at)].float().cpu())
            kept_at += [start + i for i in at]
            start += len(block_RV)
        logits_NV, rows_N = torch.cat(kept_rows), torch.tensor(kept_at)
        tokens += start
        measured += len(rows_N)
        for signal, part in encoders.items():
            record = part.record()
            candidates[signal].records.append(record)
            _measure(candidates[signal], record, logits_NV, rows_N)
    return teacher_s, tokens, measured


def _measure(candidate: _Candidate, record: Record, logits_NV: Tensor, rows_N: Tensor) -> None:
    p_NV = torch.softmax(logits_NV, -1)
    targets = from_records([record], candidate.header)
    weights_NV = _weights(targets, rows_N, p_NV)
    if weights_NV is None:
        return
    error = float((weights_NV - p_NV).square().sum())
    missing = 0.0
    if isinstance(targets, TopKTargets):
        missing = float((1 - weights_NV.sum(-1)).clamp_min(0).sum())
    candidate.squared_error = (candidate.squared_error or 0.0) + error
    candidate.bias = (candidate.bias or 0.0) + missing


def _weights(targets: Targets, rows_N: Tensor, p_NV: Tensor) -> Tensor | None:
    """float32 [N, V]: weights of the chosen positions; None for signals that are no
    distribution."""
    out_NV = torch.zeros_like(p_NV)
    if isinstance(targets, WeightedTargets):
        place = torch.full((targets.num_positions,), -1)
        place[rows_N] = torch.arange(len(rows_N))
        row = place[targets.position_of_entry()]
        chosen = row >= 0
        out_NV[row[chosen], targets.ids[chosen]] = targets.weights[chosen]
        if targets.always_ids is not None and targets.always_logprobs is not None:
            out_NV[:, targets.always_ids] = targets.always_logprobs[rows_N].exp()
        return out_NV
    if isinstance(targets, TopKTargets):
        probs = targets.logprobs[rows_N].exp()
        return out_NV.scatter_add_(-1, targets.ids[rows_N].clamp_min(0), probs)
    if isinstance(targets, DenseTargets):
        return targets.logprobs[rows_N].exp()
    return None


def _option(
    signal: str, candidate: _Candidate, work: Slice, teacher_s: float, tokens: int, measured: int
) -> Option:
    chunk_bytes, envelope_bytes = candidate.shard_bytes()
    # One envelope: with the usual two minutes of teacher time a shard, it hardly counts.
    total_bytes = round(chunk_bytes / tokens * work.tokens) + envelope_bytes
    kept = merge(statistics_of(r) for r in candidate.records).measures.get("kept_mass")
    seconds_per_token = (teacher_s + candidate.seconds) / tokens
    return Option(
        signal=signal,
        bytes_per_token=total_bytes / work.tokens,
        total_bytes=total_bytes,
        hours=seconds_per_token * work.tokens / 3600,
        kept_mass=None if kept is None else kept.mean,
        squared_error=_mean(candidate.squared_error, measured),
        bias=_mean(candidate.bias, measured),
    )


def _mean(total: float | None, count: int) -> float | None:
    return None if total is None else total / count


def _recommend(options: Sequence[Option]) -> tuple[str, str]:
    """The cheapest unbiased option that is no noisier than the published record, and why."""
    known = [
        (o, o.squared_error, o.bias) for o in options if o.squared_error and o.bias is not None
    ]
    unbiased = [(o, error) for o, error, bias in known if bias == 0]
    if not known:
        best = min(options, key=lambda o: o.bytes_per_token)
        return (
            best.signal,
            "the smallest of these, which are no distributions with an error",
        )
    if not unbiased:
        best, _, bias = min(known, key=lambda each: (each[2], each[0].bytes_per_token))
        return best.signal, f"the least bias of these ({bias:.3f} of the mass is missing)"
    reference = next(((o, error) for o, error in unbiased if o.signal == _REFERENCE), None)
    if reference is None:
        best, _ = min(unbiased, key=lambda each: each[1] * each[0].bytes_per_token)
        return best.signal, "unbiased, with the least error times bytes of these"
    usual, usual_error = reference
    good = [each for each in unbiased if each[1] <= usual_error]
    best, error = min(good, key=lambda each: each[0].bytes_per_token)
    if best is usual:
        return best.signal, "unbiased, and none of the others is as exact for fewer bytes"
    return best.signal, (
        f"unbiased, {error / usual_error:.2f} x the error of "
        f"{_REFERENCE} at {best.bytes_per_token / usual.bytes_per_token:.2f} x its bytes"
    )
