"""The short way of what training asks for: one range of a known object, by a plain request.

For such a request the parser, the chain of `secure` and the application take ten times as long as
the system takes to send the bytes. Here its parts are asked directly for what they would decide,
most of it once for a connection, and the answer is given to the socket at once. Nothing is refused
here: a request that is not plain in every respect (another header, a key not seen yet, a full
service, a reader that is behind) is left to the chain, which then decides, counts and answers it as
any other.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from logitstore.spec.commit import ObjectRef
from logitstore.spec.errors import IntegrityError, LogitstoreError
from logitstore.store.documents import object_key
from logitstore.store.local import LocalBackend
from logitstore_server.access import Access, visible_stores
from logitstore_server.admission import HostNames, Limits
from logitstore_server.auth import Authentication
from logitstore_server.files import SHARDS_ROUTE, object_answer
from logitstore_server.keys import Key
from logitstore_server.logs import Answered
from logitstore_server.metrics import count_damage
from logitstore_server.observation import Observation, new_request_id, report
from logitstore_server.outlet import Outlet
from logitstore_server.security_headers import SecurityHeaders
from logitstore_server.settings import STORE_NAME
from logitstore_server.stores import Registry, ServedStore

__all__ = ["Express", "Lane"]

# What a client may leave in memory while it does not read.
_MAX_BYTES = 1 << 20
# Stricter than a parser has to be, so that no parser could understand anything else.
_LINE = re.compile(
    rf"GET (/v1/stores/({STORE_NAME})/shards/([A-Za-z0-9._-]+)) HTTP/1\.1(?=\r\n)".encode()
)
_RANGE = re.compile(rb"\r\n[Rr]ange: bytes=(\d{1,18})-(\d{1,18})(?=\r\n)")
_HEADERS = re.compile(rb"(?:\r\n[A-Za-z-]+: [!-~](?:[ -~]*[!-~])?)*\r\n\r\n")
# Each at most once. Every other one is somebody's wish that the chain knows of.
_PLAIN_HEADERS = frozenset(
    {b"host", b"user-agent", b"accept", b"accept-encoding", b"authorization"}
)
_OWN_HEADERS = (b"content-range", b"content-length")
# Objects whose constant headers are kept.
_MAX_HELD = 10_000

_log: Any = structlog.get_logger("logitstore_server")


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who asks on a connection, by the headers of a request without its range."""

    headers: bytes
    access: Access
    key: Key | None


@dataclass(slots=True)
class _Held:
    """An object that has been asked for: where it is, and the headers of each part of it.

    Attributes:
        descriptor: of its file when it was asked for last; the file may have been closed since.
    """

    store: str
    path: str
    backend: LocalBackend
    key: str
    size_bytes: int
    headers: bytes
    descriptor: int = -1


