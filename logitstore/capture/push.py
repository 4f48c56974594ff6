"""The push writer: for a loop of one's own.

with logitstore.writer("STORE", signal="topk:64", vocab_size=V) as w:
    for tokens in corpus:
        w.add(tokens, teacher(tokens))

or, for candidates that a teacher scored, `w.add_scores(ids, scores)`.

Every session is a plan of its own; shards are committed when they are large enough and at the end.

Letters: T positions of a sample, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from logitstore.capture.chunks import Chunker, Columns, SampleEncoder
from logitstore.capture.push_inputs import (
    ascending,
    booleans,
    check_key,
    check_length,
    integers,
    logits_of,
)
from logitstore.capture.scores import scores_record
from logitstore.containers.ranked import IdRanks
from logitstore.corpora import labels_of
from logitstore.corpora.tokenizer import table_of
from logitstore.record import Record
from logitstore.record.new_header import always_ids_of, new_header, temperatures_of
from logitstore.record.statistics import merge, statistics_of
from logitstore.signals import encoder
from logitstore.spec.errors import CaptureError, TargetsError, TeacherError, UsageError
from logitstore.spec.header import TeacherInfo, TokenizerInfo
from logitstore.spec.id_ranks import RANKS_TABLE
from logitstore.spec.plan import shard_name
from logitstore.spec.signals import parse_signal
from logitstore.spec.statistics import Statistics
from logitstore.spec.tokenizer_table import TOKENIZER_TABLE, TokenizerTable
from logitstore.store import ShardAttempt, create

__all__ = ["PushWriter", "writer"]

_SHARD_POSITIONS = 1 << 17
_SHARD_BYTES = 256 << 20


def writer(
    location: str | os.PathLike[str],
    *,
    signal: Any,
    vocab_size: int,
    aux: Iterable[str] | None = None,
    sample_kind: Literal["sequence", "classification"] = "sequence",
    container: Literal["zarr", "arrow"] = "zarr",
    tokenizer: Any = None,
    bos: Literal["document", "none"] = "none",
    bos_id: int | None = None,
    teacher: str = "push",
    lse_at: Iterable[float] = (),
    always_ids: Iterable[int] = (),
    labelled: bool = True,
    loss_mask: bool = False,
    seed: int = 0,
    chunk_positions: int = 2048,
    shard_positions: int = _SHARD_POSITIONS,
    id_frequencies: Any = None,
    configuration: Mapping[str, Any] | None = None,
) -> PushWriter:
    """Open a store for pushing; it is created, or continued when its configuration is the same.

    Args:
        location: folder or URL.
        signal: such as "topk:64", or a spec.
        vocab_size: V, real ids only.
        aux: fields to keep beside the signal; None: its defaults.
        sample_kind: "sequence": rows t over token t + 1; "classification": one row a sample.
        tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer` or a `TokenizerTable`; lets
            readers show text, and refuse students with another tokenizer.
        bos, bos_id: what the tokens begin with, for the record.
        teacher: a name, for the record.
        labelled: classification samples come with a label.
        loss_mask: samples come with a mask.
        shard_positions: a shard is committed when it holds so many positions (or 256 MB).
        id_frequencies: numbers [V], how often each id will be stored, in any unit (counts of the
            corpus' tokens will do): keeps frequency ranks for ids, which is 2 to 7 % smaller.
        configuration: whatever else decides the logits; a store is continued only if it is equal.

    Raises: UsageError; CommitError configuration-changed, store-sealed; StorageError.
    """
    spec = signal if hasattr(signal, "kind") else parse_signal(signal)
    if isinstance(aux, str):
        aux = (aux,)
    if spec.kind == "scores" and sample_kind == "sequence":
        raise UsageError(
            "bad-argument",
            "scores of given candidates belong to an anchor, not to the tokens of a sequence",
            where="writer",
            got=f"signal {spec} with sample_kind='sequence'",
            expected="sample_kind='classification': a sample is an anchor",
        )
    if sample_kind == "sequence" and not labelled:
        raise UsageError(
            "bad-argument",
            "labels of a sequence are its own next tokens",
            where="writer",
            got="labelled=False",
            expected="labelled=False with sample_kind='classification' only",
        )
    table = _table_of(tokenizer)
    info = None
    if table is not None:
        info = TokenizerInfo(
            name=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"),
            fingerprint=table.fingerprint,
            size=len(table),
            bos=bos,
            bos_id=bos_id,
            table=TOKENIZER_TABLE,
            special_ids=tuple(sorted(table.special)),
        )
    temperatures, always = temperatures_of(lse_at), always_ids_of(always_ids, vocab_size)
    ranks = None if id_frequencies is None else _ranks_of(id_frequencies, vocab_size)
    header = new_header(
        spec,
        vocab_size=vocab_size,
        configuration={
            "signal": str(spec),
            "vocab_size": vocab_size,
            "aux": None if aux is None else sorted(aux),
            "sample_kind": sample_kind,
            **({} if labelled else {"labelled": False}),
            "container": container,
            "tokenizer": None if table is None else table.fingerprint,
            "lse_at": list(temperatures),
            "always_ids": list(always),
            "loss_mask": loss_mask,
            "seed": seed,
            "chunk_positions": chunk_positions,
            **({} if ranks is None else {"rank_ids": True}),
            "given": dict(configuration or {}),
        },
        teacher=TeacherInfo(name=teacher),
        container=container,
        sample_kind=sample_kind,
        aux=aux,
        lse_at=temperatures,
        always_ids=always,
        labelled=labelled,
        loss_mask=loss_mask,
        chunk_positions=chunk_positions,
        seed=seed,
        tokenizer=info,
        rank_ids=ranks is not None,
    )
    tables = {} if table is None else {TOKENIZER_TABLE: table.encode()}
    if ranks is not None:
        tables[RANKS_TABLE] = ranks.encode()
    return PushWriter(create(location, header, tables), shard_positions)


def _ranks_of(frequencies: Any, vocab_size: int) -> IdRanks:
    counts = np.asarray(frequencies)
    numbers = np.issubdtype(counts.dtype, np.number) and bool(np.isfinite(counts).all())
    if counts.shape != (vocab_size,) or not numbers:
        raise UsageError(
            "bad-argument",
            "frequencies are one number for each id",
            where="id_frequencies",
            got=f"{counts.dtype} {list(counts.shape)}",
            expected=f"finite numbers [{vocab_size}]",
        )
    return IdRanks.by_frequency(counts)


class PushWriter:
    """Adds samples to a store. Made by `writer`; not thread-safe.

    Leaving the `with` block commits what was added; an exception inside it keeps what was committed
    before and drops the rest. So does storage that fails: the writer is closed then.

    Attributes:
        header: of the store.
        num_samples, num_positions: committed by this session.
    """

    def __init__(self, store: Any, shard_positions: int) -> None:
        self._store = store
        self.header = store.header
        self._plan = store.add_push_plan()
        scores = self.header.signal.kind == "scores"
        self._encoder = None if scores else encoder(self.header)
        self._chunker = Chunker(self.header.chunk_positions)
        self._shard_positions = shard_positions
        self._attempt: ShardAttempt | None = None
        self._statistics: list[Statistics] = []
        self._held = [0, 0, 0]  # samples, positions, bytes of the shard in work
        self._shards = 0
        self._added = 0
        self._open = True
        self.num_samples = 0
        self.num_positions = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._drop()

    def add(
        self,
        tokens: Any,
        logits: Any,
        *,
        segment_ids: Any = None,
        loss_mask: Any = None,
        byte_end: Any = None,
        sample_key: str | None = None,
    ) -> None:
        """Add one sample. A sample that is refused leaves the writer as it was.

        Args:
            tokens: integers [T]; for classification the label, one integer, or None in a store
                without labels.
            logits: raw logits [T, V] ([V] for classification), torch (any device) or numpy; row t
                is over token t + 1 of the same segment.
            segment_ids: integers [T] in ascending order, documents packed into one sample; None:
                one document.
            loss_mask: booleans [T], rows that count; for a writer with loss_mask=True.
            byte_end: integers [T], for a writer with the aux field byte_end.
            sample_key: stable name, unique in the store; None: session and number.

        Raises: TargetsError wrong-length, token-out-of-range; TeacherError teacher-nonfinite,
        teacher-shape; UsageError bad-argument; CaptureError writer-closed; StorageError.
        """
        key = self._next_key(sample_key)
        if self._encoder is None:
            raise self._wrong_method("add", "add_scores(ids, scores)")
        logits_TV = logits_of(logits, key)
        columns, labels_T = self._columns(key, tokens, logits_TV, segment_ids)
        for name, values in (("loss_mask", loss_mask), ("byte_end", byte_end)):
            self._optional(columns, name, values, key, len(labels_T))
        work = SampleEncoder(
            self._encoder,
            self.header,
            keys=[key],
            lengths=[len(labels_T)],
            labels_P=labels_T,
            columns=columns,
        )
        work.add(logits_TV.reshape(len(labels_T), -1))
        self._take(work.record(), work.statistics())

    def add_scores(
        self, ids: Any, scores: Any, *, label: int | None = None, sample_key: str | None = None
    ) -> None:
        """Add one anchor with the candidates that the teacher scored, for a `scores` store.

        A sample that is refused leaves the writer as it was.

        Args:
            ids: integers [C], candidates (context nodes, answers); C at most the signal's number
                of slots. Slots left over are empty: no loss looks at them.
            scores: finite raw scores [C], torch or numpy.
            label: the right candidate's id, in a store with labels; else None.
            sample_key: stable name of the anchor, unique in the store; None: session and number.

        Raises: TargetsError wrong-length, token-out-of-range; TeacherError teacher-nonfinite;
        UsageError bad-argument; CaptureError writer-closed; StorageError.
        """
        key = self._next_key(sample_key)
        if self._encoder is not None:
            raise self._wrong_method("add_scores", "add(tokens, logits)")
        self._check_labelled(key, label)
        self._take(scores_record(self.header, key, ids, scores, label), Statistics())

    def _next_key(self, sample_key: str | None) -> str:
        if not self._open:
            raise CaptureError(
                "writer-closed",
                "the writer was closed and takes no more samples",
                where=self._store.location,
                hint="open another one; it continues the same store",
            )
        if sample_key is None:
            return f"push/{self._plan.number}/{self._added}"
        check_key(sample_key)
        return sample_key

    def _wrong_method(self, used: str, right: str) -> UsageError:
        return UsageError(
            "bad-argument",
            f"{used} does not fit the store's signal",
            where=self._store.location,
            got=f"signal {self.header.signal}",
            expected=right,
        )

    def _check_labelled(self, key: str, label: Any) -> None:
        labelled = self.header.schema_.column("label") is not None
        if labelled != (label is not None):
            raise UsageError(
                "bad-argument",
                f"this store keeps {'a label for every sample' if labelled else 'no labels'}",
                where=f"sample {key}",
                got="no label" if labelled else f"label {label!r}",
                hint="decide it for all samples, in writer(...): labelled",
            )

    def _take(self, record: Record, beside: Statistics) -> None:
        self._added += 1
        self._statistics.append(beside)
        for chunk in self._chunker.add(record):
            self._write(chunk)
        self._held[0] += 1
        self._held[1] += record.num_positions
        self._held[2] += record.nbytes
        if self._held[1] >= self._shard_positions or self._held[2] >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Commit what was added so far as a shard of its own.

        Raises: StorageError; CommitError store-sealed.
        """
        for chunk in self._chunker.finish():
            self._write(chunk)
        if self._attempt is None:
            return
        with self._dropped_on_failure():
            commit = self._attempt.commit(statistics=merge(self._statistics))
        self._shards += 1
        self.num_samples += commit.samples
        self.num_positions += commit.positions
        self._attempt, self._statistics, self._held = None, [], [0, 0, 0]

    def close(self) -> None:
        """Commit what is left and end; harmless when closed."""
        if self._open:
            self.flush()
            self._drop()

    def _drop(self) -> None:
        self._open = False
        if self._attempt is not None:
            self._attempt.abandon()
        self._store.close()

    @contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        """A shard that a write failed in cannot go on: half a chunk may stand there."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _write(self, chunk: Record) -> None:
        with self._dropped_on_failure():
            if self._attempt is None:
                shard = shard_name(self._plan.number, self._shards)
                self._attempt = self._store.begin(shard, self._plan)
            self._attempt.add(chunk)
        self._statistics.append(statistics_of(chunk))

    def _columns(
        self, key: str, tokens: Any, logits: torch.Tensor, segment_ids: Any
    ) -> tuple[Columns, Any]:
        """Columns that are not encoded, and labels [T]."""
        sequence = self.header.sample_kind == "sequence"
        if not sequence:
            self._check_labelled(key, tokens)
        labelled = tokens is not None
        tokens = tokens if labelled else 0
        ids = np.atleast_1d(integers(tokens, "tokens", key))
        rows = logits.shape[0] if sequence and logits.ndim == 2 else 1
        if ids.ndim != 1 or len(ids) != rows or not len(ids) or logits.ndim != 1 + sequence:
            raise TargetsError(
                "wrong-length",
                "tokens and logits do not belong together" if sequence else "not one row of logits",
                where=f"sample {key}",
                got=f"tokens {tuple(ids.shape)}, logits {tuple(logits.shape)}",
                expected="tokens [T] and logits [T, V]" if sequence else "a label and logits [V]",
            )
        vocab_size = self.header.vocab_size
        if logits.shape[-1] != vocab_size:
            raise TeacherError(
                "teacher-shape",
                "logits do not have the store's vocabulary",
                where=f"sample {key}",
                got=f"{logits.shape[-1]} columns",
                expected=vocab_size,
                hint="cut off the padded rows of the output layer: logits[:, :vocab_size]",
            )
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            raise TargetsError(
                "token-out-of-range",
                "no such id in the vocabulary",
                where=f"sample {key}, position {outside[0]}",
                got=int(ids[outside[0]]),
                expected=f"0 to {vocab_size - 1}",
            )
        if not sequence:
            return ({"label": ids}, ids) if labelled else ({}, np.array([-1]))
        segments = np.zeros(len(ids), np.int64)
        if segment_ids is not None:
            segments = integers(segment_ids, "segment_ids", key)
            check_length("segment_ids", segments, key, len(ids))
            if (np.diff(segments) < 0).any() or segments.min() < 0 or segments.max() > 65_535:
                raise UsageError(
                    "bad-argument",
                    "segment_ids must ascend, from 0 to 65535",
                    where=f"sample {key}",
                )
        return {"tokens": ids, "segment_ids": segments}, labels_of(ids, segments)

    def _optional(self, columns: Columns, name: str, values: Any, key: str, length: int) -> None:
        stored = self.header.schema_.column(name) is not None
        if stored != (values is not None):
            raise UsageError(
                "bad-argument",
                f"this store keeps {'a' if stored else 'no'} {name}",
                where=f"sample {key}",
                got="none" if stored else name,
                hint=f"decide it for all samples, in writer(...): {name}",
            )
        if values is not None:
            array = booleans(values, key) if name == "loss_mask" else ascending(values, name, key)
            check_length(name, array, key, length)
            columns[name] = array


def _table_of(tokenizer: Any) -> TokenizerTable | None:
    if tokenizer is None or isinstance(tokenizer, TokenizerTable):
        return tokenizer
    return table_of(getattr(tokenizer, "backend_tokenizer", tokenizer))
