"""Who may see what; everything is denied that is not allowed here.

Source of the 401's form: RFC 6750, section 3.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict

from itsdangerous import BadSignature
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from logitstore.spec.errors import KINDS, LogitstoreError, StorageError
from logitstore_server import login
from logitstore_server.access import PROBE_PATHS, Access
from logitstore_server.keys import Key, KeyRing
from logitstore_server.limits import RateLimit
from logitstore_server.metrics import REFUSALS
from logitstore_server.problems import ServiceError, problem, store_not_found
from logitstore_server.settings import STORE_NAME, ServerSettings

__all__ = ["METRICS_PATH", "Authentication", "is_open", "store_in"]

METRICS_PATH = "/metrics"
# The viewer's own files, the same in every installation.
_STATIC = re.compile(r"/static/[a-zA-Z0-9._/-]+")
# Answered to every valid key; what they show of stores is what `Access` allows.
_COMMON_PATHS = frozenset({"/v1/stores", "/v1/openapi.json", "/", "/stores.json"})
_COMPARE_PATH = re.compile(r"/compare(?:\.json|/samples/[0-9]+(?:\.json)?)?")
_STORE_PATH = re.compile(rf"(?:/[a-z0-9]+)?/stores/({STORE_NAME})(?:/.*)?", re.DOTALL)

_MAX_REMEMBERED = 10_000


def is_open(path: str) -> bool:
    """Whether a path is answered without a key. None of these says anything about a store."""
    return path in PROBE_PATHS or path == login.LOGIN_PATH or bool(_STATIC.fullmatch(path))


def store_in(path: str) -> str | None:
    """The store that a path is about: `/v1/stores/NAME/...`, or the same below another root."""
    match = _STORE_PATH.fullmatch(path)
    return match[1] if match else None


class Authentication:
    """ASGI middleware: decides what a request may see, and answers 401, 403, 404 and 429.

    Programs send their key with each request; a browser exchanges it at /login for a cookie that
    counts for GET and HEAD. A request for a store that its key does not allow is answered exactly
    as one for a store that does not exist. Paths that are neither about one store nor in the lists
    above do not exist either, unless the key allows every store. Without a keys file every request
    may see everything.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._all = frozenset(entry.name for entry in settings.stores)
        self._public = frozenset(entry.name for entry in settings.stores if entry.public)
        self._ring = KeyRing(settings.keys_file) if settings.keys_file is not None else None
        self._sessions = login.Sessions(settings)
        per_minute = settings.failed_keys_per_minute
        self._failures = RateLimit(per_minute / 60, per_minute)
        # (address, key id) of keys that were right before: they keep working from an address that
        # somebody else guesses keys from.
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        try:
            answer = await self._login_or_out(scope, receive)
            if answer is None:
                access = self._access(scope)
                scope["state"] |= {"access": access, "allowed_stores": access.stores}
                self._allow(scope["path"], access)
        except (ServiceError, StorageError) as error:
            answer = self._refusal(error, scope)
        await (answer or self._app)(scope, receive, send)

    def _refusal(self, error: LogitstoreError, scope: Scope) -> Response:
        REFUSALS.labels(error.kind).inc()
        page = self._ring is not None and login.is_page(scope)
        answer = login.refusal(error, scope) if page else problem(error, scope)
        if scope["state"].get("forged_session"):
            # Signed before a restart, as a rule; sent again and again, it would count as guessing.
            self._sessions.take(answer, secure=scope["scheme"] == "https")
        return answer

    def _access(self, scope: Scope) -> Access:
        address = _address(scope)
        if self._ring is None:
            return Access(f"address:{address}", self._all, metrics=True)
        if is_open(scope["path"]):
            return Access(f"address:{address}", self._public, metrics=False)
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if sent:
            scheme, _, text = sent[0].decode("latin-1").partition(" ")
            key = self._ring.find(text.strip()) if scheme.lower() == "bearer" else None
            key = self._checked(key, address)
        else:
            key = self._of_session(scope, address)
            if key is None:
                return Access(f"address:{address}", self._public, metrics=False)
        return self._access_of(key)

    def plain_access(self, scope: Scope) -> tuple[Access, Key | None] | None:
        """What a request for a store may see and by which key, where that needs nothing to be
        counted or remembered and no cookie; None: the chain decides."""
        address = _address(scope)
        if self._ring is None:
            return Access(f"address:{address}", self._all, metrics=True), None
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if not sent:
            return Access(f"address:{address}", self._public, metrics=False), None
        scheme, _, text = sent[0].decode("latin-1").partition(" ")
        if len(sent) > 1 or scheme.lower() != "bearer":
            return None
        try:
            key = self._ring.find(text.strip())
        except StorageError:
            return None
        if key is None or (address, key.id) not in self._known:
            return None
        return self._access_of(key), key

    def is_still_valid(self, key: Key | None) -> bool:
        """Whether what `plain_access` found by the key is what it would find now."""
        if self._ring is None or key is None:
            return True
        try:
            # The ring makes new objects when it reads its file again.
            return self._ring.valid(key.id) is key
        except StorageError:
            return False

    def _access_of(self, key: Key) -> Access:
        stores = frozenset(name for name in self._all if key.may_read(name))
        return Access(f"key:{key.id}", stores | self._public, key.metrics)

    def _of_session(self, scope: Scope, address: str) -> Key | None:
        """The key that a browser has logged in with, if it has and the key is still valid."""
        assert self._ring is not None
        if scope["method"] not in ("GET", "HEAD"):
            return None
        try:
            key_id = self._sessions.key_id(scope)
        except BadSignature:
            scope["state"]["forged_session"] = True
            return self._checked(None, address)
        key = None if key_id is None else self._ring.valid(key_id)
        if key is not None:
            scope["state"]["has_session"] = True
            self._checked(key, address)
        return key

    def _checked(self, key: Key | None, address: str) -> Key:
        """The key, unless it is none or too many wrong ones came from the address."""
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
        return key

    async def _login_or_out(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer to a request about logging in; None for every other request."""
        path, method, secure = scope["path"], scope["method"], scope.get("scheme") == "https"
        if self._ring is None or path not in (login.LOGIN_PATH, login.LOGOUT_PATH):
            return None
        if method == "POST" and path == login.LOGOUT_PATH:
            answer = login.to_page(scope)
            self._sessions.take(answer, secure=secure)
            return answer
        if path == login.LOGIN_PATH and method in ("GET", "HEAD"):
            return login.login_page(scope)
        if path == login.LOGIN_PATH and method == "POST":
            return await self._log_in(scope, receive, secure=secure)
        allow = "POST" if path == login.LOGOUT_PATH else "GET, HEAD, POST"
        raise ServiceError(
            "method-not-allowed", KINDS["method-not-allowed"], headers={"Allow": allow}
        )

    async def _log_in(self, scope: Scope, receive: Receive, *, secure: bool) -> Response:
        assert self._ring is not None
        form = await login.posted_form(scope, receive)
        foreign = login.has_foreign_origin(scope)
        try:
            found = None if foreign else self._ring.find(form.get("key", "").strip())
            key = self._checked(found, _address(scope))
        except ServiceError as error:
            REFUSALS.labels(error.kind).inc()
            return login.login_page(scope, error, then=form.get("then", ""), was_wrong=True)
        answer = login.to_page(scope, form.get("then", ""))
        self._sessions.give(answer, key.id, secure=secure)
        return answer

    def _allow(self, path: str, access: Access) -> None:
        if is_open(path):
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
        elif (
            path not in _COMMON_PATHS
            and not _COMPARE_PATH.fullmatch(path)
            and access.stores != self._all
        ):
            raise ServiceError("path-not-found", "the service has no such path")


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"


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