class Express:
    """ASGI middleware around the whole chain, with a `lane` for each `GuardedProtocol`."""

    def __init__(
        self,
        app: ASGIApp,
        inner: ASGIApp,
        *,
        hosts: HostNames,
        headers: SecurityHeaders,
        authentication: Authentication,
        limits: Limits,
        observation: Observation,
    ) -> None:
        self._app = app
        self._hosts, self._headers = hosts, headers
        self._held: dict[bytes, _Held] = {}
        self.authentication, self.limits, self.observation = authentication, limits, observation
        self.registry: Registry | None = (
            inner.state.registry if isinstance(inner, FastAPI) else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def caller(self, headers: bytes, address: tuple[str, int] | None) -> _Caller | None:
        """Who asks; None where the chain has to find out."""
        if not _HEADERS.fullmatch(headers):
            return None
        pairs = [line.partition(b": ")[::2] for line in headers.split(b"\r\n")[1:-2]]
        given = {name.lower(): value for name, value in pairs}
        if len(given) < len(pairs) or not given.keys() <= _PLAIN_HEADERS:
            return None
        scope = {"headers": list(given.items()), "client": address, "path": ""}
        found = self.authentication.plain_access(scope)
        return _Caller(headers, *found) if found and self._hosts.allows(scope) else None

    def held(self, line: re.Match[bytes], access: Access) -> _Held | None:
        """The object that a request's line names, if this caller may know of it."""
        found = self._held.get(line[1])
        if found is not None:
            return found if access.may_read(found.store) else None
        if self.registry is None:
            return None
        token = visible_stores.set(access.stores)
        try:
            served = self.registry.get(line[2].decode())
        except LogitstoreError:
            return None
        finally:
            visible_stores.reset(token)
        ref = served.known_object(line[3].decode())
        if ref is None or not isinstance(served.backend, LocalBackend):
            return None
        path, key = line[1].decode(), object_key(ref.name)
        if len(self._held) >= _MAX_HELD:
            self._held.clear()
        headers = self._constant_lines(served, ref)
        found = _Held(served.name, path, served.backend, key, ref.bytes, headers)
        self._held[line[1]] = found
        return found

    def _constant_lines(self, served: ServedStore, ref: ObjectRef) -> bytes:
        """Headers that every part of an object is sent with."""
        answer = object_answer(served, ref, {"headers": [(b"range", b"bytes=0-0")]}, 1)
        headers = [pair for pair in answer.headers if pair[0] not in _OWN_HEADERS]
        return _lines(self._headers.completed(headers))


class Lane:
    """The short way of one connection.

    Args:
        address: of the client.
        state: of the server, whose default headers are in every answer.
    """

    def __init__(
        self,
        express: Express,
        outlet: Outlet,
        address: tuple[str, int] | None,
        state: ServerState,
    ) -> None:
        self._express, self._outlet, self._address, self._state = express, outlet, address, state
        self._caller: _Caller | None = None

    def answer(self, data: bytes) -> bool:
        """Answer what came in, if it is one plain request and nothing else; False leaves it to the
        chain. Nothing may be half read or on its way out before it."""
        started_s = time.perf_counter()
        line = _LINE.match(data)
        part = _RANGE.search(data, line.end()) if line else None
        # A range behind the end of the headers is no header.
        if line is None or part is None or not data.endswith(b"\r\n\r\n"):
            return False
        express = self._express
        caller = self._find_caller(data[line.end() : part.start()] + data[part.end() :])
        held = express.held(line, caller.access) if caller else None
        if caller is None or held is None:
            return False
        start, stop = int(part[1]), min(int(part[2]) + 1, held.size_bytes)
        if not 0 < stop - start <= _MAX_BYTES:
            return False
        try:
            file = held.backend.open_object(held.key, size_bytes=held.size_bytes)
        except LogitstoreError:
            return False
        if not express.limits.admit_at_once(caller.access.client):
            return False
        request_id = new_request_id()
        own = (
            f"x-request-id: {request_id}\r\ncontent-range: bytes {start}-{stop - 1}/"
            f"{held.size_bytes}\r\ncontent-length: {stop - start}\r\n\r\n"
        ).encode()
        head = STATUS_LINE[206] + _lines(self._state.default_headers) + held.headers + own
        complete = True
        try:
            self._outlet.send_at_once(head, file.descriptor, start, stop - start)
        except IntegrityError as error:
            complete = False
            count_damage(error)
            _log.error("request failed", exc_info=error, request_id=request_id)
            self._outlet.abort()
        report(
            Answered(
                method="GET",
                route=SHARDS_ROUTE,
                path=held.path,
                store=held.store,
                status=206,
                body_bytes=stop - start if complete else 0,
                complete=complete,
                first_byte_s=time.perf_counter() - started_s,
                stream_s=0.0,  # the system has taken it, or the loop's buffer
                client=caller.access.client,
                request_id=request_id,
            )
        )
        if file.descriptor != held.descriptor:
            held.descriptor = file.descriptor
            express.observation.count_open(express.registry)
        return True

    def _find_caller(self, headers: bytes) -> _Caller | None:
        """Who asks: as a rule who asked before, if the key has not been revoked meanwhile."""
        caller = self._caller
        if (
            caller is None
            # Behind a proxy the one before may be somebody else.
            or not hmac.compare_digest(caller.headers, headers)
            or not self._express.authentication.is_still_valid(caller.key)
        ):
            caller = self._caller = self._express.caller(headers, self._address)
        return caller


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])
