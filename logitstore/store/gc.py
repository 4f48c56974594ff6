"""Removing what no reader can need: plan first, then delete."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from logitstore.spec.errors import StorageError
from logitstore.store.backend import Backend, Entry
from logitstore.store.connect import connect
from logitstore.store.documents import (
    commit_key,
    list_commits,
    load_commit,
    load_header,
    load_index,
    parse_object_name,
)
from logitstore.store.local import is_temporary
from logitstore.store.location import Location

__all__ = ["DEFAULT_GRACE_S", "Deletion", "GcPlan", "gc"]

# Longer than a reader pins a snapshot (an epoch) and than a worker works on a shard.
DEFAULT_GRACE_S = 24 * 3600.0

# Where unfinished writes leave temporary names, and what only writers use.
_FOLDERS = ("", "tables", "plans", "commits", "shards")
_WRITERS_ONLY = ("probes", "writers")


@dataclass(frozen=True)
class Deletion:
    """One file to delete, and why: losing-attempt, superseded, abandoned-attempt or leftover."""

    key: str
    bytes: int
    age_s: float
    reason: str


@dataclass(frozen=True)
class GcPlan:
    """What `gc` deletes or has deleted.

    Attributes:
        deletions: in the order of deletion.
        kept_young: files that qualify but are younger than the grace period.
        kept_unfinished: objects of shards without a commit, kept unless `abandoned`.
        done: whether the deletions were made.
    """

    deletions: tuple[Deletion, ...]
    kept_young: int
    kept_unfinished: int
    done: bool

    @property
    def bytes(self) -> int:
        """Bytes of all deletions."""
        return sum(deletion.bytes for deletion in self.deletions)


def gc(
    location: str | os.PathLike[str] | Location,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    abandoned: bool = False,
    dry_run: bool = True,
) -> GcPlan:
    """Find, and unless `dry_run` delete, what no commit of the newest snapshot refers to.

    Objects of the highest generation of every shard, and of every commit an index names, are never
    touched. Readers that pinned an older generation are given the grace period after it was
    replaced.

    Args:
        grace_s: spare files younger than this; for a superseded generation, the age of its
        successor. abandoned: also delete objects of shards that nobody committed. A worker that
        still writes one
            would have to start it again: only for stores without running writers.

    Raises: NotFoundError not-a-store; StorageError; IntegrityError, FormatError for damaged
    documents, since nothing may be deleted on their word.
    """
    backend = connect(location)
    if backend.location.kind == "http":
        raise StorageError(
            "permission-denied", "a plain HTTP server cannot be written", where=backend.location
        )
    planner = _Planner(backend, grace_s)
    planner.plan(abandoned)
    if not dry_run:
        for deletion in planner.deletions:
            backend.delete(deletion.key)
    return GcPlan(
        tuple(planner.deletions), planner.kept_young, planner.kept_unfinished, not dry_run
    )


class _Planner:
    def __init__(self, backend: Backend, grace_s: float) -> None:
        self.backend = backend
        self.grace_s = grace_s
        self.now_s = time.time()
        self.deletions: list[Deletion] = []
        self.kept_young = 0
        self.kept_unfinished = 0

    def plan(self, abandoned: bool) -> None:
        backend = self.backend
        # Objects are listed before commits: an object that a later commit refers to is then
        # either not in this list or in the commits.
        objects = [e for e in backend.list("shards") if parse_object_name(_name(e))]
        header, header_sha256 = load_header(backend)
        index = load_index(backend, header, header_sha256)
        pinned = set() if index is None else {(r.shard, r.generation) for r in index.shards}
        commit_entries = {e.key: e for e in backend.list("commits")}
        committed = list_commits(backend)
        keep: set[str] = set()
        superseded: dict[str, tuple[Entry, Entry]] = {}
        for shard, generations in committed.items():
            for number, generation in enumerate(generations):
                commit, _ = load_commit(backend, header, shard, generation)
                last = number == len(generations) - 1
                entry = commit_entries.get(commit_key(shard, generation))
                if last or (shard, generation) in pinned or entry is None:
                    keep.add(commit.object.name)
                    continue
                newer = commit_entries.get(commit_key(shard, generations[number + 1]))
                if newer is None:
                    keep.add(commit.object.name)
                else:
                    superseded[commit.object.name] = (entry, newer)
        for entry in objects:
            name = _name(entry)
            parsed = parse_object_name(name)
            if name in keep or parsed is None:
                continue
            if name in superseded:
                commit_entry, newer = superseded[name]
                # The document first: without its object it would be damage.
                self.consider(commit_entry, "superseded", since_s=newer.modified_s)
                self.consider(entry, "superseded", since_s=newer.modified_s)
            elif parsed[0] in committed:
                self.consider(entry, "losing-attempt")
            elif abandoned:
                self.consider(entry, "abandoned-attempt")
            else:
                self.kept_unfinished += 1
        self.plan_leftovers()

    def plan_leftovers(self) -> None:
        for folder in _FOLDERS:
            for entry in self.backend.list(folder):
                if is_temporary(_name(entry)):
                    self.consider(entry, "leftover")
        for folder in _WRITERS_ONLY:
            for entry in self.backend.list(folder):
                self.consider(entry, "leftover")

    def consider(self, entry: Entry, reason: str, *, since_s: float | None = None) -> None:
        since_s = entry.modified_s if since_s is None else max(since_s, entry.modified_s)
        # A clock that went backwards makes files younger, never older.
        age_s = max(0.0, self.now_s - since_s)
        if age_s < self.grace_s:
            self.kept_young += 1
        else:
            self.deletions.append(Deletion(entry.key, entry.size_bytes, age_s, reason))


def _name(entry: Entry) -> str:
    return entry.key.rpartition("/")[2]
