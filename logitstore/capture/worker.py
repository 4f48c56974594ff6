"""The one function that every runner calls: teacher -> encoder -> shard, overlapped.

Two threads. The caller's runs the teacher and puts blocks of logits into a bounded queue; the other
encodes, compresses, writes and commits. The queue holds two blocks, so that the teacher waits only
if encoding is the slower part, and memory stays bounded.

What decides bytes is the plan alone: micro-batches are consecutive windows of equal length.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from logitstore.capture.chunks import Chunker, sample_encoder
from logitstore.capture.progress import Event
from logitstore.corpora import (
    ArrayExamples,
    Corpus,
    Example,
    Sample,
    TextExamples,
    pack,
)
from logitstore.record import Record
from logitstore.record.statistics import merge, statistics_of
from logitstore.signals import Encoder, encoder
from logitstore.spec.commit import Quarantined
from logitstore.spec.errors import CaptureError, CommitError, LogitstoreError, TeacherError
from logitstore.spec.plan import Plan, ShardPlan
from logitstore.spec.statistics import Statistics
from logitstore.store import ShardAttempt, StoreWriter
from logitstore.teachers import Classifier, Teacher

__all__ = [
    "MAX_TRIES",
    "Source",
    "Work",
    "capture_shards",
    "is_out_of_memory",
    "micro_batches",
    "one_is_too_large",
]

# A sample that fails so often is quarantined.
MAX_TRIES = 3

_QUEUED_BLOCKS = 2
_POLL_S = 0.2


# What shards are made from, and what a teacher is given.
Source = Corpus | ArrayExamples | TextExamples
AnySample = Sample | Example
S = TypeVar("S", Sample, Example, AnySample)


@dataclass(frozen=True)
class Work:
    """What a worker needs besides the shards.

    Attributes:
        writer, plan: of the store.
        corpus: the plan's files.
        teacher: loaded.
        micro_batch: full windows, or examples, of one forward pass.
    """

    writer: StoreWriter
    plan: Plan
    corpus: Source
    teacher: Teacher | Classifier
    micro_batch: int

    def samples(self, shard: ShardPlan) -> Iterator[AnySample]:
        """The windows or examples of a shard."""
        if isinstance(self.corpus, ArrayExamples | TextExamples):
            return (e for span in shard.spans for e in self.corpus.examples(span))
        header, teacher = self.writer.header, cast(Teacher, self.teacher)
        assert header.packing is not None
        assert header.tokenizer is not None
        documents = (d for span in shard.spans for d in self.corpus.span(span))
        return pack(
            documents,
            teacher.tokenizer,
            seq_len=header.packing.seq_len,
            bos=header.tokenizer.bos == "document",
            max_tokens=shard.max_tokens,
        )

    def blocks(self, samples: Sequence[Any]) -> Iterator[Tensor]:
        """The teacher's logits of samples."""
        return self.teacher.blocks(samples)


def micro_batches(samples: Iterable[S], size: int) -> Iterator[list[S]]:
    """At most `size` consecutive samples of equal length, so that nothing needs padding."""
    for _, equal in groupby(samples, key=len):
        batch: list[S] = []
        for sample in equal:
            batch.append(sample)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def capture_shards(
    work: Work, shards: Iterable[ShardPlan], report: Callable[[Event], None]
) -> None:
    """Capture and commit shards, one after the other.

    Args:
        shards: may be endless or fed by another process; asked for the next one before the last is
            committed.
        report: called from the writing thread.

    Raises: TeacherError; CorpusError; StorageError; CaptureError capture-failed when every sample
    of a shard failed.
    """
    back = _WritingThread(work, report)
    forward = _Forward(work, back)
    attempts: list[ShardAttempt] = []
    try:
        for shard in shards:
            try:
                attempt = work.writer.begin(shard.shard, work.plan)
            except CommitError as error:
                if error.kind != "already-committed":
                    raise
                report(Event(shard=shard.shard, skipped=True))
                continue
            # The shard before may still be being committed; none before that can.
            attempts = [*attempts[-1:], attempt]
            back.put(_Begin(attempt))
            for batch in micro_batches(work.samples(shard), work.micro_batch):
                forward.run(batch)
            back.put(_End(forward.notes))
        back.finish()
    except BaseException:
        if back.stop():
            for attempt in attempts:
                attempt.abandon()
        raise


