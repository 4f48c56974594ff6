"""A few thousand tokens of the real thing: is the teacher sane, how fast, how many bytes."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.capture.chunks import Chunker, encode_samples
from logitstore.capture.worker import is_out_of_memory, micro_batches, one_is_too_large
from logitstore.containers import container
from logitstore.containers.ranked import count_ids, uses_ranks
from logitstore.corpora import Document, Example, Sample, pack
from logitstore.record import Record
from logitstore.signals import encoder
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import Header
from logitstore.teachers import Classifier, Teacher

__all__ = ["Pilot", "check_bos", "run_pilot", "spread"]

# A capture is refused when the other BOS choice divides perplexity by more than this. Real traps
# are factors of 80 and 270; a sane model changes by less than 2.
_BOS_FACTOR = 10.0


@dataclass(frozen=True)
class Pilot:
    """What a pilot measured.

    Attributes:
        tokens: captured.
        seconds_per_token: of teacher and encoder together, after a warm-up.
        chunk_bytes: of all chunks; `column_bytes` by array.
        shard_bytes: what an object needs beside its chunks.
        nll: mean -log p of the realised tokens, nats; NaN where there are none.
        id_counts: int64 [V], how often each id was stored; empty where no ranks are made of them.
    """

    tokens: int
    seconds_per_token: float
    chunk_bytes: int
    column_bytes: Mapping[str, int]
    shard_bytes: int
    nll: float
    id_counts: NDArray[np.int64]

    @property
    def bytes_per_token(self) -> float:
        """Of chunks."""
        return self.chunk_bytes / self.tokens


def spread(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Evenly spaced samples of about so many tokens together: full windows where there are any."""
    longest = max(len(s) for s in samples)
    full = [s for s in samples if len(s) == longest]
    count = min(len(full), math.ceil(tokens / longest))
    return [full[i * len(full) // count] for i in range(count)]


def run_pilot(
    teacher: Teacher | Classifier,
    header: Header,
    samples: Sequence[Sample | Example],
    micro_batch: int,
) -> Pilot:
    """Capture samples into memory.

    Raises: TeacherError teacher-out-of-memory; what the teacher raises on the last sample when it
    fails on every one.
    """
    done, records, seconds = _encode_all(teacher, header, samples, micro_batch)
    tokens = sum(record.num_positions for record in records)
    file = io.BytesIO()
    shard = container(header.container).writer(file, header)
    chunker = Chunker(header.chunk_positions)
    for record in records:
        for chunk in chunker.add(record):
            shard.add(chunk)
    for chunk in chunker.finish():
        shard.add(chunk)
    finished = shard.finish()
    chunk_bytes = sum(row.bytes for row in finished.chunks)
    return Pilot(
        tokens=tokens,
        seconds_per_token=seconds / tokens,
        chunk_bytes=chunk_bytes,
        column_bytes=finished.column_bytes,
        shard_bytes=file.tell() - chunk_bytes,
        nll=_nll(done, records),
        id_counts=_id_counts(header, records),
    )


def _id_counts(header: Header, records: Sequence[Record]) -> NDArray[np.int64]:
    """How often each id stands in the records, for a store of ranks."""
    counts = np.zeros(header.vocab_size if uses_ranks(header) else 0, np.int64)
    for record in records if len(counts) else ():
        counts += count_ids(record, header.vocab_size)
    return counts


def _nll(samples: Sequence[Sample | Example], records: Sequence[Record]) -> float:
    """Mean -log p of the labels; NaN where none is known."""
    if "label_logprob" not in records[0]:
        return math.nan
    # A segment's first row is left out: only with BOS is it BOS.
    counts = np.concatenate(
        [(s.labels >= 0) & (isinstance(s, Example) or s.position_ids > 0) for s in samples]
    )
    logprobs = np.concatenate([record["label_logprob"] for record in records])[counts]
    return -float(logprobs.astype(np.float64).mean()) if len(logprobs) else math.nan


def _encode_all(
    teacher: Teacher | Classifier,
    header: Header,
    samples: Sequence[Sample | Example],
    micro_batch: int,
) -> tuple[list[Sample | Example], list[Record], float]:
    """Samples, their records, and the seconds that teacher and encoder took.

    A micro-batch that fails (the capture would halve it, or quarantine a sample of it) is run again
    sample by sample, and samples that fail alone are left out.
    """
    encode = encoder(header)

    def attempt(batch: Sequence[Any]) -> Record | Exception:
        try:
            return encode_samples(encode, header, batch, teacher.blocks(batch))
        except Exception as error:
            if len(batch) == 1 and is_out_of_memory(error):
                raise one_is_too_large(batch[0]) from error
            return error

    done: list[Sample | Example] = []
    records: list[Record] = []
    # The first pass through a model is slow for reasons that do not come back: not timed.
    found = attempt(samples[:1])
    start_s = time.perf_counter()
    batches = list(micro_batches(samples, micro_batch))
    for batch in batches:
        found = attempt(batch)
        if isinstance(found, Record):
            done += batch
            records.append(found)
        elif len(batch) > 1:
            batches.extend([sample] for sample in batch)
    if isinstance(found, Exception) and not records:
        raise found
    return done, records, time.perf_counter() - start_s


def check_bos(
    teacher: Teacher,
    header: Header,
    documents: Iterable[Document],
    micro_batch: int,
    tokens: int,
    chosen: Pilot,
) -> None:
    """Refuse a capture whose perplexity is far better with the other BOS choice.

    Args:
        documents: those the chosen pilot was run over.
        chosen: the pilot with the header's choice.

    Raises: TeacherError teacher-bos.
    """
    assert header.packing is not None
    assert header.tokenizer is not None
    other_bos = header.tokenizer.bos == "none"
    samples = list(
        pack(documents, teacher.tokenizer, seq_len=header.packing.seq_len, bos=other_bos)
    )
    other = run_pilot(teacher, header, spread(samples, tokens), micro_batch)
    if not chosen.nll - other.nll > math.log(_BOS_FACTOR):  # NaN: nothing to compare
        return
    have, better = ("with", "without") if not other_bos else ("without", "with")
    flag = "--bos document" if other_bos else "--bos none"
    raise TeacherError(
        "teacher-bos",
        f"the teacher is far worse {have} a BOS token before every document",
        where=header.teacher.name,
        got=f"perplexity {_perplexity(chosen.nll)} {have} BOS",
        expected=f"about {_perplexity(other.nll)}, as {better} BOS",
        hint=f"use {flag}; --no-bos-check captures as it is",
        data={"nll": chosen.nll, "nll_other": other.nll},
    )


def _perplexity(nll: float) -> str:
    return f"{math.exp(min(nll, 50.0)):.1f}"
