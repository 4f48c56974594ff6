"""Everything that stands between the network and the application, in its order."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from logitstore_server.admission import HostNames, Limits
from logitstore_server.auth import Authentication
from logitstore_server.express import Express
from logitstore_server.observation import Observation
from logitstore_server.scrape import MetricsPage
from logitstore_server.security_headers import SecurityHeaders
from logitstore_server.settings import ServerSettings
from logitstore_server.shutdown import GracefulShutdown

__all__ = ["secure"]


def secure(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The application behind its guards; the first line below sees a request last.

    All are plain ASGI: a disconnect and a slow reader are felt by the application at once.
    """
    inner = app
    app = MetricsPage(app)
    app = limits = Limits(app, settings)
    app = authentication = Authentication(app, settings)
    if settings.cors_origins:
        # Before authentication: a browser asks without a key whether it may ask.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["Authorization", "Range", "If-Range", "If-None-Match"],
            expose_headers=["ETag", "Content-Range", "Accept-Ranges", "X-Request-ID"],
        )
    app = hosts = HostNames(app, settings)
    app = headers = SecurityHeaders(app, other_origins=bool(settings.cors_origins))
    app = GracefulShutdown(app, settings)
    app = observation = Observation(app)
    if settings.trusted_proxies:
        app = ProxyHeadersMiddleware(app, trusted_hosts=list(settings.trusted_proxies))  # type: ignore[assignment,arg-type]
    # The same parts, asked directly where a request is plain.
    return Express(
        app,
        inner,
        hosts=hosts,
        headers=headers,
        authentication=authentication,
        limits=limits,
        observation=observation,
    )
