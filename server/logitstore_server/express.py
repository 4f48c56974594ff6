"""The short way of what training asks for: one range of a known object, by a plain request.

For such a request the chain of `secure` and the application take ten times as long as the system
takes to send the bytes. Here its parts are asked directly for what they would decide, and the
answer is given to the socket at once. Nothing is refused here: a request that is not plain in every
respect (another header, a key not seen yet, a full service, a reader that is behind) is left to the
chain, which then decides, counts and answers it as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from logitstore.spec.commit import ObjectRef
from logitstore.spec.errors import IntegrityError, LogitstoreError
from logitstore.store.documents import object_key
from logitstore.store.local import LocalBackend, OpenFile
from logitstore_server.access import visible_stores
from logitstore_server.admission import HostNames, Limits
from logitstore_server.auth import Authentication
from logitstore_server.files import SHARDS_ROUTE, object_answer
from logitstore_server.metrics import count_damage
from logitstore_server.observation import Observation, Watched
from logitstore_server.outlet import Outlet
from logitstore_server.security_headers import SecurityHeaders
from logitstore_server.settings import STORE_NAME
from logitstore_server.stores import ServedStore

__all__ = ["Express", "Parcel"]

# What a client may leave in memory while it does not read.
_MAX_BYTES = 1 << 20
_URL = re.compile(rf"/v1/stores/({STORE_NAME})/shards/([A-Za-z0-9._-]+)".encode())
# Each at most once. Every other one is somebody's wish that the chain knows of.
_PLAIN_HEADERS = frozenset(
    {b"host", b"range", b"user-agent", b"accept", b"accept-encoding", b"authorization"}
)

_RANGE = re.compile(rb"bytes=(\d{1,18})-(\d{1,18})")
_OWN_HEADERS = (b"content-range", b"content-length")
# Objects whose constant headers are kept.
_MAX_HELD = 10_000

_log: Any = structlog.get_logger("logitstore_server")


@dataclass(frozen=True)
class Parcel:
    """An answer that is ready to be sent."""

    head: bytes
    file: OpenFile
    offset: int
    count: int
    scope: Scope
    watched: Watched


class Express:
    """ASGI middleware around the whole chain, which a `GuardedProtocol` may ask for a `parcel`."""

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
        self._authentication, self._limits = authentication, limits
        self._observation = observation
        self._constant: dict[tuple[str, str], bytes] = {}
        self._inner = inner
        self._registry = inner.state.registry if isinstance(inner, FastAPI) else None
        routes = inner.router.routes if isinstance(inner, FastAPI) else []
        self._route = next((r for r in routes if getattr(r, "path", "") == SHARDS_ROUTE), None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def parcel(
        self, scope: Scope, url: bytes, default_headers: list[tuple[bytes, bytes]]
    ) -> Parcel | None:
        """The answer to a GET over HTTP/1.1, which counts as admitted; None leaves it to the chain.

        Args:
            scope: without method and path.
            url: as the request line has it.
            default_headers: of the server, in every answer.
        """
        match = _URL.fullmatch(url)
        if match is None or self._registry is None:
            return None
        given = dict(scope["headers"])
        if len(given) < len(scope["headers"]) or not given.keys() <= _PLAIN_HEADERS:
            return None
        asked = _RANGE.fullmatch(given.get(b"range", b""))
        if asked is None:
            return None
        store, name = match[1].decode(), match[2].decode()
        scope["method"], scope["path"] = "GET", url.decode()
        access = self._authentication.plain_access(scope)
        if access is None or not access.may_read(store) or not self._hosts.allows(scope):
            return None
        token = visible_stores.set(access.stores)
        try:
            served = self._registry.get(store)
            ref = served.known_object(name)
            if ref is None or not isinstance(served.backend, LocalBackend):
                return None
            start, stop = int(asked[1]), min(int(asked[2]) + 1, ref.bytes)
            if not 0 < stop - start <= _MAX_BYTES:
                return None
            file = served.backend.open_object(object_key(name), size_bytes=ref.bytes)
        except LogitstoreError:
            return None
        finally:
            visible_stores.reset(token)
        if not self._limits.admit_at_once(access.client):
            return None
        scope["app"], scope["route"] = self._inner, self._route
        scope["state"]["access"] = access
        watched = Watched(scope)
        parts = f"content-range: bytes {start}-{stop - 1}/{ref.bytes}\r\n"
        parts += f"content-length: {stop - start}\r\n\r\n"
        head = b"".join(
            (
                STATUS_LINE[206],
                _lines(default_headers),
                self._constant_lines(served, ref),
                _lines(watched.headers),
                parts.encode(),
            )
        )
        return Parcel(head, file, start, stop - start, scope, watched)

    def _constant_lines(self, served: ServedStore, ref: ObjectRef) -> bytes:
        """Headers that every part of an object is sent with."""
        key = (served.name, ref.name)
        found = self._constant.get(key)
        if found is None:
            answer = object_answer(served, ref, {"headers": [(b"range", b"bytes=0-0")]}, 1)
            headers = [pair for pair in answer.headers if pair[0] not in _OWN_HEADERS]
            if len(self._constant) >= _MAX_HELD:
                self._constant.clear()
            found = self._constant[key] = _lines(self._headers.completed(headers))
        return found

    def deliver(self, parcel: Parcel, outlet: Outlet) -> None:
        """Send it, and log that it was sent."""
        watched = parcel.watched
        watched.begins(206)
        try:
            outlet.send_at_once(parcel.head, parcel.file.descriptor, parcel.offset, parcel.count)
            watched.continues(parcel.count, more=False)
        except IntegrityError as error:
            count_damage(error)
            _log.error("request failed", exc_info=error, **watched.context)
            outlet.abort()
        watched.report()
        self._observation.count_open(parcel.scope)


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])
