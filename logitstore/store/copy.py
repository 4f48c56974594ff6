"""Copying a store: whole shards, each checked on its way, in an order that is safe to stop at.

Header, tables and plans come first; then of each shard the object before its commit; the index
last. So a copy that was stopped is a store with fewer shards, and the same call completes it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from logitstore.spec.commit import Commit
from logitstore.spec.document import MAX_DOCUMENT_BYTES
from logitstore.spec.errors import (
    CommitError,
    FormatError,
    IntegrityError,
    StorageError,
    UsageError,
)
from logitstore.spec.index import IndexRow
from logitstore.store.backend import Backend
from logitstore.store.connect import connect, connect_reader
from logitstore.store.documents import (
    HEADER_KEY,
    INDEX_KEY,
    commit_key,
    load_commit,
    load_header,
    load_index,
    load_plans,
    load_table,
    object_key,
    plan_key,
    table_key,
)
from logitstore.store.local import storage_error
from logitstore.store.location import Location, parse_location
from logitstore.store.reader import unsealed_on_http, visible_rows
from logitstore.store.retry import TRAINING_PATIENCE_S, patience
from logitstore.store.verify import check_chunk, object_blocks

__all__ = ["CopyReport", "copy"]

# Shards under way at once; each takes a block of 16 MB.
_THREADS = 4
_DAMAGED_BYTES = ("chunk-checksum-mismatch", "object-hash-mismatch")


@dataclass
class CopyReport:
    """What a copy did.

    Attributes:
        sealed: the copy is complete and has an index.
        shards: of the source, as it was when the copy began.
        copied, present: shards brought now, and shards that were there already.
        bytes: of objects brought now.
        problems: shards of the source that are damaged and were not copied: one JSON-able dict
            each, `shard` and the error's kind, what, where, got, expected and hint.
        seconds: wall time.
    """

    source: str
    target: str
    sealed: bool = False
    shards: int = 0
    copied: int = 0
    present: int = 0
    bytes: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every shard of the source is in the copy."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"ok": self.ok, **self.__dict__}


def copy(
    source: str | os.PathLike[str] | Location,
    target: str | os.PathLike[str] | Location,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """Bring to `target` what it lacks of the store at `source`, bytes unchanged.

    Every chunk is compared with its checksum and every object with its SHA-256 before it gets its
    name. A remote source is asked once more for what arrives damaged, and is waited for when it
    cannot be reached. A damaged shard is left out and reported; the copy is then not sealed. Of a
    store that still grows, what is committed is copied; a later call brings the rest.

    Args:
        source: any location; on plain HTTP a sealed store.
        target: a folder, s3, gs or az URL; empty, or an earlier copy.
        progress: called with (bytes of objects done, bytes in total).

    Raises: NotFoundError not-a-store; CommitError store-exists when another store is at the target;
    IntegrityError and FormatError for damaged header, plans, tables or index; StorageError.
    """
    started = time.perf_counter()
    wanted = parse_location(target)
    if wanted.kind == "http":
        raise UsageError(
            "bad-argument",
            "a plain HTTP server cannot be written",
            where=wanted,
            expected="a folder, s3://, gs:// or az://",
        )
    with patience(TRAINING_PATIENCE_S):
        done = _Copier(parse_location(source), connect(wanted), progress).run()
    done.seconds = time.perf_counter() - started
    return done


class _Copier:
    def __init__(
        self, source: Location, target: Backend, progress: Callable[[int, int], None] | None
    ) -> None:
        self.source = connect_reader(source)
        self.target = target
        self.report = CopyReport(str(source), str(target.location))
        self.progress = progress or (lambda done, total: None)

    def run(self) -> CopyReport:
        source, report = self.source, self.report
        self.header, header_sha256 = load_header(source)
        index = load_index(source, self.header, header_sha256)
        if index is None and source.location.kind == "http":
            raise unsealed_on_http(source)
        rows = visible_rows(source, self.header, None) if index is None else index.shards
        plans = load_plans(source, self.header, index)
        self.check_target(sealed=index is not None)
        self.put(HEADER_KEY, self.document(HEADER_KEY), "header")
        for table in self.header.tables:
            self.put(table_key(table.name), load_table(source, self.header, table.name), "table")
        for number in plans:
            self.put(plan_key(number), self.document(plan_key(number)), "plan")
        report.shards = len(rows)
        self.copy_shards(rows)
        if index is not None and report.ok:
            self.put(INDEX_KEY, self.document(INDEX_KEY), "index")
            report.sealed = True
        return report

    def check_target(self, *, sealed: bool) -> None:
        present = self.target.get(HEADER_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
        if present is not None and present != self.document(HEADER_KEY):
            raise CommitError(
                "store-exists",
                "another store is there",
                where=self.target.location,
                expected="an empty place, or an earlier copy of the same store",
            )
        if self.target.probe() == "single-writer":
            self.target.use_single_writer()
            if not sealed and self.header.commit_mode == "create-only":
                raise UsageError(
                    "bad-argument",
                    "the target ignores conditional writes, but the store's header says that "
                    "several writers may add to it",
                    where=self.target.location,
                    hint="seal the store before copying it there",
                )

    def copy_shards(self, rows: tuple[IndexRow, ...]) -> None:
        report = self.report
        total = sum(row.object_bytes for row in rows)
        done = 0
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for row, outcome in zip(rows, pool.map(self.copy_shard, rows), strict=True):
                if isinstance(outcome, dict):
                    report.problems.append(outcome)
                elif outcome:
                    report.copied += 1
                    report.bytes += row.object_bytes
                else:
                    report.present += 1
                done += row.object_bytes
                self.progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)

    def copy_shard(self, row: IndexRow) -> bool | dict[str, Any]:
        """Whether the shard was brought now; what is wrong with it when it is damaged."""
        try:
            with patience(TRAINING_PATIENCE_S):
                return self.bring(row)
        except (IntegrityError, FormatError) as error:
            return {"shard": row.shard, **error.as_dict()}

    def bring(self, row: IndexRow) -> bool:
        key = commit_key(row.shard, row.generation)
        commit, _ = load_commit(
            self.source, self.header, row.shard, row.generation, sha256=row.commit_sha256
        )
        held = self.target.size(object_key(row.object))
        committed = self.target.size(key) is not None
        if held == row.object_bytes and (committed or self.holds_object(commit)):
            if not committed:
                self.put(key, self.document(key), "commit")
            return not committed
        if held is not None:  # of a copy that was stopped, or damaged since
            self.target.delete(object_key(row.object))
        try:
            self.copy_object(commit)
        except IntegrityError as error:
            if self.source.location.kind == "local" or error.kind not in _DAMAGED_BYTES:
                raise
            self.copy_object(commit)  # it may have been damaged on its way
        self.put(key, self.document(key), "commit")
        return True

    def holds_object(self, commit: Commit) -> bool:
        """Whether an object that has no commit yet arrived whole."""
        digest = hashlib.sha256()
        for data, _, _ in object_blocks(self.target, object_key(commit.object.name), commit):
            digest.update(data)
        return digest.hexdigest() == commit.object.sha256

    def copy_object(self, commit: Commit) -> None:
        key = object_key(commit.object.name)
        where = f"{self.source.location}/{key}"
        writer = self.target.create_object(key)
        try:
            digest = hashlib.sha256()
            for data, first, rows in object_blocks(self.source, key, commit):
                digest.update(data)
                for number, (start, length) in enumerate(rows, first):
                    check_chunk(data[start : start + length], commit, number, where)
                try:
                    writer.file.write(data)
                except OSError as error:
                    raise storage_error(error, f"{self.target.location}/{key}") from error
            if digest.hexdigest() != commit.object.sha256:
                raise IntegrityError(
                    "object-hash-mismatch",
                    "object is not the committed one",
                    where=where,
                    got=digest.hexdigest(),
                    expected=commit.object.sha256,
                )
            _, written = writer.finish()
        finally:
            writer.abandon()
        if written != commit.object.sha256:
            self.target.delete(key)
            raise StorageError(
                "storage-failed",
                "what was written reads back differently",
                where=f"{self.target.location}/{key}",
            )

    def document(self, key: str) -> bytes:
        """A document of the source, which has been checked when it was parsed."""
        data = self.source.get(key, limit_bytes=MAX_DOCUMENT_BYTES)
        if data is None:
            raise IntegrityError(
                "document-missing",
                "removed during the copy",
                where=f"{self.source.location}/{key}",
            )
        return data

    def put(self, key: str, data: bytes, kind: str) -> None:
        """Create a file, or find that it is there and the same."""
        if self.target.create(key, data, kind=kind):
            return
        if self.target.get(key, limit_bytes=MAX_DOCUMENT_BYTES) != data:
            raise CommitError(
                "store-exists",
                "the target has a file of that name with other content",
                where=f"{self.target.location}/{key}",
                expected="an empty place, or an earlier copy of the same store",
            )
