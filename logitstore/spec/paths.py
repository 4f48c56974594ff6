"""Names inside a store: plain relative keys only."""

from __future__ import annotations

import re

from logitstore.spec.errors import FormatError

__all__ = ["check_key"]

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_key(key: str, *, where: str) -> str:
    """`key` when it is a plain relative path of at most four safe segments.

    Refuses absolute paths, `..`, empty segments, drive letters, backslashes, NUL, percent-encoding
    and anything else outside `[A-Za-z0-9._-]`, so that a document can never point out of its store.

    Raises: FormatError path-not-allowed.
    """
    segments = key.split("/")
    if not 1 <= len(segments) <= 4 or not all(_SEGMENT.fullmatch(s) for s in segments):
        raise FormatError(
            "path-not-allowed",
            "name is not a plain relative path",
            where=where,
            got=repr(key[:200]),
            expected="segments of letters, digits, '.', '_', '-', joined by '/'",
        )
    return key
