"""Who may see what; everything is denied that is not allowed here.

Source of the 401's form: RFC 6750, section 3.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict

from starlette.types import ASGIApp, Receive, Scope, Send

from logitstore.spec.errors import StorageError
from logitstore_server.access import Access
from logitstore_server.keys import KeyRing
from logitstore_server.limits import RateLimit
from logitstore_server.metrics import REFUSALS
from logitstore_server.problems import ServiceError, send_problem, store_not_found
from logitstore_server.settings import STORE_NAME, ServerSettings

__all__ = ["METRICS_PATH", "OPEN_PATHS", "Authentication", "store_in"]

# Answered without a key: they say no more than that the process lives and is ready.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
METRICS_PATH = "/metrics"
# Answered to every valid key; what they show of stores is what `Access` allows.
_COMMON_PATHS = frozenset({"/v1/stores", "/v1/openapi.json"})
_STORE_PATH = re.compile(rf"(?:/[a-z0-9]+)?/stores/({STORE_NAME})(?:/.*)?", re.DOTALL)

_MAX_REMEMBERED = 10_000


def store_in(path: str) -> str | None:
    """The store that a path is about: `/v1/stores/NAME/...`, or the same below another root."""
    match = _STORE_PATH.fullmatch(path)
    return match[1] if match else None


class Authentication:
    """ASGI middleware: decides what a request may see, and answers 401, 403, 404 and 429.

    A request for a store that its key does not allow is answered exactly as one for a store that
    does not exist. Paths that are neither about one store nor in the lists above do not exist
    either, unless the key allows every store. Without a keys file every request may see everything.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._all = frozenset(entry.name for entry in settings.stores)
        self._public = frozenset(entry.name for entry in settings.stores if entry.public)
        self._ring = KeyRing(settings.keys_file) if settings.keys_file is not None else None
        per_minute = settings.failed_keys_per_minute
        self._failures = RateLimit(per_minute / 60, per_minute)
        # (address, key id) of keys that were right before: they keep working from an address that
        # somebody else guesses keys from.
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            access = self._access(scope)
            scope["state"] |= {"access": access, "allowed_stores": access.stores}
            self._allow(scope["path"], access)
        except (ServiceError, StorageError) as error:
            REFUSALS.labels(error.kind).inc()
            await send_problem(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _access(self, scope: Scope) -> Access:
        address = scope["client"][0] if scope.get("client") else "unknown"
        if self._ring is None:
            return Access(f"address:{address}", self._all, metrics=True)
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if not sent:
            return Access(f"address:{address}", self._public, metrics=False)
        scheme, _, text = sent[0].decode("latin-1").partition(" ")
        key = self._ring.find(text.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            if wait_s := self._failures.take(address):
                raise _too_many_failures(wait_s)
            raise _no_valid_key()
        pair = (address, key.id)
        if pair not in self._known:
            if wait_s := self._failures.wait_s(address):
                raise _too_many_failures(wait_s)
            self._known[pair] = None
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        stores = frozenset(name for name in self._all if key.may_read(name))
        return Access(f"key:{key.id}", stores | self._public, key.metrics)

    def _allow(self, path: str, access: Access) -> None:
        if path in OPEN_PATHS:
            return
        has_key = self._ring is None or access.client.startswith("key:")
        store = store_in(path)
        if store is not None and access.may_read(store):
            return
        if not has_key:
            raise _no_valid_key()
        if store is not None:
            raise store_not_found()
        if path == METRICS_PATH:
            if not access.metrics:
                raise ServiceError(
                    "key-lacks-scope",
                    "the key does not allow reading metrics",
                    hint="make one with `logitstore keys create --metrics`",
                    headers={"WWW-Authenticate": 'Bearer error="insufficient_scope"'},
                )
        elif path not in _COMMON_PATHS and access.stores != self._all:
            raise ServiceError("path-not-found", "the service has no such path")


def _no_valid_key() -> ServiceError:
    return ServiceError(
        "key-invalid",
        "a valid key is needed",
        expected="the header `Authorization: Bearer KEY`",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )


def _too_many_failures(wait_s: float) -> ServiceError:
    return ServiceError(
        "rate-limited",
        "too many wrong keys from this address",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )
