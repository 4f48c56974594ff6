"""An end that nobody notices: first not ready, then no new connections, then the last answers."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import FrameType
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from logitstore_server.problems import ServiceError, send_problem
from logitstore_server.settings import ServerSettings

__all__ = ["GracefulShutdown"]

_READY_PATH = "/readyz"


class GracefulShutdown:
    """ASGI middleware: after SIGTERM, /readyz is 503 for `shutdown_delay_s` before the end begins.

    A load balancer takes the process out of its list meanwhile, while requests are still answered.
    A second SIGTERM, or Ctrl-C, ends the wait.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._delay_s = settings.shutdown_delay_s
        self._ends = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and threading.current_thread() is threading.main_thread():
            self._handle_term(asyncio.get_running_loop())
        if self._ends and scope["type"] == "http" and scope["path"] == _READY_PATH:
            error = ServiceError("service-busy", "the service is shutting down")
            await send_problem(error, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _handle_term(self, loop: asyncio.AbstractEventLoop) -> None:
        # uvicorn has set its handler before it starts the application, and restores the one before
        # when it is done.
        stop: Any = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            return

        def on_term(number: int, frame: FrameType | None) -> None:
            if self._ends:
                stop(number, frame)
                return
            self._ends = True
            loop.call_soon_threadsafe(loop.call_later, self._delay_s, stop, number, None)

        signal.signal(signal.SIGTERM, on_term)
