"""What lets a reader in: a bearer token for http(s), from the environment or a file."""

from __future__ import annotations

import os
import re

from logitstore.spec.errors import UsageError

__all__ = ["TOKEN", "TOKEN_FILE", "bearer_token", "without_token"]

TOKEN = "LOGITSTORE_TOKEN"
TOKEN_FILE = "LOGITSTORE_TOKEN_FILE"

# What RFC 6750 allows in a header; anything else could start another header.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


def bearer_token() -> str | None:
    """The token for http(s) stores: `LOGITSTORE_TOKEN`, else the content of the file that
    `LOGITSTORE_TOKEN_FILE` names, else None. The file is read anew for each connection.

    Raises: UsageError bad-argument, which never shows the token.
    """
    token, source = os.environ.get(TOKEN), TOKEN
    path = os.environ.get(TOKEN_FILE)
    if not token and path:
        source = f"{TOKEN_FILE} {path}"
        try:
            with open(path, encoding="ascii") as file:
                token = file.read(65_536)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                "bad-argument", f"the token cannot be read: {error}", where=source
            ) from None
    if not token:
        return None
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise UsageError(
            "bad-argument",
            "not a bearer token",
            where=source,
            expected="one line of letters, digits and . _ ~ + / - =",
        )
    return token


def without_token(text: str) -> str:
    """`text` with the token blotted out, should a server have sent it back."""
    token = bearer_token()
    return text.replace(token, "***") if token else text
