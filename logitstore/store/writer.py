"""Writing a store: attempts at shards, of which exactly one commit each becomes visible.

1. The attempt's object is written under a name of its own and made durable. 2. The commit
document is created; creation fails where one exists, so that of any number of racing attempts one
wins. 3. The losers' objects are garbage that no reader ever sees.
"""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from logitstore.containers import container
from logitstore.containers.ranked import ranked
from logitstore.record.new_header import now, software
from logitstore.record.record import Record
from logitstore.record.statistics import merge
from logitstore.spec.commit import Commit, ObjectRef, Quarantined
from logitstore.spec.document import MAX_DOCUMENT_BYTES, canonical_json, sha256_hex
from logitstore.spec.errors import CommitError, IntegrityError, StorageError, UsageError
from logitstore.spec.header import Header, TableRef
from logitstore.spec.index import Index, PlanRef
from logitstore.spec.plan import Plan, plan_fingerprint
from logitstore.spec.statistics import Statistics
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
    load_plan,
    load_plans,
    load_table,
    object_key,
    plan_key,
    table_key,
)
from logitstore.store.local import storage_error
from logitstore.store.location import Location
from logitstore.store.reader import Store, open_store, sum_column_bytes
from logitstore.store.steps import step

__all__ = ["ShardAttempt", "SingleWriterWarning", "StoreWriter", "append", "create"]

_ATTEMPT_BYTES = 8


class SingleWriterWarning(UserWarning):
    """Two processes may be writing a store whose storage cannot keep them apart."""


def create(
    location: str | os.PathLike[str] | Location,
    header: Header,
    tables: Mapping[str, bytes] | None = None,
) -> StoreWriter:
    """Start a store, or join one that was started with the same configuration.

    `header.tables` and `header.commit_mode` are filled in here; when the store was there, its own
    header counts and the one given is only compared.

    Args:
        tables: name -> bytes, kept as `tables/<name>`.

    Raises: CommitError configuration-changed (with a diff), store-sealed; StorageError.
    """
    backend = connect(location)
    tables = dict(tables or {})
    refs = tuple(
        TableRef(name=name, bytes=len(data), sha256=sha256_hex(data))
        for name, data in sorted(tables.items())
    )
    if backend.size(HEADER_KEY) is None:
        header = header.model_copy(update={"tables": refs, "commit_mode": backend.probe()})
        backend.create(HEADER_KEY, header.encode(), kind="header")
    # Also after creating it: another process may have been first.
    present, header_sha256 = load_header(backend)
    _same_configuration(backend, present, header, refs)
    for name, data in tables.items():
        if backend.size(table_key(name)) is None:
            backend.create(table_key(name), data, kind="table")
    return StoreWriter(backend, present, header_sha256)


def append(location: str | os.PathLike[str] | Location) -> StoreWriter:
    """A writer to a store that is there.

    Raises: NotFoundError not-a-store; CommitError store-sealed; StorageError.
    """
    backend = connect(location)
    return StoreWriter(backend, *load_header(backend))


