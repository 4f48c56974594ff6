"""The stores that a process serves: opened on first use, re-read while a capture goes on.

Every worker process opens them for itself; what a request sees follows from the storage alone.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import structlog

from logitstore.record.statistics import merge
from logitstore.spec.commit import ObjectRef
from logitstore.spec.document import MAX_DOCUMENT_BYTES, read_body, sha256_hex
from logitstore.spec.errors import LogitstoreError, NotFoundError, StorageError
from logitstore.spec.header import Header
from logitstore.spec.index import Index, IndexRow, PlanRef
from logitstore.spec.statistics import Statistics
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store
from logitstore.store.backend import Backend
from logitstore.store.connect import connect
from logitstore.store.documents import (
    HEADER_KEY,
    INDEX_KEY,
    commit_key,
    index_row,
    list_commits,
    load_commit,
    load_commits,
    load_header,
    load_index,
    load_plans,
    load_table,
    parse_object_name,
)
from logitstore.store.local import LocalBackend
from logitstore.store.lru import ProcessLRU
from logitstore.store.reader import sum_column_bytes
from logitstore_server.access import visible_stores
from logitstore_server.metrics import CACHE_READS, STORE_AVAILABLE
from logitstore_server.problems import store_not_found
from logitstore_server.settings import StoreEntry

__all__ = ["CODINGS", "Document", "Opened", "Registry", "ServedStore"]

# Content codings of documents, best first.
CODINGS = ("zstd", "gzip")

# How old the list of commits of an unsealed store may be, except for its index.
_MAX_AGE_S = 1.0
# How often the header of an open store is looked at: a store can be taken away, or replaced.
_LOOK_S = 5.0
# How long storage that failed is not asked again: who waits behind a request that met a storage
# without answer gives up with it, so that threads are left for other stores.
_FAILURE_S = 2.0
# Documents, plain and compressed, that a process keeps for one store.
_CACHED_BYTES = 64 << 20
# Generations of a shard that are looked for; a repair adds one.
_MAX_GENERATIONS = 100
_GZIP_LEVEL = 6

_log: Any = structlog.get_logger("logitstore_server")


@dataclass(frozen=True)
class Document:
    """A small file's bytes and the SHA-256 of what it says; compressed ones carry their coding."""

    data: bytes
    etag: str
    coding: str = ""


@dataclass(frozen=True)
class _Held:
    """What is kept of a commit."""

    row: IndexRow
    statistics: Statistics
    column_bytes: dict[str, int]


@dataclass(frozen=True)
class Opened:
    """A store at one snapshot.

    Attributes:
        name: in URLs.
        store: reads its samples.
        index: of the sealed store, or what `seal` would write now.
        document: the index's bytes.
        sealed: whether it can still grow.
        objects: shard objects by name.
        backend: reads bytes of them.
    """

    name: str
    store: Store
    index: Index
    document: Document
    sealed: bool
    objects: dict[str, ObjectRef]
    backend: Backend


V = TypeVar("V")


class _CountedLRU(ProcessLRU[str, V], Generic[V]):
    """Counts what is found in it."""

    def get(self, key: str) -> V | None:
        found = super().get(key)
        CACHE_READS.labels("miss" if found is None else "hit").inc()
        return found


