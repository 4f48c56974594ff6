"""The application: which paths there are, and what stands behind them.

    settings = ServerSettings(stores=["demo=/data/demo"])
    app = secure(create_app(settings), settings)

It only reads. What it answers follows from the request and the stores alone, so any number of
worker processes serve the same. Who may ask is decided in front of it; where nothing decides, it
answers nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, create_task_group, move_on_after, to_thread
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from logitstore.spec.errors import LogitstoreError
from logitstore.spec.version import __version__
from logitstore_server import croissant, files, rows, samples
from logitstore_server.access import Visibility, visible_stores
from logitstore_server.admission import has_foreign_host
from logitstore_server.pages import add_pages
from logitstore_server.problems import ServiceError, install
from logitstore_server.routing import GetRoute, Problem, problems, registry_of
from logitstore_server.settings import ServerSettings
from logitstore_server.stores import Registry, ServedStore

__all__ = ["create_app"]

# What asks /readyz waits some seconds itself.
_LOOK_PATIENCE_S = 2.0


class Health(BaseModel):
    """The process answers."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """The service is to be sent requests."""

    status: str = Field(examples=["ready"], description="degraded: some stores cannot be opened.")
    detail: str | None = Field(default=None, examples=["1 of 2 stores cannot be opened"])
    unavailable: dict[str, str] | None = Field(
        default=None,
        description="Kind of the error, by name of the store; only stores that need no key.",
        examples=[{"demo": "not-a-store"}],
    )


class StoreSummary(BaseModel):
    """One store of the service."""

    name: str = Field(description="Its name in URLs.")
    available: bool = Field(description="Whether it can be opened; the rest is null if not.")
    problem: str | None = Field(
        default=None, description="Kind of the error, if it cannot.", examples=["not-a-store"]
    )
    sealed: bool | None = Field(default=None, description="Complete, so it never changes.")
    sample_kind: str | None = Field(default=None, examples=["sequence"])
    signal: str | None = Field(default=None, examples=["topk:64"])
    samples: int | None = None
    positions: int | None = None
    shards: int | None = None
    bytes: int | None = Field(default=None, description="Of all shard objects.")


class StoreList(BaseModel):
    """The stores that the client may read."""

    stores: list[StoreSummary]


def create_app(settings: ServerSettings, *, unguarded: bool = False) -> FastAPI:
    """The application for these settings. Stores are opened when they are first asked for.

    Args:
        unguarded: answer everybody everything where nothing in front decides who may see what.
            Otherwise such requests are 401, so that nobody mounts it open by mistake.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.registry.close()

    app = FastAPI(
        title="logitstore",
        version=__version__,
        summary="Stores of teacher distributions, read-only.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.router.route_class = GetRoute
    app.state.settings = settings
    app.state.registry = Registry(settings.stores)
    everything = frozenset(entry.name for entry in settings.stores)
    app.add_middleware(Visibility, undecided=everything if unguarded else None)
    install(app)
    files.add_routes(app)
    samples.add_routes(app)
    rows.add_routes(app)
    croissant.add_routes(app)
    app.get("/v1/stores", tags=["stores"], response_model=StoreList, responses=problems())(stores)
    app.get("/healthz", tags=["service"], response_model=Health, responses=problems())(healthz)
    app.get(
        "/readyz",
        tags=["service"],
        response_model=Readiness,
        response_model_exclude_none=True,
        responses=problems(),
    )(readyz)
    app.get("/v1/openapi.json", tags=["service"], responses=problems())(openapi_document)
    add_pages(app, app.state.registry, settings)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def healthz() -> Health:
    """Whether the process lives. It says nothing about the stores."""
    return Health(status="ok")


async def readyz(request: Request) -> Readiness:
    """Whether any store can be opened, and which cannot. Before the service stops it says no."""
    every = registry_of(request).all()
    problems = await _look_at(every)
    found = {name: kind for name, kind in problems.items() if kind is not None}
    if not found:
        return Readiness(status="ready")
    detail = f"{len(found)} of {len(every)} stores cannot be opened"
    # Anybody may ask, under any name: only what is nobody's secret is named.
    told = {} if has_foreign_host(request.scope) else found
    shown = {name: told[name] for name in sorted(told.keys() & visible_stores.get())}
    if len(found) == len(every):
        named = "".join(f"; {name}: {kind}" for name, kind in shown.items())
        raise ServiceError("store-unavailable", detail + named)
    return Readiness(status="degraded", detail=detail, unavailable=shown)


async def stores(request: Request) -> StoreList:
    """The stores that the client may read, in the order of the service's settings."""
    every = list(registry_of(request))
    problems = await _look_at(every)
    return StoreList(
        stores=[
            StoreSummary(name=served.name, available=False, problem=problems[served.name])
            if problems[served.name] is not None
            else await run_in_threadpool(_summary, served)
            for served in every
        ]
    )


async def _look_at(every: Sequence[ServedStore]) -> dict[str, str | None]:
    """Kind of the error by name of the store, None for those that can be opened."""
    # Until it is known better: storage without an answer must not keep the others from being told.
    found: dict[str, str | None] = {served.name: "storage-failed" for served in every}

    async def look(served: ServedStore) -> None:
        with move_on_after(_LOOK_PATIENCE_S):
            try:
                await to_thread.run_sync(served.opened, abandon_on_cancel=True, limiter=limiter)
                found[served.name] = served.problem
            except LogitstoreError as error:
                found[served.name] = error.kind

    limiter = CapacityLimiter(max(len(every), 1))
    async with create_task_group() as group:
        for served in every:
            group.start_soon(look, served)
    return found


async def openapi_document(request: Request) -> JSONResponse:
    """This description of the service."""
    return JSONResponse(request.app.openapi())


def _summary(served: ServedStore) -> StoreSummary:
    try:
        opened = served.opened()
    except LogitstoreError as error:
        return StoreSummary(name=served.name, available=False, problem=error.kind)
    header, index = opened.store.header, opened.index
    return StoreSummary(
        name=served.name,
        available=True,
        sealed=opened.sealed,
        sample_kind=header.sample_kind,
        signal=str(header.signal),
        samples=index.samples,
        positions=index.positions,
        shards=len(index.shards),
        bytes=sum(row.object_bytes for row in index.shards),
    )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI with one form of error everywhere."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version="1",
            summary=app.summary,
            description=(
                "Paths under /v1 keep their meaning; answers may gain keys, which clients must "
                "ignore. Every GET answers HEAD as well."
            ),
            routes=app.routes,
        )
        for item in document["paths"].values():
            for operation in item.values():
                # The framework's own form, at routes where nothing can be invalid.
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        schemas["Problem"] = Problem.model_json_schema()
        app.openapi_schema = document
    return app.openapi_schema