# What goes through the queue.


@dataclass(frozen=True)
class _Begin:
    attempt: ShardAttempt


@dataclass(frozen=True)
class _Batch:
    """Blocks of these samples follow; a batch that is not ended is forgotten."""

    samples: Sequence[AnySample]


@dataclass(frozen=True)
class _EndBatch:
    error: Exception | None = None


@dataclass(frozen=True)
class _End:
    notes: tuple[str, ...]


_Item = _Begin | _Batch | Tensor | _EndBatch | _End | None


class _Forward:
    """Runs the teacher; halves micro-batches that do not fit into memory."""

    def __init__(self, work: Work, back: _WritingThread) -> None:
        self._work = work
        self._back = back
        self._size = work.micro_batch
        self._halved: dict[str, None] = {}

    def run(self, batch: Sequence[AnySample]) -> None:
        start = 0
        while start < len(batch):
            part = batch[start : start + self._size]
            if self._fits(part):
                start += len(part)
                continue
            if len(part) == 1:
                raise one_is_too_large(part[0])
            self._size = len(part) // 2
            self._halved[f"micro-batch halved to {self._size} samples: out of memory"] = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def notes(self) -> tuple[str, ...]:
        """For the shard's commit; a halved size stays, and so does its note."""
        return tuple(self._halved)

    def _fits(self, part: Sequence[AnySample]) -> bool:
        self._back.put(_Batch(part))
        try:
            for block in self._back.guarded(self._work.blocks(part)):
                self._back.put(block)
        except Exception as error:
            if is_out_of_memory(error):
                return False
            if isinstance(error, _Stopped) or getattr(error, "kind", "") == "teacher-shape":
                raise
            self._back.put(_EndBatch(error.with_traceback(None)))
            return True
        self._back.put(_EndBatch())
        return True


class _Stopped(Exception):
    """The writing thread ended early; its own error is raised instead."""