class ServedStore:
    """One store, by its name in URLs. Thread-safe; methods may wait for storage.

    Every method raises what `logitstore.store` raises for a store that is not there or damaged.
    """

    def __init__(self, entry: StoreEntry) -> None:
        self.name = entry.name
        self.public = entry.public
        self.backend: Backend = connect(entry.location)
        self._lock = threading.Lock()
        self._header: tuple[Header, Document] | None = None
        self._opened: Opened | None = None
        self._checked_s = float("-inf")
        self._looking = threading.Lock()
        self._looked_s = float("-inf")
        self._failed: tuple[StorageError, float] | None = None
        self._problem: str | None = None
        # shard, generation -> what its commit says; only of an unsealed store
        self._held: dict[tuple[str, int], _Held] = {}
        self._documents: _CountedLRU[Document] = _CountedLRU(_CACHED_BYTES, _size)
        self._old_objects: ProcessLRU[str, ObjectRef] = ProcessLRU(10_000, _one)
        self._tokenizer: TokenizerTable | None = None

    @property
    def local(self) -> bool:
        """Whether its objects are files of this machine."""
        return self.backend.location.kind == "local"

    @property
    def open_shards(self) -> int:
        """Files of shard objects that this process holds open."""
        return self.backend.open_objects if isinstance(self.backend, LocalBackend) else 0

    def cache_control(self, *, immutable: bool) -> str:
        """The header's value for an object or document of the store."""
        scope = "public" if self.public else "private"
        return f"{scope}, max-age=31536000, immutable" if immutable else f"{scope}, no-cache"

    @property
    def problem(self) -> str | None:
        """Kind of the error that the last look at the store gave, None if it gave none."""
        return self._problem

    def header(self) -> tuple[Header, Document]:
        """The header and its file."""
        self._look_again()
        with self._lock:
            return self._unless_failed(self._read_header)

    def opened(self, *, max_age_s: float = _MAX_AGE_S) -> Opened:
        """The store as it is now, or was at most `max_age_s` before."""
        self._look_again()
        since_s = time.monotonic() - max_age_s
        current = self._opened
        if current is not None and (current.sealed or self._checked_s >= since_s):
            return current
        with self._lock:
            # Whoever waited for the lock takes what the one before found.
            if self._opened is None or self._checked_s < since_s:
                started_s = time.monotonic()
                self._opened = self._try_to_open()
                self._checked_s = started_s
            return self._opened

    def document(self, key: str) -> Document:
        """A plan, table or commit: its bytes after their digest was compared.

        Raises: NotFoundError file-not-found.
        """
        held = self._documents.get(key)
        if held is not None:
            return held
        header, _ = self.header()
        folder, _, name = key.partition("/")
        if folder == "tables":
            data = load_table(self.backend, header, name)
            return self._documents.put(key, Document(data, sha256_hex(data)))
        found = self.backend.get(key, limit_bytes=MAX_DOCUMENT_BYTES)
        if found is None:
            raise NotFoundError("file-not-found", "the store has no such file")
        digest = sha256_hex(read_body(found, where=f"{self.name}/{key}"))
        return self._documents.put(key, Document(found, digest))

    def encoded(self, document: Document, coding: str) -> Document:
        """The document in a content coding, with a validator of its own."""
        if not coding:
            return document
        etag = f"{document.etag}-{coding}"
        held = self._documents.get(etag)
        if held is not None:
            return held
        return self._documents.put(etag, Document(_compress(document.data, coding), etag, coding))

    def known_object(self, name: str) -> ObjectRef | None:
        """A shard object that is known to be committed; never waits."""
        current = self._opened
        ref = None if current is None else current.objects.get(name)
        return ref if ref is not None else self._old_objects.get(name)

    def find_object(self, name: str) -> ObjectRef:
        """A shard object that a commit names, of any generation.

        Raises: NotFoundError file-not-found.
        """
        parsed = parse_object_name(name)
        if parsed is not None:
            self.opened()
            known = self.known_object(name)
            if known is not None:
                return known
            header, _ = self.header()
            for generation in range(1, _MAX_GENERATIONS + 1):
                # Asked one by one: listing all commits for each miss would be slow.
                if self.backend.size(commit_key(parsed[0], generation)) is None:
                    break
                commit, _ = load_commit(self.backend, header, parsed[0], generation)
                if commit.object.name == name:
                    return self._old_objects.put(name, commit.object)
        raise NotFoundError("file-not-found", "no commit of the store names such an object")

    def tokenizer(self) -> TokenizerTable | None:
        """The store's table of token bytes, None where it has none."""
        header, _ = self.header()
        if header.tokenizer is None or header.tokenizer.table is None:
            return None
        if self._tokenizer is None:
            name = header.tokenizer.table
            self._tokenizer = TokenizerTable.decode(
                self.document(f"tables/{name}").data, where=f"{self.name}/tables/{name}"
            )
        return self._tokenizer

    def close(self) -> None:
        """Release files and connections."""
        self.backend.close()

    def _look_again(self) -> None:
        """Forget an open store whose header is gone or another one; one thread at a time looks.

        Where that cannot be found out, what is open stays.
        """
        known = self._header
        due_s = self._looked_s + _LOOK_S
        if known is None or time.monotonic() < due_s or not self._looking.acquire(blocking=False):
            return
        try:
            data = self.backend.get(HEADER_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
        except LogitstoreError as error:
            self._note(error)
            return
        finally:
            self._looked_s = time.monotonic()
            self._looking.release()
        if data == known[1].data:
            if self._opened is not None:
                self._note(None)
            return
        with self._lock:
            if self._header is known:
                self._header = self._opened = self._tokenizer = None
                self._held.clear()
                self._documents.clear()
                self._old_objects.clear()
                self.backend.close()

    def _try_to_open(self) -> Opened:
        try:
            opened = self._unless_failed(lambda: self._open(self._opened))
        except LogitstoreError as error:
            self._note(error)
            raise
        self._note(None)
        return opened

    def _unless_failed(self, ask: Callable[[], V]) -> V:
        """What storage answers; its last failure, while that is fresh."""
        if self._failed is not None and time.monotonic() < self._failed[1]:
            raise self._failed[0].with_traceback(None)
        try:
            return ask()
        except StorageError as error:
            self._failed = error, time.monotonic() + _FAILURE_S
            raise

    def _note(self, error: LogitstoreError | None) -> None:
        """Remember whether the store can be opened, and log when that changes."""
        before, self._problem = self._problem, None if error is None else error.kind
        STORE_AVAILABLE.labels(self.name).set(error is None)
        if error is not None and error.kind != before:
            _log.error("store unavailable", store=self.name, kind=error.kind, problem=error.message)
        elif error is None and before is not None:
            _log.warning("store available again", store=self.name)

    def _read_header(self) -> tuple[Header, Document]:
        if self._header is None:
            header, digest = load_header(self.backend)
            data = self.backend.get(HEADER_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
            if data is None or sha256_hex(read_body(data, where=HEADER_KEY)) != digest:
                raise NotFoundError("not-a-store", "the header changed while it was read")
            self._header = header, Document(data, digest)
            self._looked_s = time.monotonic()
        return self._header

    def _open(self, before: Opened | None) -> Opened:
        header, document = self._read_header()
        index = load_index(self.backend, header, document.etag)
        if index is not None:
            self._held.clear()
            data = self.backend.get(INDEX_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
            if data is None:
                raise NotFoundError("file-not-found", "the index went away while it was read")
            found = Document(data, sha256_hex(read_body(data, where=INDEX_KEY)))
            return self._opened_at(header, index, found, sealed=True)
        index = self._index_now(header, document.etag)
        if before is not None and before.index == index:
            return before
        data = index.encode()
        found = Document(data, sha256_hex(read_body(data, where=INDEX_KEY)))
        return self._opened_at(header, index, found, sealed=False)

    def _opened_at(self, header: Header, index: Index, found: Document, *, sealed: bool) -> Opened:
        objects = {
            row.object: ObjectRef(name=row.object, bytes=row.object_bytes, sha256=row.object_sha256)
            for row in index.shards
        }
        store = Store(self.backend, header, index, index.shards)
        return Opened(self.name, store, index, found, sealed, objects, self.backend)

    def _index_now(self, header: Header, header_sha256: str) -> Index:
        """What `seal` would write if the store were complete; equal in every process."""
        pairs = [(shard, found[-1]) for shard, found in list_commits(self.backend).items()]
        # Plans are listed after commits, so that every listed commit finds its plan.
        plans = load_plans(self.backend, header, None)
        new = [pair for pair in pairs if pair not in self._held]
        for pair, (commit, digest) in zip(
            new, load_commits(self.backend, header, new, plans), strict=True
        ):
            self._held[pair] = _Held(
                index_row(commit, digest), commit.statistics, commit.column_bytes
            )
        held = [self._held[pair] for pair in pairs]
        return Index(
            store_uuid=header.store_uuid,
            header_sha256=header_sha256,
            # Not now: workers must agree on the bytes.
            created=header.created,
            plans=tuple(PlanRef(number=n, sha256=digest) for n, (_, digest) in plans.items()),
            shards=tuple(each.row for each in held),
            samples=sum(each.row.samples for each in held),
            positions=sum(each.row.positions for each in held),
            statistics=merge(each.statistics for each in held),
            column_bytes=sum_column_bytes(each.column_bytes for each in held),
        )


class Registry:
    """The stores of the service, by name: those that the request being answered may see."""

    def __init__(self, entries: Iterable[StoreEntry]) -> None:
        self._stores = {entry.name: ServedStore(entry) for entry in entries}

    def __iter__(self) -> Iterator[ServedStore]:
        visible = visible_stores.get()
        return (served for name, served in self._stores.items() if name in visible)

    def get(self, name: str) -> ServedStore:
        """Raises: ServiceError store-not-found."""
        served = self._stores.get(name)
        if served is None or name not in visible_stores.get():
            raise store_not_found()
        return served

    def all(self) -> list[ServedStore]:
        """Every store, whoever asks; for the service itself."""
        return list(self._stores.values())

    @property
    def open_shards(self) -> int:
        """Files of shard objects that this process holds open."""
        return sum(served.open_shards for served in self._stores.values())

    def close(self) -> None:
        """Release all files and connections."""
        for served in self.all():
            served.close()


def _compress(data: bytes, coding: str) -> bytes:
    if coding == "zstd":
        return bytes(pa.Codec("zstd").compress(data, asbytes=True))
    packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def _size(document: Document) -> int:
    return len(document.data)


def _one(_: object) -> int:
    return 1
