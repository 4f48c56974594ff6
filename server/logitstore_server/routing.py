"""The one kind of route the service has: GET, which answers HEAD as well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, request_response
from starlette.types import Receive, Scope, Send

from logitstore_server.problems import PROBLEM_MEDIA_TYPE
from logitstore_server.settings import STORE_NAME, ServerSettings
from logitstore_server.stores import Registry, ServedStore

__all__ = [
    "GetRoute",
    "Problem",
    "ServedByName",
    "add_file_route",
    "problems",
    "registry_of",
    "settings_of",
]


class GetRoute(APIRoute):
    """A GET route. HEAD reaches the same endpoint, whose body is then left out."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match == Match.PARTIAL and scope["method"] == "HEAD":
            match = Match.FULL
        return match, child

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405)
        await self.app(scope, receive, send)


class Problem(BaseModel):
    """An error, as application/problem+json (RFC 9457)."""

    type: str = Field(
        description="Name of the error, as a path.", examples=["/errors/store-not-found"]
    )
    title: str = Field(description="What the kind means.")
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(description="What happened, what was expected, what to do.")
    instance: str = Field(description="Path of the request.")
    kind: str = Field(description="Stable code of the error.", examples=["store-not-found"])
    request_id: str = Field(description="The request's id, also in the service's log.")


_MEANING = {
    404: "No such store, or nothing of that name in it.",
    406: "None of the accepted media types or codings can be sent.",
    409: "The store has changed since the cursor was given.",
    412: "The representation is not the one that If-Match names.",
    416: "The ranges cannot be sent; Content-Range tells the size.",
    422: "A parameter has a value that cannot work.",
    500: "The service failed, or the stored bytes are damaged.",
    503: "The store cannot be read now, or the service is stopping; try again after Retry-After.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for errors."""
    return {
        status: {
            "description": _MEANING[status],
            "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({*statuses, 500, 503})
    }


def registry_of(request: Request) -> Registry:
    """The stores of the app that answers."""
    registry = request.app.state.registry
    assert isinstance(registry, Registry)
    return registry


def settings_of(request: Request) -> ServerSettings:
    """The settings of the app that answers."""
    settings = request.app.state.settings
    assert isinstance(settings, ServerSettings)
    return settings


def _served(
    request: Request,
    store: Annotated[str, Path(description="Name of a store.", examples=["demo"])],
) -> ServedStore:
    return registry_of(request).get(store)


# An endpoint's store; unknown names end as 404 before the endpoint runs.
ServedByName = Annotated[ServedStore, Depends(_served)]


def add_file_route(
    app: FastAPI,
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    *,
    media_types: list[str],
    immutable: bool,
) -> None:
    """A route that answers as a static file server would.

    Its endpoint is called with the request alone: resolving parameters costs as much as sending a
    small range, so they are documented here by hand.
    """
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": f"^{STORE_NAME}$"},
            "description": text,
        }
        for name, text in (("store", "Name of a store."), ("name", "Name of the file."))
        if f"{{{name}}}" in path
    ]
    parameters += [
        {
            "name": name,
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": text,
        }
        for name, text in (
            ("Range", "Byte ranges, `bytes=...`; several are sent as multipart/byteranges."),
            ("If-Range", "Sends the range only if the strong ETag still holds, else everything."),
            ("If-None-Match", "ETags; 304 if one holds."),
            ("If-Match", "ETags; 412 if none holds."),
        )
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    # A part of a JSON document is none: it has the media type and no schema.
    json_parts = {kind: {} if kind == "application/json" else binary for kind in media_types}
    whole = {
        kind: {"schema": {"type": "object"}} if kind == "application/json" else binary
        for kind in media_types
    }
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The file." + (" It never changes." if immutable else ""),
            "content": whole,
        },
        206: {
            "description": "The ranges asked for.",
            "content": {**json_parts, "multipart/byteranges": binary},
        },
        304: {"description": "The client has it already."},
        **problems(404, 406, 412, 416),
    }
    app.add_api_route(
        path,
        endpoint,
        methods=["GET"],
        tags=["files"],
        response_model=None,
        response_class=Response,
        responses=responses,
        openapi_extra={"parameters": parameters},
    )
    route = app.router.routes[-1]
    assert isinstance(route, GetRoute)
    route.app = request_response(endpoint)
