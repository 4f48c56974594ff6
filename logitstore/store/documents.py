"""Names and documents of a store: where each is, and that it belongs there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from logitstore.spec.commit import Commit
from logitstore.spec.document import MAX_DOCUMENT_BYTES, read_body, sha256_hex
from logitstore.spec.errors import IntegrityError, LogitstoreError, NotFoundError
from logitstore.spec.header import Header
from logitstore.spec.index import Index, IndexRow
from logitstore.spec.plan import Plan
from logitstore.store.backend import ReadBackend

__all__ = [
    "COMMITS_FOLDER",
    "HEADER_KEY",
    "INDEX_KEY",
    "commit_key",
    "index_row",
    "list_commits",
    "list_plans",
    "load_commit",
    "load_commits",
    "load_header",
    "load_index",
    "load_plan",
    "load_plans",
    "load_table",
    "object_key",
    "parse_object_name",
    "plan_key",
    "table_key",
]

HEADER_KEY = "store.json"
INDEX_KEY = "index.json"
COMMITS_FOLDER = "commits"

# Requests in flight while many small documents are fetched from a remote store.
_FETCH_THREADS = 16

_COMMIT_NAME = re.compile(r"([0-9]{4}-[0-9]{6})\.([1-9][0-9]{0,3})\.json")
_PLAN_NAME = re.compile(r"([0-9]{6})\.json")
_OBJECT_NAME = re.compile(r"([0-9]{4}-[0-9]{6})\.([0-9a-f]{8,32})\.(?:zarr\.zip|arrow)")


def commit_key(shard: str, generation: int) -> str:
    """Key of a commit."""
    return f"{COMMITS_FOLDER}/{shard}.{generation}.json"


def plan_key(number: int) -> str:
    """Key of a plan."""
    return f"plans/{number:06d}.json"


def object_key(name: str) -> str:
    """Key of a shard's object."""
    return f"shards/{name}"


def table_key(name: str) -> str:
    """Key of a table."""
    return f"tables/{name}"


def parse_object_name(name: str) -> tuple[str, str] | None:
    """(shard, attempt) of an object's name, None for any other name."""
    match = _OBJECT_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def list_commits(backend: ReadBackend) -> dict[str, list[int]]:
    """shard -> its generations in ascending order, by name only; other files are ignored."""
    found: dict[str, list[int]] = {}
    for entry in backend.list(COMMITS_FOLDER):
        match = _COMMIT_NAME.fullmatch(entry.key.rpartition("/")[2])
        if match:
            found.setdefault(match[1], []).append(int(match[2]))
    return {shard: sorted(generations) for shard, generations in sorted(found.items())}


def list_plans(backend: ReadBackend) -> list[int]:
    """Numbers of the plans in ascending order, by name only."""
    names = (entry.key.rpartition("/")[2] for entry in backend.list("plans"))
    return sorted(int(m[1]) for m in map(_PLAN_NAME.fullmatch, names) if m)


