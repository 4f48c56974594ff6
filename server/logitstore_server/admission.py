"""Which requests are let in: known host names, bounded rates, numbers in flight and bodies."""

from __future__ import annotations

import ipaddress
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitstore_server.access import PROBE_PATHS, access_of
from logitstore_server.limits import Gate, RateLimit
from logitstore_server.metrics import REFUSALS
from logitstore_server.problems import ServiceError, send_problem
from logitstore_server.settings import ServerSettings

__all__ = ["HostNames", "Limits", "has_foreign_host"]

_RATE_BURST_S = 10


class HostNames:
    """ASGI middleware: answers only to the service's own names.

    A page that makes a browser resolve the page's own name to this machine's address ("DNS
    rebinding") could otherwise read a service that listens on loopback without keys.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in settings.allow_hosts)}
        if not _is_any_address(settings.host):
            self._names.add(settings.host.lower().strip("[]"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.allows(scope):
            if scope["type"] == "http" and not self._knows(scope):
                scope.setdefault("state", {})["foreign_host"] = True
            await self._app(scope, receive, send)
            return
        REFUSALS.labels("host-not-allowed").inc()
        error = ServiceError(
            "host-not-allowed",
            "the Host of the request is none of the service's names",
            hint="the service's setting allow_hosts lists them",
        )
        await send_problem(error, scope, receive, send)

    def allows(self, scope: Scope) -> bool:
        """Whether the request names the service by a name of its own."""
        # Probes of an orchestrator come to an address that nobody knows before; they learn nothing.
        return scope["path"] in PROBE_PATHS or self._knows(scope)

    def _knows(self, scope: Scope) -> bool:
        if "*" in self._names:
            return True
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            return False
        name = _without_port(hosts[0].decode("latin-1").lower())
        return name in self._names or _is_loopback(name)


def has_foreign_host(scope: Scope) -> bool:
    """Whether a probe came under a name that is none of the service's own."""
    return bool(scope.get("state", {}).get("foreign_host"))


class Limits:
    """ASGI middleware behind authentication: rates, requests in flight, and sizes of bodies."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._gate = Gate(settings.max_streams, settings.max_streams_per_key)
        per_s = settings.requests_per_s
        self._rate = RateLimit(per_s, max(1.0, per_s * _RATE_BURST_S)) if per_s else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS:
            await self._app(scope, receive, send)
            return
        client = access_of(scope).client
        try:
            self._admit(scope, client)
        except ServiceError as error:
            REFUSALS.labels(error.kind).inc()
            await send_problem(error, scope, receive, send)
            return
        try:
            if any(name == b"transfer-encoding" for name, _ in scope["headers"]):
                body = _BoundedBody(scope, receive, send, self._max_body_bytes)
                await self._app(scope, body.receive, body.send)
            else:
                await self._app(scope, receive, send)
        finally:
            self._gate.leave(client)

    def admit_at_once(self, client: str) -> bool:
        """Count a request without a body that is answered before any other is looked at; False,
        and not counted, where it has to be refused."""
        if not self._gate.has_room(client):
            return False
        if self._rate is None:
            return True
        return not self._rate.wait_s(client) and not self._rate.take(client)

    def _admit(self, scope: Scope, client: str) -> None:
        if self._rate is not None and (wait_s := self._rate.take(client)):
            raise ServiceError(
                "rate-limited",
                "too many requests a second",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        for name, value in scope["headers"]:
            # Digits only, as the parser of the request has seen to.
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise _too_large(self._max_body_bytes)
        broken = self._gate.enter(client)
        if broken == "total":
            raise ServiceError("service-busy", "the service answers as many requests as it can")
        if broken == "client":
            raise ServiceError("too-many-streams", "too many requests of this client in flight")


class _BoundedBody:
    """A body that does not say its length: the client is refused where it becomes too long.

    The application sees a client that went away, and what it then sends is dropped.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._most = most
        self._received = 0
        self._refused = False
        self._answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received <= self._most:
            return message
        if not self._answered and not self._refused:
            self._refused = True
            REFUSALS.labels("request-too-large").inc()
            await send_problem(_too_large(self._most), self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._answered = True
        if not self._refused:
            await self._send(message)


def _too_large(most: int) -> ServiceError:
    return ServiceError(
        "request-too-large",
        "the request's body is too large",
        expected=f"at most {most} bytes",
        headers={"Connection": "close"},
    )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_any_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False
