"""What lets a reader in: bearer tokens for http(s), from the environment or a file, each for the
hosts it is meant for.

    LOGITSTORE_TOKEN=ls_...  LOGITSTORE_TOKEN_HOSTS=logits.example,10.0.0.7:8640
    LOGITSTORE_TOKEN_FILE=~/.logitstore-tokens      # lines `HOST TOKEN`, or a token alone

A token without hosts is for one host: the first that the process reads from. Worker processes learn
which that was, so that theirs is not another one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from contextlib import suppress
from urllib.parse import urlsplit

from logitstore.spec.errors import UsageError

__all__ = [
    "STALE_ENVIRONMENT",
    "TOKEN",
    "TOKEN_FILE",
    "TOKEN_HOSTS",
    "bearer_token",
    "bound_host",
    "environment_mark",
    "is_environment",
    "without_token",
]

TOKEN = "LOGITSTORE_TOKEN"
TOKEN_FILE = "LOGITSTORE_TOKEN_FILE"
TOKEN_HOSTS = "LOGITSTORE_TOKEN_HOSTS"

STALE_ENVIRONMENT = (
    "this process has other credentials or addresses in its environment than the one that opened "
    "the store: a fork server keeps the variables that it began with. Set them before the first "
    "worker, or start workers with multiprocessing_context='spawn'"
)
_CREDENTIALS = ("LOGITSTORE_TOKEN", "AWS_", "GOOGLE_", "AZURE_")

# What RFC 6750 allows in a header; anything else could start another header.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_HOST = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_MAX_FILE_CHARACTERS = 65_536
_PORTS = {"http": 80, "https": 443}

# Token without hosts -> the host that it is for, `host:port`.
_bound: dict[str, str] = {}


def bearer_token(url: str, *, first_host: str | None = None) -> str | None:
    """The token for the host of an http(s) URL, None where there is none for it.

    Environment and file are read anew for each connection; `LOGITSTORE_TOKEN` wins over the file.

    Args:
        first_host: that of the process which opened the store, as `bound_host` told it there.

    Raises: UsageError bad-argument, which never shows a token.
    """
    host = _host_of(url)
    for hosts, token in _tokens():
        if hosts is None:
            if _bound.setdefault(token, first_host or host) == host:
                return token
        elif any(entry in (host, host.rpartition(":")[0]) for entry in hosts):
            return token
    return None


def bound_host() -> str | None:
    """The host that a token without hosts is for, None while there is none."""
    with suppress(UsageError):
        for hosts, token in _tokens():
            if hosts is None:
                return _bound.get(token)
    return None


def environment_mark() -> tuple[bytes, bytes]:
    """What another process can compare its credentials with, and learn nothing from."""
    salt = secrets.token_bytes(16)
    return salt, _environment_digest(salt)


def is_environment(mark: tuple[bytes, bytes]) -> bool:
    """Whether this process has the credentials of the one that made the mark."""
    salt, digest = mark
    return hmac.compare_digest(_environment_digest(salt), digest)


def _environment_digest(salt: bytes) -> bytes:
    found = sorted(pair for pair in os.environ.items() if pair[0].startswith(_CREDENTIALS))
    return hmac.digest(salt, repr(found).encode(), hashlib.sha256)


def without_token(text: str) -> str:
    """`text` with all tokens blotted out, should a server have sent one back."""
    for _, token in _tokens():
        text = text.replace(token, "***")
    return text


def _tokens() -> list[tuple[tuple[str, ...] | None, str]]:
    """Each token with its hosts; None: it names none."""
    token = os.environ.get(TOKEN, "").strip()
    hosts = tuple(word for word in re.split(r"[,\s]+", os.environ.get(TOKEN_HOSTS, "")) if word)
    hosts = tuple(_checked_host(host, TOKEN_HOSTS) for host in hosts)
    found = [(hosts or None, _checked(token, TOKEN))] if token else []
    path = os.environ.get(TOKEN_FILE)
    if path:
        found += _from_file(path, hosts or None)
    return found


def _from_file(
    path: str, hosts: tuple[str, ...] | None
) -> list[tuple[tuple[str, ...] | None, str]]:
    source = f"{TOKEN_FILE} {path}"
    try:
        with open(os.path.expanduser(path), encoding="ascii") as file:
            text = file.read(_MAX_FILE_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "bad-argument", f"the token cannot be read: {error}", where=source
        ) from None
    lines = [line.split() for line in text.splitlines()]
    lines = [words for words in lines if words and not words[0].startswith("#")]
    if len(lines) == 1 and len(lines[0]) == 1:
        return [(hosts, _checked(lines[0][0], source))]
    if not all(len(words) == 2 for words in lines):
        raise UsageError(
            "bad-argument",
            "not a file of tokens",
            where=source,
            expected="one token, or lines of a host, a space and its token",
        )
    return [((_checked_host(host, source),), _checked(token, source)) for host, token in lines]


def _checked(token: str, source: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise UsageError(
            "bad-argument",
            "not a bearer token",
            where=source,
            expected="one line of letters, digits and . _ ~ + / - =",
        )
    return token


def _checked_host(host: str, source: str) -> str:
    if not _HOST.fullmatch(host.lower()):
        # Not shown: in a file whose columns are swapped it is the token.
        raise UsageError(
            "bad-argument",
            "not a host",
            where=source,
            expected="HOST or HOST:PORT, without http://",
        )
    return host.lower()


def _host_of(url: str) -> str:
    """`host:port`, in lower case."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return f"{name}:{parts.port or _PORTS[parts.scheme]}"
