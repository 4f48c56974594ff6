"""Keys for browsers: a form that takes a key once, and the signed cookie that stands for it.

The cookie holds the key's id and the time; the key itself is in no URL, cookie or page. It counts
for GET and HEAD alone, and only while the key it was given for is valid, so that revoking a key
ends its sessions. Nothing is kept about sessions: any worker that knows the secret agrees.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from itsdangerous import SignatureExpired, TimestampSigner
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Receive, Scope

from logitstore.spec.errors import KINDS, LogitstoreError
from logitstore_server.problems import problem, status_of
from logitstore_server.settings import ServerSettings
from logitstore_server.viewer import SECURITY_HEADERS, Links
from logitstore_server.viewer.formats import FILTERS

__all__ = [
    "LOGIN_PATH",
    "LOGOUT_PATH",
    "Sessions",
    "has_foreign_origin",
    "is_page",
    "login_page",
    "posted_form",
    "refusal",
    "to_page",
]

LOGIN_PATH = "/login"
LOGOUT_PATH = "/logout"
_COOKIE = "logitstore-session"
_MAX_FORM_BYTES = 8192
# A path of this service. Two slashes or a backslash would be read as another host.
_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")
# The form tells its origin, so that pages of others cannot log anybody in.
_HEADERS = {**SECURITY_HEADERS, "Referrer-Policy": "same-origin", "Cache-Control": "no-store"}

_pages = Environment(
    loader=PackageLoader("logitstore_server.viewer"), autoescape=True, undefined=StrictUndefined
)
_pages.filters.update(FILTERS)  # the layout that it shares with the viewer uses them


class Sessions:
    """Makes and reads the cookie.

    Args:
        settings: its `session_secret`, the same in every worker; a random one where it has none.
    """

    def __init__(self, settings: ServerSettings) -> None:
        given = settings.session_secret
        secret = secrets.token_hex(32) if given is None else given.get_secret_value()
        self._signer = TimestampSigner(
            secret,
            salt="logitstore-session",
            key_derivation="hmac",
            digest_method=hashlib.sha256,
        )
        self._lasts_s = settings.session_s

    def key_id(self, scope: Scope) -> str | None:
        """The id of the key that a request's cookie stands for; None without one, or with an old.

        Raises: BadSignature for one that this service did not make.
        """
        cookie = Request(scope).cookies.get(_COOKIE)
        if not cookie:
            return None
        try:
            return self._signer.unsign(cookie, max_age=self._lasts_s).decode("ascii")
        except SignatureExpired:
            return None

    def give(self, answer: Response, key_id: str, *, secure: bool) -> None:
        """Let a browser keep a session for a key."""
        answer.set_cookie(
            _COOKIE,
            self._signer.sign(key_id).decode("ascii"),
            max_age=self._lasts_s,
            httponly=True,
            samesite="strict",
            secure=secure,
        )

    @staticmethod
    def take(answer: Response, *, secure: bool) -> None:
        """Let a browser forget its session."""
        answer.delete_cookie(_COOKIE, httponly=True, samesite="strict", secure=secure)


def is_page(scope: Scope) -> bool:
    """Whether a person looks: a browser that asks for a page rather than for the API."""
    if scope["path"].startswith("/v1/") or scope["method"] not in ("GET", "HEAD"):
        return False
    accepted = [value for name, value in scope["headers"] if name == b"accept"]
    return any(b"text/html" in value for value in accepted)


def refusal(error: LogitstoreError, scope: Scope) -> Response:
    """An error as a person reads it; without a key, the form that takes one."""
    if error.kind == "key-invalid":
        return login_page(scope, error, then=_address(scope))
    answer = problem(error, scope)
    shown = dict.fromkeys(("where", "got", "expected", "hint"))
    shown |= {"kind": error.kind, "what": KINDS[error.kind]}
    page = _render(scope, "error.html", problem=shown)
    kept = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
    return HTMLResponse(page, status_code=answer.status_code, headers={**_HEADERS, **kept})


def login_page(
    scope: Scope, error: LogitstoreError | None = None, *, then: str = "", was_wrong: bool = False
) -> Response:
    """The form.

    Args:
        error: why it is shown; gives the status and its headers.
        then: path of the service to go to afterwards.
        was_wrong: whether a key was sent.
    """
    limited = error is not None and error.kind == "rate-limited"
    said = ""
    if limited:
        said = "Too many wrong keys came from this address. Try again in a minute."
    elif was_wrong:
        said = "That is no valid key of this service."
    page = _render(scope, "login.html", then=then if _LOCAL.fullmatch(then) else "", said=said)
    headers = {**_HEADERS, **getattr(error, "headers", {})}
    return HTMLResponse(page, status_code=status_of(error) if error else 200, headers=headers)


async def posted_form(scope: Scope, receive: Receive) -> Mapping[str, str]:
    """The fields of a posted form; nothing where it is none, or too long."""
    request = Request(scope, receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = b""
    try:
        async for block in request.stream():
            body += block
            if len(body) > _MAX_FORM_BYTES:
                return {}
    except ClientDisconnect:
        return {}
    if kind != "application/x-www-form-urlencoded":
        return {}
    try:
        fields = parse_qs(body.decode("ascii"), max_num_fields=8)
    except ValueError:
        return {}
    return {name: values[0] for name, values in fields.items()}


def has_foreign_origin(scope: Scope) -> bool:
    """Whether a page of another site sent a form here."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    if origin is None:
        return False
    try:
        host = urlsplit(origin.decode("latin-1")).netloc
    except ValueError:
        return True
    return host.lower() != headers.get(b"host", b"").decode("latin-1").lower()


def to_page(scope: Scope, then: str = "") -> Response:
    """Send a browser on to a path of the service, by default its first page."""
    links = Links(scope.get("root_path", ""))
    where = then if _LOCAL.fullmatch(then) else links.home()
    return RedirectResponse(where, 303, headers=_HEADERS)


def _address(scope: Scope) -> str:
    path = scope.get("raw_path") or b"/"
    query = scope.get("query_string") or b""
    return (path + (b"?" + query if query else b"")).decode("latin-1")


def _render(scope: Scope, template: str, **data: Any) -> str:
    theme = Request(scope).cookies.get("logitstore-theme")
    return _pages.get_template(template).render(
        links=Links(scope.get("root_path", "")),
        theme=theme if theme in ("light", "dark") else None,
        json_address=None,
        show_locations=False,
        num_stores=0,
        has_session=False,
        **data,
    )