class _WritingThread:
    """Encodes and writes what arrives."""

    def __init__(self, work: Work, report: Callable[[Event], None]) -> None:
        self._queue: queue.Queue[_Item] = queue.Queue(maxsize=_QUEUED_BLOCKS)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._teacher_lock = threading.Lock()
        self._shards = _ShardWriter(work, report, self.guarded)
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="logitstore-writer", daemon=True)
        self._thread.start()

    def guarded(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """The teacher's blocks, one thread at a time: the writing thread tries samples again."""
        while True:
            with self._teacher_lock:
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def put(self, item: _Item) -> None:
        """Hand over; waits while the queue is full.

        Raises: what made the thread fail.
        """
        while self._error is None and not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return
        raise self._error or _Stopped

    def finish(self) -> None:
        """Wait until everything is committed.

        Raises: what made the thread fail.
        """
        self.put(None)
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
        if self._error is not None:
            raise self._error

    def stop(self) -> bool:
        """Give up the shard in work; whether the thread ended within half a second."""
        self._stopping.set()
        self._thread.join(0.5)
        return not self._thread.is_alive()

    def _run(self) -> None:
        # A new thread begins with as many threads of its own as the machine has cores.
        torch.set_num_threads(self._threads)
        try:
            while not self._stopping.is_set():
                try:
                    item = self._queue.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                self._shards.take(item)
        except BaseException as error:
            self._error = error


class _ShardWriter:
    """The state of the shard in work."""

    def __init__(
        self,
        work: Work,
        report: Callable[[Event], None],
        guarded: Callable[[Iterator[Tensor]], Iterator[Tensor]],
    ) -> None:
        self._work = work
        self._report = report
        self._guarded = guarded
        self._header = work.writer.header
        self._encoder: Encoder = encoder(self._header)

    def take(self, item: _Item) -> None:
        if isinstance(item, _Begin):
            self._begin(item.attempt)
        elif isinstance(item, _Batch):
            self._samples = item.samples
            self._pending = sample_encoder(self._encoder, self._header, item.samples)
            self._failure: Exception | None = None
        elif isinstance(item, Tensor):
            if self._failure is None:
                try:
                    self._pending.add(item)
                except TeacherError as error:
                    self._failure = error
        elif isinstance(item, _EndBatch):
            self._end_batch(item.error or self._failure)
        elif isinstance(item, _End):
            self._end(item.notes)

    def _begin(self, attempt: ShardAttempt) -> None:
        self._attempt = attempt
        self._shard = attempt.shard
        self._chunker = Chunker(self._header.chunk_positions)
        self._statistics: list[Statistics] = []
        self._quarantined: list[Quarantined] = []
        self._errors: list[Exception] = []
        self._captured = 0

    def _end_batch(self, failure: Exception | None) -> None:
        if failure is None:
            self._write(self._pending.record(), self._pending.statistics())
        else:
            _raise_if_fatal(failure)
            for sample in self._samples:
                captured = self._again(sample)
                if captured is not None:
                    self._write(*captured)

    def _again(self, sample: AnySample) -> tuple[Record, Statistics] | None:
        """A sample of a failed micro-batch by itself; None when it is quarantined."""
        for _ in range(MAX_TRIES - 1):
            self._report(Event(shard=self._shard, retries=1))
            work = sample_encoder(self._encoder, self._header, [sample])
            try:
                for block in self._guarded(self._work.blocks([sample])):
                    work.add(block)
                return work.record(), work.statistics()
            except Exception as error:
                _raise_if_fatal(error)
                failure = error
        self._errors.append(failure)
        reason = failure.what if isinstance(failure, LogitstoreError) else repr(failure)
        self._quarantined.append(Quarantined(sample_key=sample.key, reason=reason[:500]))
        return None

    def _write(self, record: Record, beside: Statistics) -> None:
        self._captured += record.num_samples
        self._statistics.append(beside)
        self._add(self._chunker.add(record))
        self._report(Event(shard=self._shard, tokens=record.num_positions))

    def _add(self, chunks: Iterator[Record]) -> None:
        for chunk in chunks:
            self._statistics.append(statistics_of(chunk))
            self._attempt.add(chunk)

    def _end(self, notes: tuple[str, ...]) -> None:
        self._add(self._chunker.finish())
        if self._errors and not self._captured:
            raise _all_failed(self._shard, self._errors[0])
        try:
            commit = self._attempt.commit(
                statistics=merge(self._statistics),
                quarantined=self._quarantined,
                notes=notes,
            )
        except CommitError as error:
            if error.kind != "already-committed":
                raise
            self._report(Event(shard=self._shard, skipped=True))
            return
        self._report(
            Event(
                shard=self._shard,
                stored_bytes=commit.object.bytes,
                quarantined=tuple(self._quarantined),
                notes=notes,
            )
        )


def _raise_if_fatal(error: Exception) -> None:
    if is_out_of_memory(error) or getattr(error, "kind", "") == "teacher-shape":
        raise error


def is_out_of_memory(error: Exception) -> bool:
    """Whether fewer samples at once may help."""
    # On a CPU it is a RuntimeError that only its text tells apart.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def one_is_too_large(sample: AnySample) -> TeacherError:
    """The error when halving has come to an end."""
    return TeacherError(
        "teacher-out-of-memory",
        "one sample alone does not fit into memory",
        where=sample.key,
        got=f"{len(sample)} tokens",
        hint="use a shorter --seq-len, fewer workers, or a larger machine",
    )


def _all_failed(shard: str, error: Exception) -> LogitstoreError:
    if isinstance(error, LogitstoreError):
        return error
    return CaptureError(
        "capture-failed",
        f"the teacher failed on every sample of the shard: {error!r}",
        where=f"shard {shard}",
        hint="try the teacher on one text outside of logitstore",
    )
