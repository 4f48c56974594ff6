"""From a location to the backend that reads it."""

from __future__ import annotations

import os

from logitstore.spec.errors import UsageError
from logitstore.store.backend import Backend, ReadBackend
from logitstore.store.location import Location, parse_location

__all__ = ["connect", "connect_reader"]


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


def connect_reader(
    location: str | os.PathLike[str] | Location,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_limit_bytes: int | None = None,
    offline: bool = False,
) -> ReadBackend:
    """What reads a folder or URL; a remote one through a cache, if a folder for it is given.

    Raises: StorageError; UsageError bad-argument.
    """
    parsed = parse_location(location)
    if parsed.kind == "local":
        return connect(parsed)
    if offline and cache_dir is None:
        raise UsageError(
            "bad-argument",
            "offline, and no cache to read from",
            where=parsed,
            expected="cache_dir=FOLDER, the one that was read through before",
        )
    from logitstore.store.cache import Cache
    from logitstore.store.remote import RemoteReader

    cache = None if cache_dir is None else Cache(cache_dir, cache_limit_bytes)
    return RemoteReader(parsed, cache, offline=offline)
