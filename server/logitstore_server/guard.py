"""A guard against slow clients at the level of connections, where uvicorn has none.

uvicorn alone waits for ever for a request's head, for a body, and for a reader. `GuardedProtocol`
drops connections that keep the server waiting:

- silent, or not done with the headers `head_timeout_s` after connecting or after the first byte;
- not done with the body after `body_timeout_s`;
- taking less than `min_send_bytes_per_s` over `send_window_s` while bytes are waiting for them;
- beyond `max_connections`, or with a head above `max_head_bytes`.

What waits for a reader in memory stays below 64 KiB (uvicorn's high-water mark) plus one piece that
the application sends; parts of files wait on the disk (`outlet`). Deadlines are looked at twice a
second for all connections together, so that a request costs no timer.

    GuardedConfig(app, guard=settings, ...)     # in place of uvicorn.Config
"""

from __future__ import annotations

import asyncio
import http
import socket
import struct
from typing import Any, Literal

from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from logitstore_server.express import Express, Lane
from logitstore_server.metrics import CONNECTIONS, DROPPED_CONNECTIONS
from logitstore_server.outlet import Outlet, offer_zero_copy
from logitstore_server.problems import ServiceError, problem
from logitstore_server.settings import ServerSettings

__all__ = ["SWEEP_S", "GuardedConfig", "GuardedProtocol"]

SWEEP_S = 0.5
# Linger for no time: what was not sent is thrown away when the socket is closed.
_RESET = struct.pack("ii", 1, 0)


class GuardedConfig(Config):
    """uvicorn's configuration for a guarded server."""

    def __init__(self, app: Any, *, guard: ServerSettings, **kwargs: Any) -> None:
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            timeout_keep_alive=max(1, round(guard.keep_alive_s)),
            server_header=False,
            proxy_headers=False,  # `secure` reads them, from trusted proxies alone
            **kwargs,
        )
        self.guard = guard


class GuardedProtocol(HttpToolsProtocol):
    """One connection, with deadlines. What it waits for is its phase:

    "head" and "body": bytes of a request; "idle": the next request after one that `express`
    answered; None: the application, or the next request after its answer, which uvicorn's own timer
    limits.
    """

    config: GuardedConfig

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, GuardedConfig)
        self._limits = config.guard
        self._parsing: Literal["head", "body"] | None = None
        self._phase: Literal["head", "body", "idle"] | None = "head"
        self._phase_since_s = self.loop.time()
        self._head_bytes = 0
        self._refused = False
        self._lane: Lane | None = None
        # While bytes wait for the reader: since when, and how many had been taken by then.
        self._sending_since_s: float | None = None
        self._taken_then = 0

    # --- connection -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outlet = Outlet(transport, self.loop)
        super().connection_made(self._outlet)  # type: ignore[arg-type]
        app = self.config.loaded_app
        # What is encrypted must pass through this process.
        if isinstance(app, Express) and self.scheme == "http":
            self._lane = Lane(app, self._outlet, self.client, self.server_state)
        CONNECTIONS.inc()
        _start_sweeping(self.server_state, self.loop)
        if len(self.connections) > self._limits.max_connections:
            self._refuse("too-many-connections")

    def connection_lost(self, exc: Exception | None) -> None:
        CONNECTIONS.dec()
        super().connection_lost(exc)
        self._outlet.connection_lost()

    def data_received(self, data: bytes) -> None:
        if self._refused or self._answers_at_once(data):
            return
        super().data_received(data)
        if self._parsing == "head" and self._head_bytes > self._limits.max_head_bytes:
            self._refuse("head-too-large")
        phase = self._parsing
        if phase is None and not self._is_answering:
            phase = "head"  # stray bytes between two requests
        if phase != self._phase:
            self._phase = phase
            self._phase_since_s = self.loop.time()

    def _answers_at_once(self, data: bytes) -> bool:
        if (
            self._lane is None
            or self._parsing is not None
            or self._is_answering
            or self._outlet.is_closing()
            or self._outlet.get_write_buffer_size()
            or len(data) > self._limits.max_head_bytes
            or not self._lane.answer(data)
        ):
            return False
        self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        self._phase = "idle"
        self._phase_since_s = self.loop.time()
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self.scheme == "http":
            offer_zero_copy(cycle, self._outlet)
        super()._start_asgi_task(cycle, app)

    # --- parser callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._parsing = "head"
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes <= self._limits.max_head_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head_bytes > self._limits.max_head_bytes:
            return  # data_received refuses it
        self._parsing = "body"
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._parsing == "body":
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._parsing != "body":
            return
        self._parsing = None
        super().on_message_complete()

    # --- deadlines --------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """Drop the client if it has kept the server waiting too long."""
        if self._reads_too_slowly(now_s):
            DROPPED_CONNECTIONS.labels("slow-reader").inc()
            # Not close(), which would wait until the client has read what is buffered. And a reset,
            # or the system would go on to send the megabytes that it holds, at the client's pace.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        elif self.transport.is_closing() or self._phase is None:
            return
        elif self._phase == "head" and now_s - self._phase_since_s > self._limits.head_timeout_s:
            if self._is_answering:
                self._phase_since_s = now_s  # half of a pipelined request must not cut this answer
                return
            DROPPED_CONNECTIONS.labels("head-timeout").inc()
            self.transport.close()
        elif self._phase == "body" and now_s - self._phase_since_s > self._limits.body_timeout_s:
            self._refuse("body-timeout")
        elif self._phase == "idle" and now_s - self._phase_since_s > self.timeout_keep_alive:
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _reads_too_slowly(self, now_s: float) -> bool:
        waiting = self._outlet.get_write_buffer_size()
        taken = self._outlet.written - waiting
        if not waiting:
            self._sending_since_s = None
        elif self._sending_since_s is None:
            self._sending_since_s, self._taken_then = now_s, taken
        elif now_s - self._sending_since_s >= self._limits.send_window_s:
            rate = (taken - self._taken_then) / (now_s - self._sending_since_s)
            self._sending_since_s, self._taken_then = now_s, taken
            return rate < self._limits.min_send_bytes_per_s
        return False

    def _refuse(self, reason: str) -> None:
        """Answer with a problem document, unless an answer has begun, and close."""
        self._refused = True
        DROPPED_CONNECTIONS.labels(reason).inc()
        if self.transport.is_closing():
            return
        if not (self._is_answering and self.cycle.response_started):
            self.transport.write(_refusal(reason))
        self.transport.close()


_REFUSALS = {
    "too-many-connections": ("service-busy", "the service has too many connections"),
    "head-too-large": ("head-too-large", "the request line and headers are too long"),
    "body-timeout": ("request-timeout", "the request's body did not arrive in time"),
}


def _refusal(reason: str) -> bytes:
    response = problem(ServiceError(*_REFUSALS[reason]), {"path": "/"})
    phrase = http.HTTPStatus(response.status_code).phrase
    lines = [
        f"HTTP/1.1 {response.status_code} {phrase}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)


def _start_sweeping(state: ServerState, loop: asyncio.AbstractEventLoop) -> None:
    """Check every connection of this worker twice a second, for as long as there is one."""
    if getattr(state, "is_swept", False):
        return

    def sweep() -> None:
        for connection in list(state.connections):
            connection.check(loop.time())  # type: ignore[union-attr]
        if state.connections:
            loop.call_later(SWEEP_S, sweep)
        else:
            state.is_swept = False  # type: ignore[attr-defined]

    state.is_swept = True  # type: ignore[attr-defined]
    loop.call_later(SWEEP_S, sweep)
