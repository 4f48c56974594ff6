"""Every request counted, timed and logged once, under an id that the client gets to know."""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache
from typing import Any

import structlog
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitstore_server.auth import store_in
from logitstore_server.logs import Answered, log_request
from logitstore_server.metrics import (
    FIRST_BYTE_SECONDS,
    IN_FLIGHT,
    OPEN_SHARDS,
    REQUESTS,
    RESPONSE_BYTES,
    STREAM_SECONDS,
    count_damage,
)
from logitstore_server.problems import ServiceError, send_problem
from logitstore_server.stores import Registry

__all__ = ["AnswerCutShort", "Observation", "new_request_id", "report"]

_REQUEST_ID = b"x-request-id"
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_log: Any = structlog.get_logger("logitstore_server")


class AnswerCutShort(Exception):
    """An answer failed after it had begun; the connection ends short of its promised length."""


class Observation:
    """ASGI middleware, the outermost: nothing happens to a request that it does not see.

    A request's id is the client's `X-Request-ID` where that is plain, else a new one; it stands in
    the answer, in problem documents and in every line logged meanwhile. A W3C `traceparent` is
    logged and returned.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open_shards = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watched = Watched(scope)
        send = watched.sending(send)
        IN_FLIGHT.inc()
        structlog.contextvars.bind_contextvars(**watched.context)
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            count_damage(error)
            await _log.aerror("request failed", exc_info=error)
            if not watched.status:
                failure = ServiceError("internal", "the service failed; its log says why")
                await send_problem(failure, scope, receive, send)
            elif not watched.complete:
                raise AnswerCutShort from None
        finally:
            IN_FLIGHT.dec()
            watched.report()
            self.count_open(getattr(getattr(scope.get("app"), "state", None), "registry", None))
            structlog.contextvars.clear_contextvars()

    def count_open(self, registry: Registry | None) -> None:
        """Shard files stay open between requests, and only requests open them."""
        if registry is not None and registry.open_shards != self._open_shards:
            self._open_shards = registry.open_shards
            OPEN_SHARDS.set(self._open_shards)


class Watched:
    """One request while it is answered.

    Attributes:
        headers: what its answer carries.
        context: what every line logged meanwhile carries.
        status, complete: of the answer so far.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._started_s = time.perf_counter()
        self._first_byte_s: float | None = None
        self._bytes = 0
        self.status = 0
        self.complete = False
        given = {name: value for name, value in scope["headers"] if name in _OUR_HEADERS}
        request_id = given.get(_REQUEST_ID, b"")
        if not _PLAIN_ID.fullmatch(request_id):
            request_id = new_request_id().encode()
        self.headers = [(_REQUEST_ID, request_id)]
        self.context = {"request_id": request_id.decode()}
        trace = _TRACEPARENT.fullmatch(given.get(b"traceparent", b""))
        if trace is not None:
            self.headers.append((b"traceparent", trace[0]))
            self.context["trace_id"] = trace[1].decode()
        scope.setdefault("state", {})["request_id"] = self.context["request_id"]

    def begins(self, status: int) -> None:
        """The head goes out."""
        self.status = status

    def continues(self, count: int, *, more: bool) -> None:
        """So many bytes of the body go out."""
        if self._first_byte_s is None:
            self._first_byte_s = time.perf_counter()
        self._bytes += count
        self.complete = not more

    def sending(self, send: Send) -> Send:
        """`send`, watched, and with the headers."""

        async def send_watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.begins(message["status"])
                headers = [pair for pair in message["headers"] if pair[0].lower() != _REQUEST_ID]
                message = {**message, "headers": [*headers, *self.headers]}
            else:  # a body's bytes, or a part of a file that the server sends
                count = message.get("count") or len(message.get("body", b""))
                self.continues(count, more=message.get("more_body", False))
            await send(message)

        return send_watched

    def report(self) -> None:
        now_s = time.perf_counter()
        first_byte_s = self._first_byte_s or now_s
        # The router leaves the route it chose in the scope: a template, so that labels stay few.
        route = getattr(self._scope.get("route"), "path", "none")
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        access = self._scope["state"].get("access")
        store = store_in(self._scope["path"])
        readable = store is not None and access is not None and access.may_read(store)
        report(
            Answered(
                method=method,
                route=route,
                path=self._scope["path"],
                store=store if readable and store is not None else "",
                status=self.status,
                body_bytes=self._bytes,
                complete=self.complete,
                first_byte_s=first_byte_s - self._started_s,
                stream_s=now_s - first_byte_s,
                client=access.client if access is not None else "",
                **self.context,
            )
        )


def new_request_id() -> str:
    """An id for a request that came with none."""
    return os.urandom(16).hex()


def report(told: Answered) -> None:
    """Count and log a request."""
    requests, sent, first_byte, stream = _metrics(told.method, told.route, told.status, told.store)
    requests.inc()
    sent.inc(told.body_bytes)
    first_byte.observe(told.first_byte_s)
    stream.observe(told.stream_s)
    log_request(told)


@lru_cache(maxsize=1024)
def _metrics(
    method: str, route: str, status: int, store: str
) -> tuple[Counter, Counter, Histogram, Histogram]:
    """Finding a metric by its labels costs more than counting."""
    return (
        REQUESTS.labels(method, route, status or "cut"),
        RESPONSE_BYTES.labels(store),
        FIRST_BYTE_SECONDS.labels(route),
        STREAM_SECONDS.labels(route),
    )


_OUR_HEADERS = frozenset({_REQUEST_ID, b"traceparent"})
