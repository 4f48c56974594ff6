"""From a location to the backend that reads it."""

from __future__ import annotations

import os

from logitstore.store.backend import Backend
from logitstore.store.location import Location, parse_location

__all__ = ["connect"]


def connect(location: str | os.PathLike[str] | Location) -> Backend:
    """The backend of a folder or URL; nothing is read or written yet.

    Raises: StorageError unsupported-url; UsageError bad-argument.
    """
    parsed = parse_location(location)
    if parsed.kind == "local":
        from logitstore.store.local import LocalBackend

        return LocalBackend(parsed)
    from logitstore.store.objects import ObjectBackend

    return ObjectBackend(parsed)
