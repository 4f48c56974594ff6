"""Records to measure: of the synthetic workload, and of real models' logits.

A source is signal -> container -> (header, records), one record a chunk of about 2,048 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from real_rows import Window, token_bytes, windows
from workload import Workload

from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.signals import Completion, encoder
from logitstore.spec.header import AUX_FIELDS, Header, TeacherInfo
from logitstore.spec.signals import HEAD_STEP, Q8_MOST_STEPS, Q8_STEP, parse_signal

__all__ = [
    "EVERYTHING",
    "Source",
    "encoded",
    "make_header",
    "real_source",
    "record_of",
    "synthetic_source",
]

Source = dict[str, dict[str, tuple[Header, list[Record]]]]
CONTAINERS = ("zarr", "arrow")
CHUNK = 2048
EVERYTHING = "every optional field"


def make_header(signal: str, vocab_size: int, kind: str = "zarr", **options: Any) -> Header:
    return new_header(
        parse_signal(signal),
        vocab_size=vocab_size,
        configuration={"benchmark": "bytes"},
        teacher=TeacherInfo(name="benchmark"),
        container=kind,
        **options,
    )


def record_of(header: Header, lengths: Sequence[int], columns: dict[str, Any]) -> Record:
    keys = [f"{i:08}#0@0".encode() for i in range(len(lengths))]
    count = sum(lengths)
    everything = {
        "sample_lengths": np.array(lengths),
        "num_sample_key": np.array([len(key) for key in keys]),
        "sample_key": np.frombuffer(b"".join(keys), np.uint8),
        "segment_ids": np.zeros(count),
        **columns,
    }
    return Record(
        header.schema_,
        {c.name: np.asarray(everything[c.name]).astype(c.dtype) for c in header.schema_.columns},
    )


def _synthetic(workload: Workload, signal: str, kind: str) -> tuple[Header, list[Record]]:
    spec = parse_signal(signal)
    columns: dict[str, Any] = {"tokens": workload.tokens}
    columns["label_logprob"] = workload.label_logprobs()
    if spec.kind == "topk":
        logprobs = np.log(workload.probs)
        columns["log_tail"] = np.log(workload.tail)
        columns["top1_logprob"] = logprobs[:, 0]
        if spec.coding == "q8":
            logprobs = -Q8_STEP * np.clip(np.rint(logprobs / -Q8_STEP), 0, Q8_MOST_STEPS)
        columns["ids"], columns["logprobs"] = workload.ids, logprobs
        if spec.p is not None:
            keep = np.cumsum(workload.probs, axis=1) - workload.probs < spec.p
            dropped = np.where(keep, 0.0, workload.probs).sum(1)
            columns["log_tail"] = np.log(workload.tail + dropped)
            columns["num_ids"] = keep.sum(1)
            columns["ids"], columns["logprobs"] = workload.ids[keep], logprobs[keep]
    elif spec.kind == "sampled":
        drawn = workload.rskd(spec.rounds)
        columns |= {"num_ids": drawn.counts, "ids": drawn.ids, "counts": drawn.values}
    else:
        heads, tails, log_tail = workload.threshold(spec.tau_value)
        columns["tail_logprob"] = np.rint(log_tail / HEAD_STEP) * HEAD_STEP
        columns |= {"num_heads": heads.counts, "head_ids": heads.ids}
        columns["head_logprobs"] = np.rint(heads.values / HEAD_STEP) * HEAD_STEP
        columns |= {"num_tails": tails.counts, "tail_ids": tails.ids}
    aux = ["label_logprob"]
    if spec.kind == "topk":
        aux += ["log_tail", *(["top1_logprob"] if spec.coding == "q8" else [])]
    header = make_header(signal, workload.vocab_size, kind, aux=aux)
    whole = record_of(
        header, [workload.seq_len] * (len(workload.tokens) // workload.seq_len), columns
    )
    return header, [whole.sample(i) for i in range(whole.num_samples)]


def encoded(
    windows_of_model: Sequence[Window],
    signals: Sequence[str],
    vocab_size: int,
    *,
    first_key: int = 0,
    seed: int = 0,
    byte_end: Any = None,
    **options: Any,
) -> dict[str, Record]:
    """One chunk's record of every signal, from its windows' logits; keys count from first_key.

    `byte_end` is that column, and `options` are those of `make_header`.
    """
    records = {}
    lengths = [len(w.tokens) for w in windows_of_model]
    logits = torch.from_numpy(np.concatenate([w.logits for w in windows_of_model]))
    labels = torch.from_numpy(np.concatenate([w.labels for w in windows_of_model]))
    keys = first_key + torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    tokens = np.concatenate([w.tokens for w in windows_of_model])
    for signal in signals:
        header = make_header(signal, vocab_size, seed=seed, **options)
        encode = encoder(header)
        columns = encode.encode(logits, labels_P=labels, keys_P=keys, positions_P=positions)
        bare = {"sample_lengths": np.array(lengths), "segment_ids": np.zeros(len(tokens), int)}
        mask = labels.numpy() >= 0
        columns = encode.complete(columns, Completion(*bare.values(), mask))
        columns |= {} if byte_end is None else {"byte_end": byte_end}
        records[signal] = record_of(header, lengths, {"tokens": tokens, **columns})
    return records


def synthetic_source(workload: Workload, signals: Sequence[str]) -> Source:
    """Every signal of the workload in both containers."""
    return {s: {kind: _synthetic(workload, s, kind) for kind in CONTAINERS} for s in signals}


def _both_containers(signal: str, records: list[Record], vocab_size: int, **options: Any) -> Any:
    """container -> (header, records)."""
    return {
        kind: (make_header(signal, vocab_size, kind, **options), records) for kind in CONTAINERS
    }


def real_source(
    model: str, per_text: int, length: int, signals: Sequence[str], dense_positions: int
) -> Source:
    """Records of every signal, a chunk for every two windows; the logits are not kept.

    Of the first window come also `dense_positions` positions of dense records, and a top-K record
    with every optional field (`EVERYTHING`).
    """
    chunks: dict[str, list[Record]] = {signal: [] for signal in signals}
    extra: Source = {}
    pending: list[Window] = []
    vocab_size = 0
    for window in windows(model, per_text, length):
        vocab_size = window.logits.shape[1]
        if not extra:
            extra = _dense(window.first(dense_positions), vocab_size)
            extra[EVERYTHING] = _everything(model, window, vocab_size)
        pending.append(window)
        if sum(len(w.tokens) for w in pending) >= min(CHUNK, 2 * length):
            first_key = len(pending) * len(chunks[signals[0]])
            for signal, record in encoded(
                pending, signals, vocab_size, first_key=first_key
            ).items():
                chunks[signal].append(record)
            pending = []
    out = {signal: _both_containers(signal, c, vocab_size) for signal, c in chunks.items()}
    return {**out, **_pushed_scores(chunks["topk:64"], vocab_size), **extra}


def _dense(window: Window, vocab_size: int) -> Source:
    signals = ("dense", "dense:dtype=float32")
    # Chunks of 2,048 positions would be padding for the most part, and too large.
    positions = len(window.tokens)
    records = encoded([window], signals, vocab_size, chunk_positions=positions)
    return {
        s: _both_containers(s, [records[s]], vocab_size, chunk_positions=positions) for s in signals
    }


def _everything(model: str, window: Window, vocab_size: int) -> Any:
    """The smallest signal with every optional field beside it, and four always-ids."""
    options: dict[str, Any] = {
        "aux": [name for name in AUX_FIELDS if name != "top1_logprob"],
        "lse_at": [2.0, 4.0],
        "always_ids": range(4),
    }
    ends = np.cumsum(token_bytes(model)[window.tokens])
    records = encoded([window], ["topk:1"], vocab_size, byte_end=ends, **options)
    return _both_containers("topk:1", [records["topk:1"]], vocab_size, **options)


def _pushed_scores(topk: list[Record], vocab_size: int, candidates: int = 16) -> Source:
    """Scores of given candidates: here the raw logits of each position's 16 best ids, by id."""
    signal = f"scores:{candidates}"
    header = make_header(signal, vocab_size, aux=[])
    records = []
    for record in topk:
        ids = record["ids"][:, :candidates]
        order = np.argsort(ids, axis=1)
        scores = record["logprobs"][:, :candidates].astype(np.float32) + record["lse"][:, None]
        columns = {
            "tokens": record["tokens"],
            "label_logprob": record["label_logprob"],
            "ids": np.take_along_axis(ids, order, 1),
            "scores": np.take_along_axis(scores, order, 1),
        }
        records.append(record_of(header, record["sample_lengths"].tolist(), columns))
    by_kind = {k: (make_header(signal, vocab_size, k, aux=[]), records) for k in CONTAINERS}
    return {signal: by_kind}
