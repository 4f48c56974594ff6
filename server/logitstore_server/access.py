"""What a request may see: the stores and metrics that its key allows."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from logitstore_server.problems import ServiceError, send_problem

__all__ = ["PROBE_PATHS", "Access", "Visibility", "access_of", "visible_stores"]

# Answered to anybody, under any host name: they say no more than that the process lives and is
# ready.
PROBE_PATHS = frozenset({"/healthz", "/readyz"})

# Names of the stores that the request being answered may see. Whatever looks a store up asks here,
# so that a page or route that forgets to ask finds nothing.
visible_stores: ContextVar[frozenset[str]] = ContextVar("visible_stores", default=frozenset())


@dataclass(frozen=True)
class Access:
    """What a request may see.

    Attributes:
        client: whose limits it counts against: `key:ID`, or `address:ADDRESS` without a key.
        stores: names of the stores that it may read.
        metrics: whether it may read the service's metrics.
    """

    client: str
    stores: frozenset[str]
    metrics: bool

    def may_read(self, store: str) -> bool:
        """Whether the store exists for this request; where not, the answer is 404."""
        return store in self.stores


def access_of(scope: Mapping[str, Any]) -> Access:
    """What the request of an ASGI scope may see, as `secure` found it.

    Raises: KeyError where no `Authentication` stands in front.
    """
    found = scope["state"]["access"]
    assert isinstance(found, Access)
    return found


class Visibility:
    """ASGI middleware around the application itself: without a decision on access, no answer.

    The decision is `scope["state"]["allowed_stores"]`, put there by whatever checks keys in front.

    Args:
        undecided: the stores that are visible where nothing in front decided; None refuses.
    """

    def __init__(self, app: ASGIApp, *, undecided: frozenset[str] | None) -> None:
        self._app = app
        self._undecided = undecided

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = scope.get("state", {}).get("allowed_stores", self._undecided)
        if allowed is None:
            if scope["path"] not in PROBE_PATHS:
                await send_problem(_unguarded(), scope, receive, send)
                return
            allowed = ()
        token = visible_stores.set(frozenset(allowed))
        try:
            await self._app(scope, receive, send)
        finally:
            visible_stores.reset(token)


def _unguarded() -> ServiceError:
    return ServiceError(
        "key-invalid",
        "nothing in front of this application checks keys",
        expected="secure(create_app(settings), settings), or create_app(settings, unguarded=True)",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )
