"""`/metrics`, what Prometheus fetches."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from logitstore_server.auth import METRICS_PATH
from logitstore_server.metrics import exposition

__all__ = ["MetricsPage"]


class MetricsPage:
    """ASGI middleware behind authentication: answers GET /metrics, of all workers together."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == METRICS_PATH and scope["method"] == "GET":
            headers = {"cache-control": "no-store"}
            page = Response(exposition(), headers=headers, media_type=CONTENT_TYPE_LATEST)
            await page(scope, receive, send)
        else:
            await self._app(scope, receive, send)