def load_header(backend: ReadBackend) -> tuple[Header, str]:
    """The header and the SHA-256 of its body.

    Raises: NotFoundError not-a-store; FormatError; IntegrityError document-hash-mismatch.
    """
    where = _where(backend, HEADER_KEY)
    data = backend.get(HEADER_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
    if data is None:
        raise NotFoundError(
            "not-a-store",
            "no store here",
            where=backend.location,
            expected=f"a folder or prefix that holds {HEADER_KEY}",
        )
    header = Header.decode(data, where=where)
    return header, sha256_hex(read_body(data, where=where))


def load_index(backend: ReadBackend, header: Header, header_sha256: str) -> Index | None:
    """The index of a sealed store, None for one that is not sealed.

    Raises: FormatError; IntegrityError document-hash-mismatch, document-mismatch.
    """
    data = backend.get(INDEX_KEY, limit_bytes=MAX_DOCUMENT_BYTES)
    if data is None:
        return None
    where = _where(backend, INDEX_KEY)
    index = Index.decode(data, where=where)
    _same(where, "store_uuid", index.store_uuid, header.store_uuid)
    _same(where, "header_sha256", index.header_sha256, header_sha256)
    return index


def load_plan(
    backend: ReadBackend, header: Header, number: int, *, sha256: str | None = None
) -> tuple[Plan, str]:
    """A plan and the SHA-256 of its body, which must be `sha256` when that is given.

    Raises: FormatError; IntegrityError document-missing, document-hash-mismatch, document-mismatch.
    """
    key = plan_key(number)
    data, where = _required(backend, key)
    plan = Plan.decode(data, where=where)
    digest = sha256_hex(read_body(data, where=where))
    if sha256 is not None:
        _same(where, "sha256", digest, sha256)
    _same(where, "store_uuid", plan.store_uuid, header.store_uuid)
    _same(where, "number", plan.number, number)
    _same(where, "configuration_sha256", plan.configuration_sha256, header.configuration_sha256)
    return plan, digest


def load_plans(
    backend: ReadBackend, header: Header, index: Index | None
) -> dict[int, tuple[Plan, str]]:
    """number -> (plan, SHA-256), in ascending order: those of the index, or all that are listed."""
    if index is not None:
        return {
            p.number: load_plan(backend, header, p.number, sha256=p.sha256) for p in index.plans
        }
    return {number: load_plan(backend, header, number) for number in list_plans(backend)}


def load_commit(
    backend: ReadBackend,
    header: Header,
    shard: str,
    generation: int,
    *,
    sha256: str | None = None,
    plans: Mapping[int, tuple[Plan, str]] | None = None,
) -> tuple[Commit, str]:
    """A commit and the SHA-256 of its body.

    Args:
        sha256: what a sealed store's index says about it.
        plans: of an unsealed store; the commit must carry the fingerprint of one of them.

    Raises: FormatError; IntegrityError document-missing, document-hash-mismatch, document-mismatch,
    index-mismatch.
    """
    key = commit_key(shard, generation)
    data, where = _required(backend, key)
    commit = Commit.decode(data, where=where)
    digest = sha256_hex(read_body(data, where=where))
    _same(where, "store_uuid", commit.store_uuid, header.store_uuid)
    _same(where, "shard", commit.shard, shard)
    _same(where, "generation", commit.generation, generation)
    _same(where, "plan", commit.plan, int(shard.partition("-")[0]))
    if sha256 is not None and digest != sha256:
        raise IntegrityError(
            "index-mismatch",
            "commit is not the one the index names",
            where=where,
            got=digest,
            expected=sha256,
        )
    if plans is not None:
        if commit.plan not in plans:
            raise IntegrityError(
                "document-missing",
                "commit belongs to a plan that is not there",
                where=where,
                expected=plan_key(commit.plan),
            )
        plan = plans[commit.plan][0]
        _same(where, "plan_fingerprint", commit.plan_fingerprint, plan.fingerprint)
        if plan.kind == "corpus" and shard not in {s.shard for s in plan.shards}:
            raise _mismatch(where, "shard", shard, f"a shard of plan {plan.number}")
    suffix = ".zarr.zip" if header.container == "zarr" else ".arrow"
    if not commit.object.name.endswith(suffix):
        raise _mismatch(where, "object.name", commit.object.name, f"a name ending in {suffix}")
    return commit, digest


def load_commits(
    backend: ReadBackend,
    header: Header,
    pairs: Iterable[tuple[str, int]],
    plans: Mapping[int, tuple[Plan, str]],
) -> list[tuple[Commit, str]]:
    """Commits of (shard, generation) pairs, in their order, fetched side by side when remote."""

    def load(pair: tuple[str, int]) -> tuple[Commit, str]:
        return load_commit(backend, header, *pair, plans=plans)

    if backend.location.kind == "local":
        return [load(pair) for pair in pairs]
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        return list(pool.map(load, pairs))


def load_table(backend: ReadBackend, header: Header, name: str) -> bytes:
    """A table's bytes, compared with the header.

    Raises: NotFoundError table-not-found; IntegrityError document-missing, table-hash-mismatch.
    """
    ref = next((t for t in header.tables if t.name == name), None)
    if ref is None:
        raise NotFoundError(
            "table-not-found",
            "the store has no such table",
            where=backend.location,
            got=name,
            expected=", ".join(t.name for t in header.tables) or "none: this store has no tables",
        )
    data, where = _required(backend, table_key(name), sha256=ref.sha256)
    if len(data) != ref.bytes or sha256_hex(data) != ref.sha256:
        raise IntegrityError(
            "table-hash-mismatch",
            "table is not the one the header names",
            where=where,
            got=f"{len(data)} bytes, sha256 {sha256_hex(data)}",
            expected=f"{ref.bytes} bytes, sha256 {ref.sha256}",
        )
    return data


def index_row(commit: Commit, sha256: str) -> IndexRow:
    """What the index keeps of a commit."""
    return IndexRow(
        shard=commit.shard,
        generation=commit.generation,
        commit_sha256=sha256,
        object=commit.object.name,
        object_bytes=commit.object.bytes,
        object_sha256=commit.object.sha256,
        samples=commit.samples,
        positions=commit.positions,
    )


def _required(backend: ReadBackend, key: str, *, sha256: str | None = None) -> tuple[bytes, str]:
    where = _where(backend, key)
    data = backend.get(key, limit_bytes=MAX_DOCUMENT_BYTES, sha256=sha256)
    if data is None:
        raise IntegrityError(
            "document-missing",
            "a file the store refers to is not there",
            where=where,
            hint="restore it from a copy; `logitstore verify` lists all damage",
        )
    return data, where


def _where(backend: ReadBackend, key: str) -> str:
    return f"{backend.location}/{key}"


def _same(where: str, field: str, got: object, expected: object) -> None:
    if got != expected:
        raise _mismatch(where, field, got, expected)


def _mismatch(where: str, field: str, got: object, expected: object) -> LogitstoreError:
    return IntegrityError(
        "document-mismatch",
        f"{field} says that this document belongs elsewhere",
        where=where,
        got=got,
        expected=expected,
        hint="documents were swapped or copied between names or stores; restore them from a copy",
    )
