"""HTTP's rules for one immutable representation: preconditions, ranges and codings.

Source: RFC 9110, sections 8.8 (validators), 12.5.3 (Accept-Encoding), 13 (conditional requests)
and 14 (ranges).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logitstore.spec.errors import KINDS
from logitstore_server.problems import ServiceError

__all__ = ["Answer", "Representation", "accepted_coding", "answer", "header_map"]

_SPEC = re.compile(r"(\d{0,18})-(\d{0,18})")
_TAG = re.compile(r'\s*(W/)?("[^"]*")\s*(?:,|$)')
_QUALITY = re.compile(r"(?:0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


@dataclass(frozen=True)
class Representation:
    """What a GET of a path would send.

    Attributes:
        size_bytes: of all of it.
        etag: strong validator without quotes; a function of the bytes.
        media_type, cache_control: header values.
        coding: content coding, "" for none.
    """

    size_bytes: int
    etag: str
    media_type: str
    cache_control: str
    coding: str = ""
    varies: bool = False


@dataclass(frozen=True)
class Answer:
    """Status, headers and what the body is made of: bytes, or (start, stop) of the
    representation."""

    status: int
    headers: list[tuple[bytes, bytes]]
    parts: Sequence[bytes | tuple[int, int]] = field(default=())


def header_map(scope: Mapping[str, Any]) -> dict[bytes, str]:
    """Request headers by lower-case name; values of a repeated one are joined by commas."""
    headers: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


def answer(shape: Representation, headers: Mapping[bytes, str], *, max_ranges: int) -> Answer:
    """What a GET or HEAD request with these headers gets.

    More than `max_ranges` ranges, and ranges that together are longer than the whole, are refused
    with 416: sending the whole instead would let a small request cause a large answer.

    Raises: ServiceError precondition-failed (412), range-not-satisfiable (416).
    """
    tag = f'"{shape.etag}"'
    common = [
        (b"etag", tag.encode()),
        (b"cache-control", shape.cache_control.encode()),
        (b"accept-ranges", b"bytes"),
        (b"x-content-type-options", b"nosniff"),
    ]
    if shape.varies:
        common.append((b"vary", b"Accept-Encoding"))
    wanted = headers.get(b"if-match")
    if wanted is not None and not _matches(wanted, tag, weak=False):
        raise ServiceError(
            "precondition-failed", KINDS["precondition-failed"], headers={"ETag": tag}
        )
    known = headers.get(b"if-none-match")
    if known is not None and _matches(known, tag, weak=True):
        return Answer(304, common)
    if shape.coding:
        common.append((b"content-encoding", shape.coding.encode()))
    ranges = None
    asked = headers.get(b"range")
    condition = headers.get(b"if-range")
    if asked is not None and (condition is None or condition.strip() == tag):
        ranges = _ranges(asked, shape.size_bytes, max_ranges)
    media_type = (b"content-type", shape.media_type.encode())
    if ranges is None:
        length = (b"content-length", str(shape.size_bytes).encode())
        return Answer(200, [*common, media_type, length], [(0, shape.size_bytes)])
    if len(ranges) == 1:
        start, stop = ranges[0]
        return Answer(
            206,
            [
                *common,
                media_type,
                (b"content-range", f"bytes {start}-{stop - 1}/{shape.size_bytes}".encode()),
                (b"content-length", str(stop - start).encode()),
            ],
            ranges,
        )
    return _multipart(shape, ranges, common)


def _multipart(
    shape: Representation, ranges: list[tuple[int, int]], common: list[tuple[bytes, bytes]]
) -> Answer:
    boundary = f"part-{shape.etag[:32]}"
    parts: list[bytes | tuple[int, int]] = []
    for start, stop in ranges:
        parts.append(
            f"\r\n--{boundary}\r\nContent-Type: {shape.media_type}\r\n"
            f"Content-Range: bytes {start}-{stop - 1}/{shape.size_bytes}\r\n\r\n".encode()
        )
        parts.append((start, stop))
    parts.append(f"\r\n--{boundary}--\r\n".encode())
    size = sum(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in parts)
    headers = [
        *common,
        (b"content-type", f"multipart/byteranges; boundary={boundary}".encode()),
        (b"content-length", str(size).encode()),
    ]
    return Answer(206, headers, parts)


def _ranges(text: str, size: int, max_ranges: int) -> list[tuple[int, int]] | None:
    """Satisfiable ranges as (start, stop), or None where the header is to be ignored."""
    unit, separator, rest = text.partition("=")
    if not separator or unit.strip().lower() != "bytes":
        return None
    # Counted before anything is parsed: a header may hold thousands.
    if rest.count(",") >= max_ranges:
        raise _unsatisfiable(size, f"at most {max_ranges} ranges in one request")
    found = []
    for spec in rest.split(","):
        match = _SPEC.fullmatch(spec.strip())
        if match is None or match[0] == "-":
            return None
        first, last = match[1], match[2]
        if not first:
            start, stop = max(size - int(last), 0), size
        else:
            start = int(first)
            stop = min(int(last) + 1, size) if last else size
            if last and int(last) < start:
                return None
        if start < stop:
            found.append((start, stop))
    if not found:
        raise _unsatisfiable(size, f"ranges below {size}")
    if len(found) > 1 and sum(stop - start for start, stop in found) > size:
        raise _unsatisfiable(size, "ranges that together are no longer than the whole")
    return found


def _unsatisfiable(size: int, expected: str) -> ServiceError:
    return ServiceError(
        "range-not-satisfiable",
        KINDS["range-not-satisfiable"],
        expected=expected,
        headers={"Content-Range": f"bytes */{size}"},
    )


def _matches(field_value: str, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags, or `*`, names the current one."""
    if field_value.strip() == "*":
        return True
    return any(match[2] == tag and (weak or not match[1]) for match in _TAG.finditer(field_value))


def accepted_coding(field_value: str | None, offered: Sequence[str]) -> str:
    """The content coding to use: one of `offered`, best first, or "" for none.

    Raises: ServiceError not-acceptable when identity is excluded and nothing offered is accepted.
    """
    if field_value is None:
        return ""
    quality: dict[str, float] = {}
    for item in field_value.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                value = value.strip()
                weight = float(value) if _QUALITY.fullmatch(value) else 0.0
        if name:
            quality[name] = weight
    others = quality.get("*", 0.0)
    # Identity is accepted unless it is excluded by name, or by `*;q=0` without being named.
    identity = quality.get("identity", others if "*" in quality else 1e-6)
    best, best_quality = "", identity
    for coding in reversed(offered):
        liked = quality.get(coding, others)
        if liked > 0 and liked >= best_quality:
            best, best_quality = coding, liked
    if not best and identity == 0:
        raise ServiceError(
            "not-acceptable",
            "no content coding is acceptable",
            expected=", ".join([*offered, "identity"]),
        )
    return best
