"""Headers that keep a browser from being turned against the service or its user."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SecurityHeaders"]

# A page that needs more says so itself; what is set already stays.
_DEFAULTS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_SAME_ORIGIN = (b"cross-origin-resource-policy", b"same-origin")


class SecurityHeaders:
    """ASGI middleware: adds to every answer the headers that it does not have.

    Args:
        other_origins: whether pages of other origins may read at all (`cors_origins`).
    """

    def __init__(self, app: ASGIApp, *, other_origins: bool) -> None:
        self._app = app
        self._headers = _DEFAULTS if other_origins else (*_DEFAULTS, _SAME_ORIGIN)

    def completed(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """An answer's headers with those that it does not have."""
        headers = list(headers)
        present = {name.lower() for name, _ in headers}
        return headers + [pair for pair in self._headers if pair[0] not in present]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self.completed(message.get("headers", ()))}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
