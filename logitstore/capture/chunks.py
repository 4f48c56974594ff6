"""From blocks of logits to chunks of whole samples. Shared by the batch job and the push writer.

Letters: S samples, P positions of all of them, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.corpora import Example, Sample
from logitstore.record import Record
from logitstore.record.random import key_of
from logitstore.record.views import VIEW_COLUMNS
from logitstore.signals import Completion, Encoder, MassCurve
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import Header
from logitstore.spec.schema import Schema
from logitstore.spec.statistics import Statistics

__all__ = ["Chunker", "SampleEncoder", "corpus_columns", "sample_record"]

Columns = dict[str, NDArray[Any]]


def corpus_columns(samples: Sequence[Sample | Example], schema: Schema) -> Columns:
    """The columns that come from the corpus: tokens, segments and, where stored, byte ends; or
    labels, where the corpus has them."""
    if schema.column("tokens") is None:
        return _example_columns([s for s in samples if isinstance(s, Example)], schema)
    windows = [s for s in samples if isinstance(s, Sample)]
    columns: Columns = {
        "tokens": np.concatenate([s.tokens for s in windows]),
        "segment_ids": np.concatenate([s.segment_ids for s in windows]),
    }
    if schema.column("byte_end") is not None:
        columns["byte_end"] = np.concatenate([s.byte_end for s in windows])
    return columns


def _example_columns(examples: Sequence[Example], schema: Schema) -> Columns:
    columns: Columns = {}
    if schema.column("label") is not None:
        columns["label"] = np.concatenate([e.labels for e in examples])
    if schema.column("view") is not None:
        views = [e.view.columns() for e in examples if e.view is not None]
        columns |= {name: np.concatenate([v[name] for v in views]) for name in VIEW_COLUMNS}
    thumbnails = schema.column("thumbnail")
    if thumbnails is not None:
        pictures = [e.picture for e in examples if e.picture is not None]
        columns["num_thumbnail"] = np.array([e.picture is not None for e in examples])
        columns["thumbnail"] = (
            np.stack(pictures) if pictures else np.empty((0, *thumbnails.inner), np.uint8)
        )
    return columns


class SampleEncoder:
    """Encodes the logits of some samples, block by block, and makes them a record.

    Args:
        encoder, header: of the store.
        keys: of the samples; they name samples in errors and drive the random function.
        lengths: positions of each sample.
        labels_P: int64 [P], -1 where there is none.
        columns: the other columns of the store, positions of all samples together.
    """

    def __init__(
        self,
        encoder: Encoder,
        header: Header,
        *,
        keys: Sequence[str],
        lengths: Sequence[int],
        labels_P: NDArray[np.int64],
        columns: Columns,
    ) -> None:
        self._encoder = encoder
        self._header = header
        self._keys = keys
        self._lengths = lengths
        self._labels_P = torch.from_numpy(labels_P)
        signed = np.array([key_of(key) for key in keys], np.uint64).view(np.int64)
        self._keys_P = torch.from_numpy(np.repeat(signed, lengths))
        self._positions_P = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
        self._names_P = [key for key, n in zip(keys, lengths, strict=True) for _ in range(n)]
        self._columns = columns
        self._parts: list[Columns] = []
        self._curve = MassCurve(header.vocab_size)
        self._done = 0

    def add(self, logits_RV: Tensor) -> None:
        """Encode the next rows.

        Raises: TeacherError teacher-nonfinite, teacher-shape.
        """
        rows = slice(self._done, self._done + len(logits_RV))
        self._done = rows.stop
        if self._done > len(self._names_P):
            raise self._wrong_number()
        self._parts.append(
            self._encoder.encode(
                logits_RV,
                labels_P=self._labels_P[rows],
                keys_P=self._keys_P[rows],
                positions_P=self._positions_P[rows],
                sample_names=self._names_P[rows],
                curve=self._curve,
            )
        )

    def record(self) -> Record:
        """All samples, once every row was added.

        Raises: TeacherError teacher-shape when rows are missing.
        """
        if self._done != len(self._names_P):
            raise self._wrong_number()
        columns = dict(self._columns)
        for name in self._parts[0]:
            columns[name] = np.concatenate([part[name] for part in self._parts])
        lengths = np.asarray(self._lengths)
        # The rows of `record.sequences.loss_mask`.
        sequence = self._header.sample_kind == "sequence"
        mask = self._labels_P.numpy() >= 0 if sequence else np.ones(len(self._names_P), np.bool_)
        if "loss_mask" in columns:
            mask = mask & columns["loss_mask"].astype(np.bool_)
        segments = columns.get("segment_ids", np.zeros(len(mask), np.uint16))
        columns = self._encoder.complete(columns, Completion(lengths, segments, mask))
        return sample_record(self._header, self._keys, self._lengths, columns)

    def statistics(self) -> Statistics:
        """What only whole distributions tell, for the commit of the shard that takes the record."""
        return Statistics(cumulative_mass=self._curve.total())

    def _wrong_number(self) -> TeacherError:
        return TeacherError(
            "teacher-shape",
            "the teacher gave another number of rows than there are tokens",
            where=f"sample {self._keys[0]}",
            got=self._done,
            expected=len(self._names_P),
        )


def sample_record(
    header: Header, keys: Sequence[str], lengths: Sequence[int], columns: Columns
) -> Record:
    """Samples as a record: `columns` with the names and lengths of samples, in stored types."""
    names = [key.encode() for key in keys]
    every = {
        **columns,
        "sample_lengths": np.asarray(lengths),
        "num_sample_key": np.array([len(name) for name in names]),
        "sample_key": np.frombuffer(b"".join(names), np.uint8),
    }
    schema = header.schema_
    return Record(
        schema, {c.name: every[c.name].astype(c.dtype, copy=False) for c in schema.columns}
    )


class Chunker:
    """Collects whole samples into chunks of at most `chunk_positions`, unless one is longer."""

    def __init__(self, chunk_positions: int) -> None:
        self._capacity = chunk_positions
        self._samples: list[Record] = []
        self._positions = 0

    def add(self, record: Record) -> Iterator[Record]:
        """Take samples; yields the chunks that they complete."""
        for index in range(record.num_samples):
            sample = record.sample(index)
            if self._positions and self._positions + sample.num_positions > self._capacity:
                yield from self.finish()
            self._samples.append(sample)
            self._positions += sample.num_positions

    def finish(self) -> Iterator[Record]:
        """Yields the last chunk, if there is one."""
        if self._samples:
            chunk = Record.concat(self._samples)
            self._samples, self._positions = [], 0
            yield chunk


def encode_samples(
    encoder: Encoder,
    header: Header,
    samples: Sequence[Sample | Example],
    blocks: Iterable[Tensor],
) -> Record:
    """Samples with their logits as a record.

    Raises: TeacherError teacher-nonfinite, teacher-shape.
    """
    work = sample_encoder(encoder, header, samples)
    for block in blocks:
        work.add(block)
    return work.record()


def sample_encoder(
    encoder: Encoder, header: Header, samples: Sequence[Sample | Example]
) -> SampleEncoder:
    """The encoder of samples of a corpus."""
    return SampleEncoder(
        encoder,
        header,
        keys=[s.key for s in samples],
        lengths=[len(s) for s in samples],
        labels_P=np.concatenate([s.labels for s in samples]),
        columns=corpus_columns(samples, header.schema_),
    )
