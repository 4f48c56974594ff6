"""Reading a store: a pinned snapshot of shards, chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from logitstore.containers import container
from logitstore.containers.protocol import Container
from logitstore.containers.ranked import ranked
from logitstore.record.record import Record
from logitstore.record.statistics import merge
from logitstore.spec.commit import Commit
from logitstore.spec.errors import (
    FormatError,
    IntegrityError,
    LogitstoreError,
    NotFoundError,
    StateError,
)
from logitstore.spec.header import Header
from logitstore.spec.index import Index, IndexRow
from logitstore.spec.plan import Plan
from logitstore.spec.statistics import Statistics
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store.backend import ReadBackend
from logitstore.store.connect import connect_reader
from logitstore.store.documents import (
    INDEX_KEY,
    index_row,
    list_commits,
    list_plans,
    load_commit,
    load_commits,
    load_header,
    load_index,
    load_plan,
    load_plans,
    load_table,
    object_key,
    table_key,
)
from logitstore.store.location import Location
from logitstore.store.lru import ProcessLRU
from logitstore.store.remote import RemoteReader
from logitstore.store.retry import TRAINING_PATIENCE_S, patience
from logitstore.store.snapshot import Snapshot

if TYPE_CHECKING:
    from logitstore.display.notebook import ShownSample

__all__ = [
    "ShardView",
    "Store",
    "open_store",
    "sum_column_bytes",
    "unsealed_on_http",
    "visible_rows",
]

# Chunk rows of cached commits; each takes about half a kilobyte.
MAX_CACHED_ROWS = 200_000


_Held = tuple[Commit, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class ShardView:
    """One visible shard: name, generation, what it holds, and its object under `shards/`."""

    shard: str
    generation: int
    samples: int
    positions: int
    object: str
    object_bytes: int


def open_store(
    location: str | os.PathLike[str] | Location,
    *,
    snapshot: Snapshot | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_limit_bytes: int | None = None,
    offline: bool = False,
    tolerant: bool = False,
) -> Store:
    """Open a store and pin what it holds now.

    A sealed store takes two reads (header, index) whatever its size; another one is listed and its
    commits are read. Plain HTTP needs a sealed store.

    Args:
        location: folder, or file, s3, gs, az, http or https URL.
        snapshot: pin exactly these commits instead.
        cache_dir: folder on a disk of this host where what is read from a remote store is kept, for
            all processes of this user; a local store is read in place.
        cache_limit_bytes: of that folder, 50 GB by default; what was used longest ago goes first.
        offline: make no request, read the cache only; its entries stay while the store is open.
        tolerant: for looking, never for training: go on without documents that are damaged, and
            leave out shards whose commit is; `Store.damage` tells which.

    Raises: NotFoundError not-a-store, not-cached; StorageError; FormatError; IntegrityError;
    StateError state-mismatch for another store's snapshot; UsageError bad-argument.
    """
    backend = connect_reader(
        location, cache_dir=cache_dir, cache_limit_bytes=cache_limit_bytes, offline=offline
    )
    header, header_sha256 = load_header(backend)
    damage: list[LogitstoreError] | None = [] if tolerant else None
    try:
        index = load_index(backend, header, header_sha256)
    except (IntegrityError, FormatError) as error:
        if damage is None or backend.location.kind == "http":
            raise
        damage.append(error)
        index = None
    if snapshot is not None and snapshot.store_uuid != header.store_uuid:
        raise StateError(
            "state-mismatch",
            "snapshot belongs to another store",
            where=backend.location,
            got=snapshot.store_uuid,
            expected=header.store_uuid,
        )
    if index is None:
        if backend.location.kind == "http":
            raise unsealed_on_http(backend)
        pairs = None if snapshot is None else snapshot.commits
        rows = visible_rows(backend, header, pairs, damage)
    else:
        rows = index.shards
        if snapshot is not None:
            rows = _pinned(index, snapshot, backend)
    return Store(backend, header, index, rows, damage)


def unsealed_on_http(backend: ReadBackend) -> IntegrityError:
    """The error for a store without index where nothing can be listed."""
    return IntegrityError(
        "document-missing",
        "a store on a plain HTTP server must be sealed",
        where=f"{backend.location}/{INDEX_KEY}",
        hint="run `logitstore seal` on the store before copying it there",
    )


def visible_rows(
    backend: ReadBackend,
    header: Header,
    pairs: Collection[tuple[str, int]] | None,
    damage: list[LogitstoreError] | None = None,
) -> tuple[IndexRow, ...]:
    """Rows of an unsealed store: of these commits, or of the highest generation of every shard.

    Args:
        damage: takes the errors of damaged documents, which are then left out; None: they raise.
    """
    if pairs is None:
        pairs = [(shard, found[-1]) for shard, found in list_commits(backend).items()]
    try:
        # Plans are listed after commits, so that every listed commit finds its plan.
        plans = load_plans(backend, header, None)
        commits = load_commits(backend, header, pairs, plans)
    except (IntegrityError, FormatError):
        if damage is None:
            raise
        commits = _sound_commits(backend, header, pairs, damage)
    return tuple(index_row(commit, digest) for commit, digest in commits)


def _sound_commits(
    backend: ReadBackend,
    header: Header,
    pairs: Collection[tuple[str, int]],
    damage: list[LogitstoreError],
) -> list[tuple[Commit, str]]:
    """The commits that can be read, one by one; what cannot goes to `damage`."""
    plans = {}
    needed = {int(shard.partition("-")[0]) for shard, _ in pairs}
    for number in sorted(needed.union(list_plans(backend))):
        try:
            plans[number] = load_plan(backend, header, number)
        except (IntegrityError, FormatError) as error:
            damage.append(error)
    commits = []
    for shard, generation in pairs:
        # A commit can be looked at without its plan, which the list above then names.
        known = plans if int(shard.partition("-")[0]) in plans else None
        try:
            commits.append(load_commit(backend, header, shard, generation, plans=known))
        except (IntegrityError, FormatError) as error:
            damage.append(error)
    return commits


def _pinned(index: Index, snapshot: Snapshot, backend: ReadBackend) -> tuple[IndexRow, ...]:
    rows = {(row.shard, row.generation): row for row in index.shards}
    missing = [pair for pair in snapshot.commits if pair not in rows]
    if missing:
        raise StateError(
            "state-mismatch",
            "the sealed store does not hold the snapshot's commits",
            where=backend.location,
            got=f"{len(missing)} missing, first {missing[0]}",
        )
    return tuple(rows[pair] for pair in snapshot.commits)


class Store:
    """A store at one snapshot. Thread-safe; can be sent to worker processes.

    Local stores can also be used in forked children; remote ones raise StorageError fork-unsafe
    there.

    Attributes:
        location: where it is.
        header: what it is.
        sealed: whether it is complete and has an index.
        shards: visible shards in reading order.
        num_samples, num_positions: of all shards.
        damage: of a store opened with `tolerant`: what was left out.
    """

    def __init__(
        self,
        backend: ReadBackend,
        header: Header,
        index: Index | None,
        rows: tuple[IndexRow, ...],
        damage: Collection[LogitstoreError] | None = None,
    ) -> None:
        self.location = backend.location
        self.header = header
        self.sealed = index is not None
        self.damage = tuple(damage or ())
        self._tolerant = damage is not None
        self.shards = tuple(
            ShardView(r.shard, r.generation, r.samples, r.positions, r.object, r.object_bytes)
            for r in rows
        )
        self.num_samples = sum(row.samples for row in rows)
        self.num_positions = sum(row.positions for row in rows)
        self._backend = backend
        self._index = index
        self._rows = rows
        self._first_sample = _prefix_sums([row.samples for row in rows])
        self._container: Container | None = None
        # shard index -> commit and the number of the first sample of each chunk
        self._commits: ProcessLRU[int, _Held] = ProcessLRU(MAX_CACHED_ROWS, _rows_held)

    def __len__(self) -> int:
        return self.num_samples

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release files and connections; records that were read stay valid."""
        self._backend.close()

    @property
    def snapshot(self) -> Snapshot:
        """The pinned commits."""
        return Snapshot(
            self.header.store_uuid, tuple((row.shard, row.generation) for row in self._rows)
        )

    def refresh(self) -> Store:
        """This store with what it holds now; read through the same cache."""
        remote = self._backend if isinstance(self._backend, RemoteReader) else None
        options: Mapping[str, Any] = {} if remote is None else remote.options
        return open_store(self.location, tolerant=self._tolerant, **options)

    def plans(self) -> tuple[Plan, ...]:
        """All plans, in order of their numbers."""
        found = load_plans(self._backend, self.header, self._index)
        return tuple(plan for plan, _ in found.values())

    def table(self, name: str) -> bytes:
        """A table's bytes, checked against the header.

        Raises: NotFoundError table-not-found; IntegrityError document-missing, table-hash-mismatch.
        """
        return load_table(self._backend, self.header, name)

    def commit(self, shard: int) -> Commit:
        """The commit of the shard with this index in `shards`.

        Raises: FormatError; IntegrityError document-missing, document-hash-mismatch,
        document-mismatch, index-mismatch.
        """
        return self._commit(shard)[0]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(shard index, chunk, row inside the chunk) of a sample.

        Raises: NotFoundError sample-out-of-range.
        """
        if not 0 <= sample < self.num_samples:
            raise NotFoundError(
                "sample-out-of-range",
                "no such sample",
                where=self.location,
                got=sample,
                expected=f"0 to {self.num_samples - 1}" if self.num_samples else "none: no samples",
            )
        shard = int(np.searchsorted(self._first_sample, sample, side="right")) - 1
        inside = sample - int(self._first_sample[shard])
        first = self._commit(shard)[1]
        chunk = int(np.searchsorted(first, inside, side="right")) - 1
        return shard, chunk, inside - int(first[chunk])

    def read_chunk(self, shard: int, chunk: int, columns: Collection[str] | None = None) -> Record:
        """One chunk's record, its bytes compared with the committed checksum.

        A remote store is asked again for bytes that arrived damaged, once, and for up to five
        minutes when it cannot be reached.

        Args:
            shard: index into `shards`.
            chunk: index into the commit's chunk table.
            columns: only these; None for all.

        Raises: IntegrityError object-missing, object-size-mismatch, chunk-checksum-mismatch;
        FormatError chunk-malformed; NotFoundError not-cached; StorageError.
        """
        with patience(TRAINING_PATIENCE_S):
            data = self.chunk_bytes(shard, chunk)
        return self.decode_chunk(shard, chunk, data, columns)

    def chunk_bytes(self, shard: int, chunk: int) -> memoryview:
        """The stored bytes of one chunk, compared with the committed checksum.

        Gives up on a remote store that cannot be reached after a few seconds. Raises as
        `read_chunk`.
        """
        commit = self.commit(shard)
        row = commit.chunks[chunk]
        key = object_key(commit.object.name)
        data, crc32c = self._backend.get_chunk(
            key, row.offset, row.bytes, size_bytes=commit.object.bytes, crc32c=row.crc32c
        )
        if crc32c != row.crc32c:
            twice = "" if self.location.kind == "local" else ", twice"
            raise IntegrityError(
                "chunk-checksum-mismatch",
                "chunk is damaged",
                where=f"{self.location}/{key} chunk {chunk}",
                got=f"crc32c {crc32c:08x} of {row.bytes} bytes at {row.offset}{twice}",
                expected=f"crc32c {row.crc32c:08x}",
                hint="restore the object from a copy; `logitstore verify --full` lists all damage",
                data={"shard": commit.shard, "chunk": chunk},
            )
        return data

    def is_near(self, shard: int, chunk: int) -> bool:
        """Whether a disk of this host has the chunk, so that fetching it ahead gains nothing.

        The disk begins to read it.
        """
        commit = self.commit(shard)
        row = commit.chunks[chunk]
        return self._backend.is_near(object_key(commit.object.name), row.offset, row.bytes)

    def decode_chunk(
        self, shard: int, chunk: int, data: memoryview, columns: Collection[str] | None = None
    ) -> Record:
        """The record in what `chunk_bytes` returned.

        Raises: FormatError chunk-malformed.
        """
        commit = self.commit(shard)
        if self._container is None:
            # Now and not when opening: the order of ids, where there is one, is a table.
            self._container = ranked(container(self.header.container), self.header, self.table)
        return self._container.decode(data, self.header, commit, chunk, columns, verified=True)

    def require_cached(self) -> None:
        """When opened offline, look whether every chunk is there.

        Raises: NotFoundError not-cached, with the number of missing chunks and, in
        `data["missing"]`, shard and chunk of the first thousand.
        """
        remote = self._backend
        if not (isinstance(remote, RemoteReader) and remote.offline):
            return
        missing = []
        total = 0
        for shard, view in enumerate(self.shards):
            key = object_key(view.object)
            chunks = self.commit(shard).chunks
            total += len(chunks)
            missing += [
                (view.shard, chunk)
                for chunk, row in enumerate(chunks)
                if not remote.holds(key, row.offset, row.bytes)
            ]
        if missing:
            raise NotFoundError(
                "not-cached",
                "offline, and the cache is not complete",
                where=self.location,
                got=f"{len(missing)} of {total} chunks are missing, the first is chunk "
                f"{missing[0][1]} of shard {missing[0][0]}",
                expected="the whole store",
                hint="read it once without offline=True and with the same cache_dir, or use "
                "`logitstore copy`",
                data={"missing": missing[:1000]},
            )

    def sample(self, sample: int, columns: Collection[str] | None = None) -> Record:
        """One sample; decodes its whole chunk."""
        shard, chunk, row = self.locate(sample)
        return self.read_chunk(shard, chunk, columns).sample(row)

    def show(
        self, sample: int, *, measure: str = "entropy", start: int = 0, positions: int = 512
    ) -> ShownSample:
        """One sample as a heat map, for a notebook: needs no script and no network.

        Args:
            measure: entropy, top1_prob, label_logprob, label_rank or kept_mass, shown first.
            start, positions: the part of the sample; at most 2048 positions.

        Raises: NotFoundError sample-out-of-range; UsageError bad-argument; what reading raises.
        """
        from logitstore.display.notebook import ShownSample

        named = self.header.tokenizer
        table = None
        if named is not None and named.table is not None:
            where = f"{self.location}/{table_key(named.table)}"
            table = TokenizerTable.decode(self.table(named.table), where=where)
        part: dict[str, Any] = {"measure": measure, "start": start, "positions": positions}
        return ShownSample(self.sample(sample), self.header, table, sample=sample, **part)

    def statistics(self) -> Statistics:
        """Of all visible shards, from commits or the index; no chunk is read."""
        if self._index is not None and len(self._rows) == len(self._index.shards):
            return self._index.statistics
        return merge(self.commit(i).statistics for i in range(len(self.shards)))

    def column_bytes(self) -> dict[str, int]:
        """Stored bytes by column over all visible shards, headers and padding included."""
        if self._index is not None and len(self._rows) == len(self._index.shards):
            return dict(self._index.column_bytes)
        return sum_column_bytes(self.commit(i).column_bytes for i in range(len(self.shards)))

    def _commit(self, shard: int) -> _Held:
        held = self._commits.get(shard)
        if held is not None:
            return held
        row = self._rows[shard]
        with patience(TRAINING_PATIENCE_S):
            commit, _ = load_commit(
                self._backend, self.header, row.shard, row.generation, sha256=row.commit_sha256
            )
        if index_row(commit, row.commit_sha256) != row:
            raise IntegrityError(
                "index-mismatch",
                "the index's row and the commit disagree",
                where=f"{self.location}/{INDEX_KEY} shard {row.shard}",
            )
        first = _prefix_sums([chunk.samples for chunk in commit.chunks])
        return self._commits.put(shard, (commit, first))


def _rows_held(held: _Held) -> int:
    return 1 + len(held[0].chunks)


def sum_column_bytes(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Adds up `column_bytes` of several commits."""
    total: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total


def _prefix_sums(counts: list[int]) -> np.ndarray[Any, Any]:
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
