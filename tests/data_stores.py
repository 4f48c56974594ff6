"""Small stores with a known content, for the tests of the student's side.

The teacher is a fixed table: its logits for the next token depend on the present token alone, so
any sample's record can be computed again from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from logitstore.record import Record, aux_fields, build_schema
from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.header import Header, Packing, Software, TeacherInfo, TokenizerInfo
from logitstore.spec.signals import parse_signal
from logitstore.targets import TopKTargets

VOCAB_SIZE = 40


def make_header(
    signal: str = "topk:8",
    *,
    sample_kind: str = "sequence",
    container: str = "zarr",
    attention: str = "block-diagonal",
    aux: Sequence[str] | None = None,
    loss_mask: bool = False,
    vocab_size: int = VOCAB_SIZE,
    chunk_positions: int = 32,
    tokenizer: TokenizerInfo | None = None,
    uuid: str = "0" * 32,
) -> Header:
    spec = parse_signal(signal)
    configuration = {"signal": signal, "kind": sample_kind, "vocab_size": vocab_size}
    sequence = sample_kind == "sequence"
    return Header(
        store_uuid=uuid,
        created="2025-01-01T00:00:00Z",
        writer=Software(name="tests", version="0"),
        container=container,
        sample_kind=sample_kind,
        alignment="next-token" if sequence else "none",
        signal=spec,
        vocab_size=vocab_size,
        chunk_positions=chunk_positions,
        schema=build_schema(
            spec,
            vocab_size=vocab_size,
            sample_kind=sample_kind,
            aux=aux_fields(spec, vocab_size, aux, sample_kind=sample_kind),
            loss_mask=loss_mask,
        ),
        teacher=TeacherInfo(name="table"),
        tokenizer=tokenizer,
        packing=Packing(seq_len=16, attention=attention) if sequence else None,
        configuration=configuration,
        configuration_sha256=sha256_hex(canonical_json(configuration)),
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


def make_record(header: Header, samples: Sequence[Sample], *, shift: int = 0) -> Record:
    """One chunk. `shift` rolls the teacher's rows against the tokens: a misaligned store."""
    tokens = np.concatenate([s.tokens for s in samples])
    labels = (
        np.concatenate([s.labels() for s in samples])
        if header.sample_kind == "sequence"
        else np.array([s.label for s in samples])
    )
    logits = teacher_logits(header.vocab_size)[torch.from_numpy(tokens)]
    if shift:
        logits = logits.roll(shift, 0)
    k = header.signal.k
    targets = TopKTargets.from_logits(logits, k, labels=torch.from_numpy(labels))
    keys = [s.key.encode() for s in samples]
    columns: dict[str, Any] = {
        "sample_lengths": [len(s.tokens) for s in samples],
        "num_sample_key": [len(key) for key in keys],
        "sample_key": np.frombuffer(b"".join(keys), np.uint8),
        "tokens": tokens,
        "segment_ids": np.concatenate([s.segments for s in samples]),
        "label": labels,
        "loss_mask": (labels >= 0) & (tokens % 3 != 0),
        "label_logprob": torch.where(torch.from_numpy(labels) >= 0, targets.label_logprob, 0.0),
        "ids": targets.ids,
        "logprobs": targets.logprobs,
        **{
            name: getattr(targets, name)
            for name in ("label_rank", "entropy", "log_tail", "lse", "logit_mean")
        },
    }
    if "num_ids" in {c.name for c in header.schema_.columns}:
        keep = targets.logprobs.exp().cumsum(-1) - targets.logprobs.exp() < header.signal.p
        columns["num_ids"] = keep.sum(-1)
        columns["ids"], columns["logprobs"] = targets.ids[keep], targets.logprobs[keep]
        dropped = targets.logprobs.masked_fill(keep, -torch.inf).logsumexp(-1)
        columns["log_tail"] = torch.logaddexp(targets.log_tail, dropped)
    return Record(
        header.schema_,
        {c.name: np.asarray(columns[c.name]).astype(c.dtype) for c in header.schema_.columns},
    )
