"""Checking a store: every document, every size; with `full` also every byte and every value."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from logitstore.containers import container
from logitstore.containers.protocol import crc32c
from logitstore.containers.ranked import ranked
from logitstore.record.statistics import merge
from logitstore.record.views import check_views
from logitstore.spec.commit import Commit
from logitstore.spec.errors import IntegrityError, LogitstoreError
from logitstore.spec.header import Header
from logitstore.spec.index import Index
from logitstore.spec.plan import Plan
from logitstore.store.backend import Backend, ReadBackend
from logitstore.store.connect import connect
from logitstore.store.documents import (
    HEADER_KEY,
    INDEX_KEY,
    commit_key,
    index_row,
    list_commits,
    list_plans,
    load_commit,
    load_header,
    load_index,
    load_plan,
    load_table,
    object_key,
    plan_key,
    table_key,
)
from logitstore.store.location import Location
from logitstore.store.reader import sum_column_bytes, unsealed_on_http

__all__ = ["VerifyReport", "check_chunk", "object_blocks", "verify"]

# Read at once: chunks side by side, so that remote stores are not asked for each.
_READ_BYTES = 16 << 20
_THREADS = min(4, os.cpu_count() or 1)


@dataclass
class VerifyReport:
    """What verification looked at and found.

    Attributes:
        problems: one JSON-able dict per problem: `document` or `shard` concerned, and the error's
        kind,
            what, where, got, expected and hint.
        documents, objects, chunks: how many were checked; chunks only with `full`.
        bytes: of objects that were read, or of which the size was compared.
        uncommitted: planned shards without a commit; work to do, not damage.
        seconds: wall time.
    """

    location: str
    full: bool
    sealed: bool = False
    problems: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    objects: int = 0
    chunks: int = 0
    bytes: int = 0
    uncommitted: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"ok": self.ok, **self.__dict__}


def verify(
    location: str | os.PathLike[str] | Location,
    *,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a store and list every problem.

    Quick: every document against its digest and against those that refer to it, tables, and the
    size of every object. Full: also the SHA-256 of every object, the checksum of every chunk, the
    values it decodes to, and what the object tells stock readers about itself.

    Args:
        progress: called with (bytes of objects done, bytes in total).

    Raises: NotFoundError not-a-store; StorageError. Damage is reported, not raised.
    """
    return _Verifier(connect(location), full, progress).run()


