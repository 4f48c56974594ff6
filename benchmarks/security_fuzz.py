"""F13: parsers and the application, given what `security_mutations` makes.

    python benchmarks/security_fuzz.py FOLDER TARGET EXECUTIONS SEED [FIRST]   # prints JSON

FOLDER holds the stores of `write_pair`. Each target runs in a process of its own, so that a crash
of a C library is seen and costs the rest nothing. Fine are: an answer, and an error of our own
tree. A crash is every other exception and every death of the process; a hang is an execution of
more than a second of CPU time, or a target that does not end. Input N of a target is the same each
time: FIRST N with EXECUTIONS 1 runs it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from security_mutations import made
from security_stores import framed, write_pair

import logitstore.store
from logitstore.containers import container as container_named
from logitstore.spec.document import read_body
from logitstore.spec.errors import LogitstoreError
from logitstore.spec.export_schemas import DOCUMENTS
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["TARGETS", "fuzz"]

HANG_S = 1.0
_TARGET_LIMIT_S = 3600
_SHAPE = {"size_bytes": 10_000, "etag": "ab" * 32, "media_type": "x/y", "cache_control": "no-cache"}
_RANGES = (
    *("bytes=0-99", "bytes=-1", "bytes=9999-", "bytes=0-0,5-9,-3", "bytes=0-", "bytes = 1-2"),
    *("items=0-1", "bytes=5-1", "bytes=" + ",".join(f"{i}-{i}" for i in range(40)), "bytes=--1"),
)
_TAGS = ("*", f'"{"ab" * 32}"', f'W/"{"ab" * 32}"', '"a", "b"', "gzip;q=0.5, zstd", "*;q=0, br")
_ACCEPTS = (
    *("*/*", "application/json", "application/vnd.apache.arrow.stream; codecs=zstd"),
    *('application/vnd.apache.arrow.stream;codecs="lz4, zstd";q=0.3, text/html', "text/*;q=0.1"),
)
_QUERIES = (
    *("samples?ids=0,1,1&columns=tokens,ids&k=3", "samples?start=1&stop=3&codecs=zstd"),
    *("rows?offset=1&length=2", 'filter?where=[["length",">=",2]]&length=1', "search?query=w1"),
    *("first-rows?columns=tokens", "rows?cursor=WzEsMl0", "statistics", "info", "croissant"),
    *("find?text=w1&measure=entropy&order=sure", "find?token=3&least=0.5&greatest=2e1&skip=1"),
    *("samples/0?position=3", "samples/1/kept.json?first=0&count=4", "overview", "find?key=docs"),
)
_CONDITIONS = (
    '[["length",">=",2]]',
    '[["entropy.mean",">",0.5],["sample_key","in",["docs/1.txt"]]]',
    '[["labels","not in",[1,2]],["tokens.max","==",3],["sample_key","!=","x"]]',
)


@dataclass(frozen=True)
class Target:
    """What is given what.

    Attributes:
        subject: for the report: "manifest", "shard", "query", "range", "cursor", "arrow".
        executions: of the full run.
        build: from the folder of `write_pair`, real inputs and what takes one.
    """

    subject: str
    executions: int
    build: Callable[[Path], tuple[list[bytes], Callable[[bytes], object]]]
    is_json: bool = False


def _document(name: str, pattern: str) -> Callable[[Path], Any]:
    def build(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        files = [path for store in ("alpha", "beta") for path in (folder / store).glob(pattern)]
        bodies = [read_body(path.read_bytes(), where="") for path in files]
        model = DOCUMENTS[name]

        def run(body: bytes) -> None:
            document = model.decode(framed(body), where="fuzz")
            again = model.decode(document.encode(), where="again")
            assert again == document, "encoded and decoded, it is another document"

        return bodies, run

    return build


def _frames(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    files = [p.read_bytes() for p in sorted((folder / "alpha").rglob("*.json"))]

    def run(data: bytes) -> None:
        for model in DOCUMENTS.values():
            try:
                model.decode(data, where="fuzz")
            except LogitstoreError:
                continue

    return files, run


def _table(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    files = [path.read_bytes() for path in (folder / "alpha" / "tables").iterdir()]
    return files, lambda data: TokenizerTable.decode(data, where="fuzz")


def _chunk(store_name: str) -> Callable[[Path], Any]:
    """A chunk whose checksum is right, since whoever writes a store writes that too."""

    def build(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        opened = logitstore.store.open(folder / store_name)
        commit, header = opened.commit(0), opened.header
        container = container_named(header.container)
        data = _object(opened)
        chunks = [data[r.offset : r.offset + r.bytes] for r in commit.chunks[:1]]

        def run(part: bytes) -> None:
            row = commit.chunks[0].model_copy(update={"bytes": len(part)})
            changed = commit.model_copy(update={"chunks": (row,)})
            container.decode(part, header, changed, 0, verified=True)

        return chunks, run

    return build


def _directory(store_name: str) -> Callable[[Path], Any]:
    """A whole object: ZIP directory and zarr.json, or Arrow schema and footer."""

    def build(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        opened = logitstore.store.open(folder / store_name)
        commit, header = opened.commit(0), opened.header
        container = container_named(header.container)
        data, cut = _object(opened), max(row.offset + row.bytes for row in commit.chunks)

        def run(rest: bytes) -> None:
            container.validate_object(io.BytesIO(data[:cut] + rest), header, commit)

        return [data[cut:]], run

    return build


def _object(opened: Store) -> bytes:
    return (Path(opened.location.path) / "shards" / opened.shards[0].object).read_bytes()


def _range_headers(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from logitstore_server.conditional import Representation, accepted_coding, answer

    shape = Representation(**_SHAPE)  # type: ignore[arg-type]
    names = (b"range", b"if-range", b"if-none-match", b"if-match")
    seeds = [f"{ranges}\x01{tag}".encode() for ranges in _RANGES for tag in ("", *_TAGS)]

    def run(data: bytes) -> None:
        ranges, _, other = data.decode("latin-1").partition("\x01")
        headers = {b"range": ranges}
        if other:
            headers[names[1 + len(other) % 3]] = other
        found = answer(shape, headers, max_ranges=16)
        pieces = [part for part in found.parts if isinstance(part, tuple)]
        assert all(0 <= start < stop <= 10_000 for start, stop in pieces), pieces
        assert sum(stop - start for start, stop in pieces) <= 10_000, pieces
        accepted_coding(other, ("zstd", "gzip"))

    return seeds, run


def _accept_headers(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from logitstore_server.conditional import accepted_coding
    from logitstore_server.samples import _negotiate

    def run(data: bytes) -> None:
        text = data.decode("latin-1")
        _negotiate(text)
        accepted_coding(text, ("zstd", "gzip"))

    return [text.encode() for text in (*_ACCEPTS, *_TAGS)], run


def _cursors(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from logitstore_server.cursors import make_cursor, read_cursor

    opened = _registry(folder)
    real = make_cursor(opened, ["rows"], 3)
    content = base64.urlsafe_b64decode(real + "=" * (-len(real) % 4))

    def run(data: bytes) -> None:
        # Half as text, half as what the text stands for.
        text = data.decode("latin-1")
        if data[:1] == b"[":
            text = base64.urlsafe_b64encode(data).decode().rstrip("=")
        found = read_cursor(text, opened, ["rows"])
        assert type(found) is int, found

    return [real.encode(), content], run


def _conditions(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from logitstore_server.rows import _selection

    header = _registry(folder).store.header
    return [text.encode() for text in _CONDITIONS], lambda data: _selection(
        data.decode("utf-8", "replace"), header
    )


def _registry(folder: Path) -> Any:
    from logitstore_server.settings import StoreEntry
    from logitstore_server.stores import ServedStore

    return ServedStore(StoreEntry(name="alpha", location=str(folder / "alpha"))).opened()


def _requests(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    """Queries and paths, through the whole application, viewer included; 5xx is a crash."""
    import structlog

    from logitstore_server.app import create_app
    from logitstore_server.secure import secure
    from logitstore_server.settings import ServerSettings

    stores = tuple(f"{name}={folder / name}" for name in ("alpha", "beta"))
    settings = ServerSettings(stores=stores, log_level="error")
    app = secure(create_app(settings), settings)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    loop = asyncio.new_event_loop()

    async def ask(data: bytes) -> int:
        path, _, query = data.partition(b"?")
        root = b"/stores/" if path[:8] in (b"find", b"overview") or b"/" in path else b"/v1/stores/"
        raw = root + b"alpha/" + path
        statuses: list[int] = []
        asked = iter([True])

        async def receive() -> dict[str, Any]:
            if not next(asked, False):
                await asyncio.Future()  # a client that stays
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": raw.decode("latin-1"),
            "raw_path": raw,
            # As a server hands it on: visible ASCII.
            "query_string": quote_from_bytes(query, safe="=&%+,;[]{}\"'<>:!@$*()/?-._~").encode(),
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"accept", b"*/*")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        await app(scope, receive, send)
        return statuses[0]

    def run(data: bytes) -> None:
        status = loop.run_until_complete(ask(data))
        assert status < 500, f"answered {status}"

    return [text.encode() for text in _QUERIES], run


TARGETS = {
    "header": Target("manifest", 80_000, _document("header", "store.json"), True),
    "plan": Target("manifest", 80_000, _document("plan", "plans/*"), True),
    "commit": Target("manifest", 80_000, _document("commit", "commits/*"), True),
    "index": Target("manifest", 80_000, _document("index", "index.json"), True),
    "frames": Target("manifest", 80_000, _frames),
    "tokenizer table": Target("manifest", 60_000, _table, True),
    "zarr chunk": Target("shard header", 80_000, _chunk("alpha")),
    "zip directory, zarr.json": Target("shard header", 30_000, _directory("alpha")),
    "arrow chunk": Target("Arrow from outside", 100_000, _chunk("beta")),
    "arrow schema, footer": Target("Arrow from outside", 60_000, _directory("beta")),
    "range, conditions": Target("range header", 200_000, _range_headers),
    "accept, codings": Target("range header", 60_000, _accept_headers),
    "cursor": Target("cursor", 100_000, _cursors),
    "filter conditions": Target("query", 60_000, _conditions, True),
    "requests": Target("query", 30_000, _requests),
}


def fuzz(folder: Path, seed: int, *, tiny: bool) -> dict[str, Any]:
    """Every target, as many at a time as there are cores."""
    write_pair(folder)
    chosen = ("header", "arrow chunk") if tiny else tuple(TARGETS)

    def one(name: str) -> dict[str, Any]:
        count = 50 if tiny else TARGETS[name].executions
        return {"target": name, "subject": TARGETS[name].subject, **_own(folder, name, count, seed)}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(one, chosen))
    return {
        "seed": seed,
        "rows": rows,
        "executions": sum(row["executions"] for row in rows),
        "crashes": sum(row["crashes"] for row in rows),
        "hangs": sum(row["hangs"] for row in rows),
    }


def _own(folder: Path, name: str, count: int, seed: int) -> dict[str, Any]:
    """A target in a process of its own."""
    progress = folder / f"progress-{list(TARGETS).index(name)}"
    words = (str(folder), name, str(count), str(seed), "0", str(progress))
    try:
        done = subprocess.run(
            [sys.executable, __file__, *words],
            capture_output=True,
            text=True,
            timeout=_TARGET_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _died(progress, "hangs", f"did not end in {_TARGET_LIMIT_S} s")
    if done.returncode:
        what = f"process ended with {done.returncode}: {done.stderr[-400:]}"
        return _died(progress, "crashes", what)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _died(progress: Path, how: str, what: str) -> dict[str, Any]:
    number = int(progress.read_text() or 0) if progress.exists() else 0
    none = {"executions": number, "crashes": 0, "hangs": 0, "accepted": 0, "kinds": {}}
    return {**none, how: 1, "found": [{"number": number, "what": what}]}


def run_target(
    folder: Path, name: str, count: int, seed: int, first: int = 0, progress: Path | None = None
) -> dict[str, Any]:
    """Inputs `first` to `first + count` of a target, here."""
    target = TARGETS[name]
    kinds: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    crashes = hangs = accepted = 0
    slowest_s = 0.0
    seeds, run = target.build(folder)
    for number, data in _inputs(seeds, seed, first, count, progress, is_json=target.is_json):
        start_s = time.process_time()
        try:
            run(data)
            accepted += 1
        except LogitstoreError as error:
            kinds[error.kind] += 1
        except Exception as error:
            crashes += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {where.name}: {str(error)[:200]}"
            found.append({"number": number, "what": what})
        took_s = time.process_time() - start_s
        slowest_s = max(slowest_s, took_s)
        if took_s > HANG_S:
            hangs += 1
            found.append({"number": number, "what": f"took {took_s:.1f} s"})
    return {
        "executions": count,
        "accepted": accepted,
        "kinds": dict(kinds),
        "crashes": crashes,
        "hangs": hangs,
        "slowest_ms": slowest_s * 1e3,
        "found": found[:20],
    }


def _inputs(
    seeds: list[bytes], seed: int, first: int, count: int, progress: Path | None, *, is_json: bool
) -> Iterator[tuple[int, bytes]]:
    told = None if progress is None else progress.open("w")
    for number in range(first, first + count):
        if told is not None:
            told.seek(0)
            told.write(str(number))
            told.flush()
        yield number, made(seeds, seed, number, is_json=is_json)


def main() -> None:
    folder, name, count, seed, *rest = sys.argv[1:]
    first = int(rest[0]) if rest else 0
    progress = Path(rest[1]) if rest[1:] else None
    print(json.dumps(run_target(Path(folder), name, int(count), int(seed), first, progress)))


if __name__ == "__main__":
    main()
