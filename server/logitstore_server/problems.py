"""Every failure of the service as one kind of answer: application/problem+json (RFC 9457).

The body is `{type, title, status, detail, instance, kind, request_id}`. Kinds are those of
`logitstore.spec.errors`; the status of each stands in this module alone. Locations of stores, other
than their names, and stack traces go to the log, never to a client.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from logitstore.spec.errors import (
    KINDS,
    FormatError,
    IntegrityError,
    LogitstoreError,
    NotFoundError,
    StateError,
    StorageError,
    UsageError,
)
from logitstore_server.metrics import count_damage

__all__ = [
    "PROBLEM_MEDIA_TYPE",
    "STATUS",
    "ServiceError",
    "install",
    "problem",
    "problem_document",
    "request_id_of",
    "send_problem",
    "status_of",
    "store_not_found",
]

PROBLEM_MEDIA_TYPE = "application/problem+json"

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# kind -> status, where it is not that of the error's class below
STATUS: dict[str, int] = {
    "bad-argument": 422,
    "store-not-found": 404,
    "path-not-found": 404,
    "method-not-allowed": 405,
    "not-acceptable": 406,
    "precondition-failed": 412,
    "range-not-satisfiable": 416,
    "cursor-invalid": 422,
    "store-unavailable": 503,
    "not-a-store": 503,
    "internal": 500,
    # refused in front of the application
    "key-invalid": 401,
    "key-lacks-scope": 403,
    "request-timeout": 408,
    "request-too-large": 413,
    "host-not-allowed": 421,
    "rate-limited": 429,
    "too-many-streams": 429,
    "head-too-large": 431,
    "service-busy": 503,
}
_CLASS_STATUS: tuple[tuple[type[LogitstoreError], int], ...] = (
    (UsageError, 422),
    (NotFoundError, 404),
    (StateError, 409),
    (StorageError, 503),
    (FormatError, 500),
    (IntegrityError, 500),
)
# status -> kind, for failures that the routing or the framework reports
_STATUS_KIND = {
    400: "bad-argument",
    404: "path-not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    416: "range-not-satisfiable",
    422: "bad-argument",
}

_RETRY_AFTER_S = 2
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,300}")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_log = logging.getLogger("logitstore_server")


class ServiceError(LogitstoreError):
    """A request cannot be answered as asked; the status follows from the kind.

    Args:
        headers: of the answer, beside those that every problem has.
    """

    def __init__(self, kind: str, what: str, *, headers: dict[str, str] | None = None, **rest: Any):
        super().__init__(kind, what, **rest)
        self.headers = headers or {}


def store_not_found() -> ServiceError:
    """The error for a store that the service does not have, or that a key may not see."""
    return ServiceError(
        "store-not-found", KINDS["store-not-found"], hint="/v1/stores lists the stores"
    )


def status_of(error: LogitstoreError) -> int:
    """The HTTP status of an error."""
    status = STATUS.get(error.kind)
    if status is not None:
        return status
    return next((code for cls, code in _CLASS_STATUS if isinstance(error, cls)), 500)


def request_id_of(scope: Scope) -> str:
    """The request's id: the one a middleware put into the scope, or a new one."""
    state = scope.setdefault("state", {})
    given = state.get("request_id")
    if not (isinstance(given, str) and _PLAIN_ID.fullmatch(given)):
        given = state["request_id"] = uuid.uuid4().hex
    return given


def problem_document(
    error: LogitstoreError, status: int, *, instance: str, request_id: str = ""
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        instance: path of the request; repeated only if it is plain.
    """
    return {
        "type": f"/errors/{error.kind}",
        "title": KINDS[error.kind],
        "status": status,
        "detail": _detail(error, status),
        "instance": instance if _PLAIN_PATH.fullmatch(instance) else "/",
        "kind": error.kind,
        "request_id": request_id,
    }


def problem(
    error: LogitstoreError, scope: Scope, *, errors: list[dict[str, Any]] | None = None
) -> Response:
    """The answer for an error.

    Args:
        errors: what is wrong with each parameter.
    """
    status = status_of(error)
    body = problem_document(
        error, status, instance=scope.get("path", ""), request_id=request_id_of(scope)
    )
    if errors:
        body["errors"] = errors
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    headers.update(getattr(error, "headers", {}))
    if status in (429, 503):
        headers.setdefault("Retry-After", str(_RETRY_AFTER_S))
    return Response(
        json.dumps(body), status_code=status, headers=headers, media_type=PROBLEM_MEDIA_TYPE
    )


async def send_problem(error: LogitstoreError, scope: Scope, receive: Any, send: Send) -> None:
    """Answer a request with a problem, from a middleware."""
    await problem(error, scope)(scope, receive, send)


def install(app: FastAPI) -> None:
    """Make problems of everything that can go wrong in an app."""
    app.add_exception_handler(LogitstoreError, _known)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unknown)


def _detail(error: LogitstoreError, status: int) -> str:
    if status >= 500:
        # The rest names files and addresses of the server.
        return error.what
    text = error.what
    if error.got is not None:
        text += f"; got {error.got[:200]}"
    if error.expected is not None:
        text += f"; expected {error.expected[:400]}"
    if error.hint:
        text += f"; {error.hint}"
    return text


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, LogitstoreError)
    count_damage(error)
    if status_of(error) >= 500:
        _log.warning("request %s failed: %s", request_id_of(request.scope), error.message)
    return problem(error, request.scope)


async def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _STATUS_KIND.get(error.status_code, "internal")
    headers = dict(error.headers or {})
    if kind == "method-not-allowed":
        headers = {"Allow": "GET, HEAD"}
    return problem(ServiceError(kind, KINDS[kind], headers=headers), request.scope)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"parameter": ".".join(str(part) for part in e["loc"][1:]), "problem": e["msg"]}
        for e in error.errors()
    ]
    what = "; ".join(f"{e['parameter']}: {e['problem']}" for e in errors[:8])
    return problem(ServiceError("bad-argument", what), request.scope, errors=errors)


async def _unknown(request: Request, error: Exception) -> Response:
    # The framework raises the error again behind this answer, so that the server logs its stack.
    return problem(ServiceError("internal", "the service failed; its log says why"), request.scope)
