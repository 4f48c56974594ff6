"""Small stores with a known content, for the tests of the student's side.

The teacher is a fixed table: its logits for the next token depend on the present token alone, so
any sample's record can be computed again from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import logitstore.store
from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.record.random import key_of
from logitstore.record.statistics import merge, statistics_of
from logitstore.signals import encoder
from logitstore.spec.header import Header, Packing, TeacherInfo
from logitstore.spec.plan import Plan, shard_name
from logitstore.spec.signals import parse_signal
from logitstore.store import Store

VOCAB_SIZE = 40


def make_header(
    signal: str = "topk:8",
    *,
    sample_kind: str = "sequence",
    attention: str = "block-diagonal",
    vocab_size: int = VOCAB_SIZE,
    **fields: Any,
) -> Header:
    sequence = sample_kind == "sequence"
    return new_header(
        parse_signal(signal),
        sample_kind=sample_kind,
        vocab_size=vocab_size,
        configuration={"signal": signal, "kind": sample_kind, "vocab_size": vocab_size},
        teacher=TeacherInfo(name="table"),
        packing=Packing(seq_len=16, attention=attention) if sequence else None,
        **{"chunk_positions": 64, **fields},
    )


def teacher_logits(vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """float32 [V, V]: logits of the next token by present token."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(vocab_size, vocab_size, generator=generator) * 2


class Sample:
    """Tokens and segments of one sample; for classification a `label` whose row is `tokens[0]`."""

    def __init__(
        self, key: str, tokens: Sequence[int], segments: Sequence[int] | None = None, label: int = 0
    ) -> None:
        self.key, self.tokens, self.label = key, list(tokens), label
        self.segments = [0] * len(self.tokens) if segments is None else list(segments)

    def labels(self) -> list[int]:
        """Next token inside the segment, -1 where there is none."""
        pairs = zip([*self.tokens[1:], 0], [*self.segments[1:], -1], self.segments, strict=True)
        return [token if after == here else -1 for token, after, here in pairs]


def random_samples(
    number: int, *, seed: int = 0, length: int | None = None, vocab_size: int = VOCAB_SIZE
) -> list[Sample]:
    """Samples of 3 to 16 tokens (or all of `length`) in one to three segments."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        size = length or int(rng.integers(3, 17))
        segments = np.sort(rng.integers(0, 3, size))
        _, segments = np.unique(segments, return_inverse=True)
        samples.append(
            Sample(
                f"text{seed}#{i}@0", rng.integers(0, vocab_size, size).tolist(), segments.tolist()
            )
        )
    return samples


def likely_samples(number: int) -> list[Sample]:
    """Samples of 16 tokens that the teacher itself would write."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB_SIZE, (number, 1), generator=generator)
    for _ in range(15):
        probs = teacher_logits()[tokens[:, -1]].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], 1)
    return [Sample(f"likely#{i}@0", row) for i, row in enumerate(tokens.tolist())]


def make_record(header: Header, samples: Sequence[Sample], *, shift: int = 0) -> Record:
    """One chunk. `shift` rolls the logits against the tokens before anything else is done."""
    tokens = np.concatenate([s.tokens for s in samples])
    labels = (
        np.concatenate([s.labels() for s in samples])
        if header.sample_kind == "sequence"
        else np.array([s.label for s in samples])
    )
    logits = teacher_logits(header.vocab_size)[torch.from_numpy(tokens)]
    if shift:
        logits = logits.roll(shift, 0)
    lengths = [len(s.tokens) for s in samples]
    keys = [s.key.encode() for s in samples]
    columns: dict[str, Any] = {
        "sample_lengths": lengths,
        "num_sample_key": [len(key) for key in keys],
        "sample_key": np.frombuffer(b"".join(keys), np.uint8),
        "tokens": tokens,
        "segment_ids": np.concatenate([s.segments for s in samples]),
        "label": labels,
        "loss_mask": (labels >= 0) & (tokens % 3 != 0),
        **encoder(header).encode(
            logits,
            labels_P=torch.from_numpy(labels),
            keys_P=torch.from_numpy(
                np.repeat(np.array([key_of(s.key) for s in samples], np.uint64), lengths).view(
                    np.int64
                )
            ),
            positions_P=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        ),
    }
    return Record(
        header.schema_,
        {c.name: np.asarray(columns[c.name]).astype(c.dtype) for c in header.schema_.columns},
    )


def chunks_of(samples: Sequence[Sample], chunk_positions: int) -> list[list[Sample]]:
    """Consecutive samples, each chunk as full as it gets."""
    chunks: list[list[Sample]] = [[]]
    for sample in samples:
        size = sum(len(s.tokens) for s in chunks[-1]) + len(sample.tokens)
        if chunks[-1] and size > chunk_positions:
            chunks.append([])
        chunks[-1].append(sample)
    return chunks


def add_shard(
    location: Path, samples: Sequence[Sample], *, plan: Plan | None = None, shift: int = 0
) -> Plan:
    """One more shard of a store, under a plan of its own or the next of `plan`."""
    with logitstore.store.append(location) as writer:
        plan = plan or writer.add_push_plan()
        numbers = [
            int(s.partition("-")[2]) for s in writer.committed() if s[:4] == f"{plan.number:04d}"
        ]
        shard = shard_name(plan.number, max(numbers, default=-1) + 1)
        with writer.begin(shard, plan) as attempt:
            records = [
                make_record(writer.header, chunk, shift=shift)
                for chunk in chunks_of(samples, writer.header.chunk_positions)
            ]
            for record in records:
                attempt.add(record)
            attempt.commit(statistics=merge(statistics_of(record) for record in records))
    return plan


def make_store(
    location: Path,
    samples: Sequence[Sample],
    *,
    header: Header | None = None,
    shards: int = 3,
    tables: dict[str, bytes] | None = None,
    shift: int = 0,
) -> Store:
    """A store with the samples in `shards` shards of nearly equal size."""
    logitstore.store.create(location, header or make_header(), tables).close()
    plan = None
    bounds = [round(i * len(samples) / shards) for i in range(shards + 1)]
    for start, stop in pairwise(bounds):
        plan = add_shard(location, samples[start:stop], plan=plan, shift=shift)
    return logitstore.store.open(location)
