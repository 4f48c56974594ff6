"""The viewer at the root of the service, for the stores that a reader's key allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.routing import Match, Route

from logitstore.store import Store
from logitstore_server.problems import ServiceError
from logitstore_server.settings import ServerSettings
from logitstore_server.stores import Registry
from logitstore_server.viewer import viewer_routes

__all__ = ["add_pages"]


def add_pages(app: FastAPI, registry: Registry, settings: ServerSettings) -> None:
    """Add the viewer's routes behind those of the API."""
    locations = {entry.name: entry.location for entry in settings.stores}
    for route in viewer_routes(_VisibleStores(registry), locations=locations):
        assert isinstance(route, Route)
        app.router.routes.append(_PageRoute(route.path, route.endpoint, methods=["GET"]))


class _PageRoute(Route):
    """A page; leaves itself in the scope, as routes of the API do, for metrics to be named by."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        match, child = super().matches(scope)
        return match, ({**child, "route": self} if match == Match.FULL else child)


class _VisibleStores(Mapping[str, Store]):
    """Stores by name, as far as the request being answered may see them; opened when asked for.

    Raises: what opening raises, for a store that cannot be.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Store:
        try:
            served = self._registry.get(name)
        except ServiceError:
            raise KeyError(name) from None
        return served.opened().store

    def __iter__(self) -> Iterator[str]:
        return (served.name for served in self._registry)

    def __len__(self) -> int:
        return sum(1 for _ in self._registry)