class StoreWriter:
    """Adds plans and shards to a store, and seals it. Any number may work on one store at a time.

    Attributes:
        header: of the store.
        location: where it is.
    """

    def __init__(self, backend: Backend, header: Header, header_sha256: str) -> None:
        self.header = header
        self.location = backend.location
        self._backend = backend
        self._header_sha256 = header_sha256
        self._marker: str | None = None
        _check_not_sealed(self._backend)
        if header.commit_mode == "single-writer":
            backend.use_single_writer()
            self._mark_writer()

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
        """Release connections; committed work stays, attempts not committed count for nothing."""
        if self._marker is not None:
            self._backend.delete(self._marker)
            self._marker = None
        self._backend.close()

    @property
    def commit_mode(self) -> Literal["create-only", "single-writer"]:
        """ "single-writer": the storage overwrites silently, so only one process may commit."""
        return self.header.commit_mode

    def plans(self) -> tuple[Plan, ...]:
        """All plans, in order of their numbers."""
        return tuple(plan for plan, _ in load_plans(self._backend, self.header, None).values())

    def add_plan(self, plan: Plan) -> Plan:
        """Add a plan; one that is there and has the same fingerprint is joined.

        Returns: the plan in the store.
        Raises: CommitError configuration-changed when another plan has that number; IntegrityError
        document-missing when the process that started the store died before writing its tables.
        """
        self._check_tables()
        if not self._backend.create(plan_key(plan.number), plan.encode(), kind="plan"):
            present, _ = load_plan(self._backend, self.header, plan.number)
            if present.fingerprint != plan.fingerprint:
                raise CommitError(
                    "configuration-changed",
                    "another plan of that number is there",
                    where=f"{self.location}/{plan_key(plan.number)}",
                    got=f"fingerprint {plan.fingerprint}",
                    expected=f"fingerprint {present.fingerprint}",
                    hint="the corpus or the shard size changed; use another store or `append`",
                )
            return present
        return plan

    def add_push_plan(self) -> Plan:
        """A new plan of kind "push", under the next free number, for one writer session."""
        self._check_tables()
        number = max((plan.number for plan in self.plans()), default=0) + 1
        while True:
            digest = self.header.configuration_sha256
            plan = Plan(
                store_uuid=self.header.store_uuid,
                number=number,
                kind="push",
                created=now(),
                configuration_sha256=digest,
                fingerprint=plan_fingerprint(digest, number, None, ()),
            )
            # Not joined when taken: push plans are alike, and two sessions must not share names. A
            # lost reply costs a number.
            if self._backend.create(plan_key(number), plan.encode(), kind="plan"):
                return plan
            number += 1

    def committed(self) -> dict[str, int]:
        """shard -> highest generation; from names only, so that resuming a large store is cheap."""
        # Before anybody relies on them: their creators may have died between link and flush.
        self._backend.settle()
        return {shard: found[-1] for shard, found in list_commits(self._backend).items()}

    def reader(self) -> Store:
        """The store as a reader sees it now."""
        return open_store(self.location)

    def begin(self, shard: str, plan: Plan, *, generation: int = 1) -> ShardAttempt:
        """An attempt at a shard.

        Args:
            generation: 1, or one more than the damaged commit that this attempt replaces.

        Raises: CommitError already-committed, store-sealed; UsageError bad-argument for a shard
        that is not of the plan; StorageError.
        """
        planned = {s.shard for s in plan.shards}
        if int(shard.partition("-")[0]) != plan.number or (
            plan.kind == "corpus" and shard not in planned
        ):
            raise UsageError(
                "bad-argument", "shard is not of this plan", got=shard, expected=plan.number
            )
        _check_not_sealed(self._backend)
        if self._backend.size(commit_key(shard, generation)) is not None:
            raise _already_committed(f"{self.location}/{commit_key(shard, generation)}")
        return ShardAttempt(self._backend, self.header, shard, plan, generation)

    def seal(self) -> Index:
        """Write the index of a complete store; repeated, it returns the index that is there.

        Raises: CommitError plan-incomplete; IntegrityError and FormatError for damaged documents.
        """
        header = self.header
        index = load_index(self._backend, header, self._header_sha256)
        if index is not None:
            return index
        pairs = sorted(self.committed().items())
        plans = load_plans(self._backend, header, None)
        held = {shard for shard, _ in pairs}
        missing = [s.shard for p, _ in plans.values() for s in p.shards if s.shard not in held]
        if missing:
            raise CommitError(
                "plan-incomplete",
                "shards of the plan are not committed yet",
                where=self.location,
                got=f"{len(missing)} missing, first {missing[0]}",
                expected="every planned shard",
                hint="run the capture command again, then seal",
                data={"missing": missing},
            )
        commits = load_commits(self._backend, header, pairs, plans)
        index = Index(
            store_uuid=header.store_uuid,
            header_sha256=self._header_sha256,
            created=now(),
            plans=tuple(PlanRef(number=n, sha256=digest) for n, (_, digest) in plans.items()),
            shards=tuple(index_row(commit, digest) for commit, digest in commits),
            samples=sum(commit.samples for commit, _ in commits),
            positions=sum(commit.positions for commit, _ in commits),
            statistics=merge(commit.statistics for commit, _ in commits),
            column_bytes=sum_column_bytes(commit.column_bytes for commit, _ in commits),
        )
        self._backend.create(INDEX_KEY, index.encode(), kind="index")
        present = load_index(self._backend, header, self._header_sha256)
        assert present is not None
        return present

    def _check_tables(self) -> None:
        for table in self.header.tables:
            if self._backend.size(table_key(table.name)) is None:
                raise IntegrityError(
                    "document-missing",
                    "the store was started, but its tables were not written",
                    where=f"{self.location}/{table_key(table.name)}",
                    hint="run the command that started the store again",
                )

    def _mark_writer(self) -> None:
        """Leave a note for other writers, and warn of theirs: the best such a storage allows."""
        others = self._backend.list("writers")
        if others:
            warnings.warn(
                f"{self.location}: the storage ignores conditional writes, and {len(others)} other "
                "writer(s) left a note there; if one still runs, stop it, or shards may be lost",
                SingleWriterWarning,
                stacklevel=4,
            )
        self._marker = f"writers/{secrets.token_hex(_ATTEMPT_BYTES)}"
        self._backend.create(self._marker, now().encode(), kind="header")


class ShardAttempt:
    """One try at one shard, invisible until `commit`; leaving a `with` block before that
    abandons."""

    def __init__(
        self, backend: Backend, header: Header, shard: str, plan: Plan, generation: int
    ) -> None:
        self.shard = shard
        self.attempt = secrets.token_hex(_ATTEMPT_BYTES)
        self._backend = backend
        self._header = header
        self._plan = plan
        self._generation = generation
        kind = ranked(container(header.container), header, partial(load_table, backend, header))
        self._name = f"{shard}.{self.attempt}{kind.suffix}"
        self._object = backend.create_object(object_key(self._name))
        self._writer = kind.writer(self._object.file, header)
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon()

    def add(self, record: Record) -> None:
        """Append one chunk of whole samples.

        Raises: FormatError chunk-malformed; StorageError disk-full, permission-denied,
        storage-failed.
        """
        try:
            self._writer.add(record)
        except OSError as error:
            raise _named(error, self._where()) from error
        step("object", "chunk")

    def commit(
        self,
        *,
        statistics: Statistics,
        quarantined: Iterable[Quarantined] = (),
        notes: Iterable[str] = (),
    ) -> Commit:
        """Make the object durable, then visible.

        Raises: CommitError already-committed when another attempt was first (this one's object is
        removed; `data["same_bytes"]` tells whether both had the same), store-sealed; StorageError.
        """
        try:
            summary = self._writer.finish()
        except OSError as error:
            raise _named(error, self._where()) from error
        size, sha256 = self._object.finish()
        self._open = False
        commit = Commit(
            store_uuid=self._header.store_uuid,
            plan=self._plan.number,
            plan_fingerprint=self._plan.fingerprint,
            shard=self.shard,
            generation=self._generation,
            attempt=self.attempt,
            created=now(),
            writer=software(),
            object=ObjectRef(name=self._name, bytes=size, sha256=sha256),
            samples=summary.samples,
            positions=summary.positions,
            layout=summary.layout,
            chunks=summary.chunks,
            column_bytes=summary.column_bytes,
            statistics=statistics,
            quarantined=tuple(quarantined),
            notes=tuple(notes),
        )
        self._check_object(size)
        _check_not_sealed(self._backend)
        self._publish(commit)
        return commit

    def abandon(self) -> None:
        """Drop what was written; harmless after `commit`."""
        if self._open:
            self._open = False
            self._object.abandon()

    def _check_object(self, size: int) -> None:
        # A worker that slept through `gc --abandoned` must not commit an object that is gone.
        if self._backend.size(object_key(self._name)) != size:
            raise StorageError(
                "storage-failed",
                "the attempt's object was removed before its commit",
                where=self._where(),
                hint="run the same command again; `gc --abandoned` is for times without writers",
            )

    def _publish(self, commit: Commit) -> None:
        key = commit_key(self.shard, self._generation)
        data = commit.encode()
        try:
            created = self._backend.create(key, data, kind="commit")
        except StorageError:
            # The commit may be there all the same, its reply lost or its name not flushed. Creating
            # it again finds it, and flushes its name.
            if not self._is_own(key):
                raise
            created = self._backend.create(key, data, kind="commit")
        if created:
            return
        winner, _ = load_commit(self._backend, self._header, self.shard, self._generation)
        if winner.attempt == self.attempt:
            return
        self._backend.delete(object_key(self._name))
        raise _already_committed(
            f"{self._backend.location}/{key}",
            same_bytes=winner.object.sha256 == commit.object.sha256,
        )

    def _is_own(self, key: str) -> bool:
        try:
            data = self._backend.get(key, limit_bytes=MAX_DOCUMENT_BYTES)
        except StorageError:
            return False
        return data is not None and Commit.decode(data, where=key).attempt == self.attempt

    def _where(self) -> str:
        return f"{self._backend.location}/{object_key(self._name)}"


def _named(error: OSError, where: str) -> StorageError:
    return error if isinstance(error, StorageError) else storage_error(error, where)


def _check_not_sealed(backend: Backend) -> None:
    if backend.size(INDEX_KEY) is not None:
        raise CommitError(
            "store-sealed",
            "the store is sealed and accepts no more shards",
            where=backend.location,
            hint="start another store for more data",
        )


def _already_committed(where: str, same_bytes: bool | None = None) -> CommitError:
    told = {
        None: None,
        True: "an object with the same bytes",
        False: "an object with other bytes",
    }[same_bytes]
    return CommitError(
        "already-committed",
        "another worker committed this shard first",
        where=where,
        got=told,
        hint="nothing is lost: its commit counts, this attempt does not",
        data={} if same_bytes is None else {"same_bytes": same_bytes},
    )


def _same_configuration(
    backend: Backend, present: Header, given: Header, refs: tuple[TableRef, ...]
) -> None:
    # As JSON has it: a tuple that was given compares equal to the list that was stored.
    changes = _diff(present.configuration, json.loads(canonical_json(given.configuration)))
    tables = {t.name: t.sha256 for t in present.tables}
    changes += [
        f"tables/{ref.name}: sha256 {tables.get(ref.name, 'none')} -> {ref.sha256}"
        for ref in refs
        if tables.get(ref.name) != ref.sha256
    ]
    if changes:
        raise CommitError(
            "configuration-changed",
            "the store was started with another configuration:\n    " + "\n    ".join(changes),
            where=backend.location,
            hint="use the old settings to continue it, or another store for the new ones",
            data={"changes": changes},
        )


def _diff(old: Any, new: Any, path: str = "") -> list[str]:
    """One line `key: old -> new` for each difference of two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else key
            if key not in old:
                lines.append(f"{below}: not set -> {json.dumps(new[key])}")
            elif key not in new:
                lines.append(f"{below}: {json.dumps(old[key])} -> not set")
            else:
                lines += _diff(old[key], new[key], below)
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
