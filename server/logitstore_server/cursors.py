"""Where the next page begins: opaque to clients, and of use only where it was given."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.errors import StateError
from logitstore_server.problems import ServiceError
from logitstore_server.stores import Opened

__all__ = ["make_cursor", "read_cursor"]

_VERSION = 1
_MAX_SAMPLE = 1 << 53


def make_cursor(opened: Opened, question: Any, sample: int) -> str:
    """A cursor to a sample of this snapshot, for this question (JSON-able) alone."""
    content = [_VERSION, *_binding(opened, question), sample]
    return base64.urlsafe_b64encode(canonical_json(content)).decode().rstrip("=")


def read_cursor(cursor: str, opened: Opened, question: Any) -> int:
    """The sample that a cursor leads to.

    Raises: ServiceError cursor-invalid; StateError state-mismatch when the store has grown, since
    samples then have other numbers.
    """
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars="-_", validate=True)
        version, uuid, asked, snapshot, sample = json.loads(data)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise _invalid() from None
    expected = _binding(opened, question)
    if [version, uuid, asked] != [_VERSION, *expected[:2]]:
        raise _invalid()
    if type(sample) is not int or not 0 <= sample <= _MAX_SAMPLE:
        raise _invalid()
    if snapshot != expected[2]:
        raise StateError(
            "state-mismatch", "the store has grown since the cursor was given", hint="begin again"
        )
    return sample


def _binding(opened: Opened, question: Any) -> list[str]:
    return [
        opened.index.store_uuid,
        sha256_hex(canonical_json(question))[:16],
        opened.store.snapshot.digest[:16],
    ]


def _invalid() -> ServiceError:
    return ServiceError(
        "cursor-invalid",
        "the cursor was not given by this service for this store and question",
        hint="leave it out to begin at the start",
    )