class _Verifier:
    def __init__(
        self, backend: Backend, full: bool, progress: Callable[[int, int], None] | None
    ) -> None:
        self.backend = backend
        self.report = VerifyReport(str(backend.location), full)
        self.progress = progress or (lambda done, total: None)
        self.listable = backend.location.kind != "http"

    def run(self) -> VerifyReport:
        started = time.perf_counter()
        report = self.report
        with self.checking(document=HEADER_KEY):
            header, header_sha256 = load_header(self.backend)
            self.check_documents(header, header_sha256)
        report.seconds = time.perf_counter() - started
        return report

    def check_documents(self, header: Header, header_sha256: str) -> None:
        index = None
        with self.checking(document=INDEX_KEY, counts=False):
            index = load_index(self.backend, header, header_sha256)
            if index is None and not self.listable:
                raise unsealed_on_http(self.backend)
            self.report.sealed = index is not None
            self.report.documents += index is not None
        plans = self.plans(header, index)
        for table in header.tables:
            key = table_key(table.name)
            # Tables are written between the header and the first plan.
            if plans or index is not None or self.backend.size(key) is not None:
                with self.checking(document=key):
                    load_table(self.backend, header, table.name)
        commits = self.commits(header, index, plans)
        if index is not None:
            self.check_index(index, plans, commits)
        held = {commit.shard for commit in commits}
        planned = [s.shard for plan, _ in plans.values() for s in plan.shards]
        self.report.uncommitted = sum(shard not in held for shard in planned)
        self.check_objects(header, commits)

    def plans(self, header: Header, index: Index | None) -> dict[int, tuple[Plan, str]]:
        """The readable plans."""
        numbers: list[tuple[int, str | None]] = []
        if index is not None:
            numbers = [(ref.number, ref.sha256) for ref in index.plans]
        elif self.listable:
            numbers = [(number, None) for number in list_plans(self.backend)]
        found = {}
        for number, digest in numbers:
            with self.checking(document=plan_key(number)):
                found[number] = load_plan(self.backend, header, number, sha256=digest)
        return found

    def commits(
        self, header: Header, index: Index | None, plans: dict[int, tuple[Plan, str]]
    ) -> list[Commit]:
        """The readable commits that readers use, in reading order."""
        rows = {} if index is None else {(r.shard, r.generation): r for r in index.shards}
        names = set(rows)
        if self.listable:
            for shard, generations in list_commits(self.backend).items():
                names |= {(shard, generation) for generation in generations}
        highest: dict[str, Commit] = {}
        for shard, generation in sorted(names):
            key = commit_key(shard, generation)
            with self.checking(document=key):
                row = rows.get((shard, generation))
                if index is not None and row is None and not _superseded(index, shard, generation):
                    raise IntegrityError(
                        "index-mismatch", "the index does not know this commit", where=key
                    )
                commit, digest = load_commit(
                    self.backend,
                    header,
                    shard,
                    generation,
                    sha256=None if row is None else row.commit_sha256,
                    plans=plans,
                )
                if row is not None and index_row(commit, digest) != row:
                    raise IntegrityError(
                        "index-mismatch", "the index's row and the commit disagree", where=key
                    )
                highest[shard] = commit
        return [commit for _, commit in sorted(highest.items())]

    def check_index(
        self, index: Index, plans: dict[int, tuple[Plan, str]], commits: list[Commit]
    ) -> None:
        if len(commits) != len(index.shards):
            return  # the damaged commit is reported already
        with self.checking(document=INDEX_KEY, counts=False):
            sums = merge(commit.statistics for commit in commits)
            if index.statistics != sums or index.column_bytes != sum_column_bytes(
                commit.column_bytes for commit in commits
            ):
                raise IntegrityError(
                    "index-mismatch", "the index's sums are not those of the commits"
                )

    def check_objects(self, header: Header, commits: list[Commit]) -> None:
        total = sum(commit.object.bytes for commit in commits)
        done = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            results = pool.map(lambda commit: self.check_object(header, commit), commits)
            for commit, problems in zip(commits, results, strict=True):
                self.report.problems += problems
                self.report.objects += 1
                self.report.bytes += commit.object.bytes
                self.report.chunks += len(commit.chunks) if self.report.full else 0
                done += commit.object.bytes
                self.progress(done, total)

    def check_object(self, header: Header, commit: Commit) -> list[dict[str, Any]]:
        problems: list[dict[str, Any]] = []

        @contextmanager
        def checking() -> Iterator[None]:
            try:
                yield
            except LogitstoreError as error:
                problems.append({"shard": commit.shard, **error.as_dict()})

        key = object_key(commit.object.name)
        where = f"{self.backend.location}/{key}"
        with checking():
            _check_size(self.backend.size(key), commit, where)
        if problems or not self.report.full:
            return problems
        digest = hashlib.sha256()
        with checking():
            kind = ranked(
                container(header.container), header, partial(load_table, self.backend, header)
            )
            for data, first, rows in object_blocks(self.backend, key, commit):
                digest.update(data)
                for number, (start, length) in enumerate(rows, first):
                    with checking():
                        chunk = data[start : start + length]
                        check_chunk(chunk, commit, number, where)
                        record = kind.decode(chunk, header, commit, number, verified=True)
                        check_views(record, header, where=f"{where} chunk {number}")
            if digest.hexdigest() != commit.object.sha256:
                raise IntegrityError(
                    "object-hash-mismatch",
                    "object is not the committed one",
                    where=where,
                    got=digest.hexdigest(),
                    expected=commit.object.sha256,
                )
            with io.BufferedReader(_RangeFile(self.backend, key, commit.object.bytes)) as file:
                kind.validate_object(file, header, commit)
        return problems

    @contextmanager
    def checking(self, *, document: str, counts: bool = True) -> Iterator[None]:
        """Report damage inside the block under a document's name. A missing store is raised."""
        try:
            self.report.documents += counts
            yield
        except LogitstoreError as error:
            if error.kind == "not-a-store":
                raise
            self.report.problems.append({"document": document, **error.as_dict()})


def _superseded(index: Index, shard: str, generation: int) -> bool:
    return any(row.shard == shard and generation < row.generation for row in index.shards)


def _check_size(size: int | None, commit: Commit, where: str) -> None:
    if size is None:
        raise IntegrityError("object-missing", "a committed object is not there", where=where)
    if size != commit.object.bytes:
        raise IntegrityError(
            "object-size-mismatch",
            "object has another size than its commit says",
            where=where,
            got=f"{size} bytes",
            expected=f"{commit.object.bytes} bytes",
        )


def check_chunk(data: memoryview, commit: Commit, chunk: int, where: str) -> None:
    """Raises: IntegrityError chunk-checksum-mismatch when a chunk is not the committed one."""
    if crc32c(data) != commit.chunks[chunk].crc32c:
        raise IntegrityError(
            "chunk-checksum-mismatch",
            "chunk is damaged",
            where=f"{where} chunk {chunk}",
            got=f"crc32c {crc32c(data):08x}",
            expected=f"crc32c {commit.chunks[chunk].crc32c:08x}",
        )


def object_blocks(
    backend: ReadBackend, key: str, commit: Commit
) -> Iterator[tuple[memoryview, int, list[tuple[int, int]]]]:
    """The object's bytes in order: (bytes, number of their first chunk, (start, length) of
    chunks)."""
    size = commit.object.bytes
    start, first, rows = 0, 0, list[tuple[int, int]]()

    def read(end: int) -> memoryview:
        return backend.get_range(key, start, end - start, size_bytes=size)

    for number, chunk in enumerate(commit.chunks):
        end = chunk.offset + chunk.bytes
        if rows and end - start > _READ_BYTES:
            yield read(chunk.offset), first, rows
            start, first, rows = chunk.offset, number, []
        rows.append((chunk.offset - start, chunk.bytes))
    if size > start:
        yield read(size), first, rows


class _RangeFile(io.RawIOBase):
    """An object as a seekable file."""

    def __init__(self, backend: Backend, key: str, size_bytes: int) -> None:
        self._backend = backend
        self._key = key
        self._size = size_bytes
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._offset))
        if length:
            data = self._backend.get_range(self._key, self._offset, length, size_bytes=self._size)
            buffer[:length] = data
            self._offset += length
        return length
