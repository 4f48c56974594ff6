"""JSON documents that notice every flipped bit.

A document file is exactly

    {"sha256":"<64 hex digits>","body":<body>}\n

where the digest is SHA-256 over the exact bytes of `<body>`. Nothing is re-serialised to check it,
so a flip anywhere (in the frame, the digest or the body) is an error. Bare JSON would not do: about
a third of random bit flips in it parse to another valid value.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from logitstore.spec.errors import FormatError, IntegrityError

__all__ = ["MAX_DOCUMENT_BYTES", "Document", "Strict", "canonical_json", "read_body", "sha256_hex"]

# An index of 100,000 shards with statistics stays below this; a larger document is an attack or a
# mistake.
MAX_DOCUMENT_BYTES = 256 * 1024 * 1024

_HEAD = b'{"sha256":"'
_MIDDLE = b'","body":'
_TAIL = b"}\n"
_FRAME_BYTES = len(_HEAD) + 64 + len(_MIDDLE) + len(_TAIL)


class Strict(BaseModel):
    """Base of every part of a document: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Document(Strict):
    """A document with a frame. Subclasses set `document_name`, used in messages."""

    document_name: ClassVar[str] = "document"

    def encode(self) -> bytes:
        """The file's bytes."""
        body = canonical_json(self.model_dump(mode="json", exclude_none=True))
        return _HEAD + sha256_hex(body).encode() + _MIDDLE + body + _TAIL

    @property
    def body_sha256(self) -> str:
        """Digest of the body as `encode` writes it."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude_none=True)))

    @classmethod
    def check_version(cls, body: Any, *, where: str) -> None:
        """Refuse a body this version cannot read before any other rule is applied to it."""

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Self:
        """Check frame, digest and rules of a file's bytes.

        Raises: FormatError document-malformed, document-too-large, document-invalid;
        IntegrityError document-hash-mismatch.
        """
        body = read_body(data, where=where)
        cls.check_version(_strict_json(body, where), where=where)
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            problems = [
                f"{'.'.join(str(p) for p in e['loc']) or cls.document_name}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False)
            ]
            raise FormatError(
                "document-invalid",
                f"not a valid {cls.document_name}: " + "; ".join(problems[:8]),
                where=where,
                data={"problems": problems},
            ) from None


def canonical_json(value: Any) -> bytes:
    """Compact UTF-8 JSON with sorted keys: what documents are written as and fingerprints taken
    over."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """Lower-case hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def read_body(data: bytes, *, where: str) -> bytes:
    """The body's exact bytes, after checking frame and digest."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise FormatError(
            "document-too-large",
            "document exceeds its size limit",
            where=where,
            got=f"{len(data)} bytes",
            expected=f"at most {MAX_DOCUMENT_BYTES}",
        )
    body_start = len(_HEAD) + 64 + len(_MIDDLE)
    framed = (
        len(data) > _FRAME_BYTES
        and data.startswith(_HEAD)
        and data[len(_HEAD) + 64 : body_start] == _MIDDLE
        and data.endswith(_TAIL)
    )
    if not framed:
        raise FormatError(
            "document-malformed",
            "not a logitstore document",
            where=where,
            got=repr(data[:40]) + (f" ... ({len(data)} bytes)" if len(data) > 40 else ""),
            expected='{"sha256":"...","body":...} and a newline',
            hint="the file is truncated, damaged or of another kind; see `logitstore verify`",
        )
    digest = data[len(_HEAD) : len(_HEAD) + 64]
    body = data[body_start : -len(_TAIL)]
    actual = sha256_hex(body)
    if digest != actual.encode():
        raise IntegrityError(
            "document-hash-mismatch",
            "document does not match its digest",
            where=where,
            got=actual,
            expected=digest.decode("ascii", "replace"),
            hint="restore the document from a copy; `logitstore verify` lists all damage",
        )
    return body


def _strict_json(body: bytes, where: str) -> Any:
    """Refuse duplicate keys, NaN, very deep nesting and bad UTF-8, which parsers tolerate
    differently."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {twice!r} appears twice")
        return out

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits} is too large")
        return value

    try:
        text = body.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=finite
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "document-malformed", f"body is not strict JSON: {error}", where=where
        ) from None
