"""A store's files, as a static file server would send them: the reader cannot tell the difference.

    GET /v1/stores/NAME/store.json              header             no-cache
    GET /v1/stores/NAME/index.json              index              no-cache
    GET /v1/stores/NAME/plans|commits|tables/…  documents          immutable
    GET /v1/stores/NAME/shards/…                shard objects      immutable

The index of a store that is not sealed is made up from its commits, so a store can be trained from
over HTTP while it is being captured. ETags are the content hashes that header, index and commits
hold. Shards are read only under names that a commit holds.
"""

from __future__ import annotations

import re

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from logitstore.spec.commit import ObjectRef
from logitstore.spec.errors import NotFoundError
from logitstore.store.documents import HEADER_KEY, INDEX_KEY, object_key
from logitstore.store.local import LocalBackend
from logitstore_server.conditional import (
    Answer,
    Representation,
    accepted_coding,
    answer,
    header_map,
)
from logitstore_server.routing import add_file_route, registry_of, settings_of
from logitstore_server.sending import Read, send_answer, send_file, sends_files
from logitstore_server.stores import CODINGS, Document, ServedStore

__all__ = ["SHARDS_ROUTE", "add_routes", "object_answer"]

_JSON = "application/json"
_BINARY = "application/octet-stream"
_ZIP = "application/zip"
_ARROW_FILE = "application/vnd.apache.arrow.file"

SHARDS_ROUTE = "/v1/stores/{store}/shards/{name}"
# What a path may name below a store, as the format has it; anything else is not looked for.
_DOCUMENT = {
    "plans": re.compile(r"[0-9]{6}\.json"),
    "commits": re.compile(r"[0-9]{4}-[0-9]{6}\.[1-9][0-9]{0,3}\.json"),
}


class _FileResponse(Response):
    """An answer whose body is read while it is sent."""

    def __init__(self, answer: Answer, read: Read, *, waits: bool) -> None:
        self._answer = answer
        self._read = read
        self._waits = waits
        self.status_code = answer.status
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_answer(self._answer, self._read, scope, receive, send, waits=self._waits)


class _ObjectResponse(Response):
    """A shard object, or parts of one."""

    def __init__(self, served: ServedStore, ref: ObjectRef, answer: Answer) -> None:
        self._served, self._ref, self._answer = served, ref, answer
        self.status_code = answer.status
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        backend, key, size = self._served.backend, object_key(self._ref.name), self._ref.bytes
        if isinstance(backend, LocalBackend) and scope["method"] == "GET" and sends_files(scope):
            file = backend.open_object(key, size_bytes=size)
            await send_file(self._answer, file, receive, send)
            return

        def read(start: int, stop: int) -> memoryview:
            return backend.get_range(key, start, stop - start, size_bytes=size)

        await send_answer(self._answer, read, scope, receive, send, waits=not self._served.local)


def add_routes(app: FastAPI) -> None:
    """Add the routes of stores' files."""
    at = "/v1/stores/{store}"
    # The most asked for comes first: routes are tried in order.
    add_file_route(app, SHARDS_ROUTE, shard, media_types=[_ZIP, _ARROW_FILE], immutable=True)
    add_file_route(app, f"{at}/{HEADER_KEY}", header, media_types=[_JSON], immutable=False)
    add_file_route(app, f"{at}/{INDEX_KEY}", index, media_types=[_JSON], immutable=False)
    add_file_route(app, f"{at}/commits/{{name}}", commit, media_types=[_JSON], immutable=True)
    add_file_route(app, f"{at}/plans/{{name}}", plan, media_types=[_JSON], immutable=True)
    add_file_route(
        app, f"{at}/tables/{{name}}", table, media_types=[_JSON, _BINARY], immutable=True
    )


async def shard(request: Request) -> Response:
    """One shard's object: the chunks of its samples, each in a contiguous range.

    Single, open-ended and suffix ranges, several ranges up to the service's cap, If-Range,
    If-Match and If-None-Match. The ETag is the object's SHA-256.
    """
    served = _served(request)
    name = request.path_params["name"]
    ref = served.known_object(name)
    if ref is None:
        ref = await run_in_threadpool(served.find_object, name)
    found = object_answer(served, ref, request.scope, settings_of(request).max_ranges)
    return _ObjectResponse(served, ref, found)


async def header(request: Request) -> Response:
    """The store's header: what it holds and how. Sent compressed to clients that accept it."""
    served = _served(request)
    _, document = await run_in_threadpool(served.header)
    return await _document(request, served, document, immutable=False)


async def index(request: Request) -> Response:
    """One row for each shard.

    For a store that is still being captured: what its index would be if it were sealed now.
    """
    served = _served(request)
    opened = await run_in_threadpool(served.opened, max_age_s=0.0)
    return await _document(request, served, opened.document, immutable=False)


async def commit(request: Request) -> Response:
    """One shard's commit: object, chunk table, statistics."""
    return await _named(request, "commits")


async def plan(request: Request) -> Response:
    """One plan: the list of shards that a capture produces."""
    return await _named(request, "plans")


async def table(request: Request) -> Response:
    """One table, such as the bytes of the tokenizer's ids."""
    served = _served(request)
    name = request.path_params["name"]
    document = await run_in_threadpool(served.document, f"tables/{name}")
    media_type = _JSON if name.endswith(".json") else _BINARY
    return await _document(request, served, document, immutable=True, media_type=media_type)


async def _named(request: Request, folder: str) -> Response:
    served = _served(request)
    name = request.path_params["name"]
    if not _DOCUMENT[folder].fullmatch(name):
        raise NotFoundError("file-not-found", "the store has no such file")
    document = await run_in_threadpool(served.document, f"{folder}/{name}")
    return await _document(request, served, document, immutable=True)


async def _document(
    request: Request,
    served: ServedStore,
    document: Document,
    *,
    immutable: bool,
    media_type: str = _JSON,
) -> Response:
    headers = header_map(request.scope)
    # Ranges are of the plain bytes: a part of a compressed file is of no use to a client.
    offered = () if b"range" in headers else CODINGS
    coding = accepted_coding(headers.get(b"accept-encoding"), offered)
    if coding:
        document = await run_in_threadpool(served.encoded, document, coding)
    shape = Representation(
        size_bytes=len(document.data),
        etag=document.etag,
        media_type=media_type,
        cache_control=served.cache_control(immutable=immutable),
        coding=document.coding,
        varies=True,
    )
    data = memoryview(document.data)
    return _FileResponse(_answer(request, shape), lambda start, stop: data[start:stop], waits=False)


def _served(request: Request) -> ServedStore:
    return registry_of(request).get(request.path_params["store"])


def _answer(request: Request, shape: Representation) -> Answer:
    max_ranges = settings_of(request).max_ranges
    return answer(shape, header_map(request.scope), max_ranges=max_ranges)


def object_answer(served: ServedStore, ref: ObjectRef, scope: Scope, max_ranges: int) -> Answer:
    shape = Representation(
        size_bytes=ref.bytes,
        etag=ref.sha256,
        media_type=_ZIP if ref.name.endswith(".zip") else _ARROW_FILE,
        cache_control=served.cache_control(immutable=True),
    )
    return answer(shape, header_map(scope), max_ranges=max_ranges)
