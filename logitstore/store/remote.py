"""Reading a remote store: each byte checked as it arrives, asked for again when it is damaged, and
kept in the host's cache."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from typing import Any, NoReturn

from logitstore.containers.protocol import crc32c as crc32c_of
from logitstore.spec.document import read_body, sha256_hex
from logitstore.spec.errors import LogitstoreError, NotFoundError
from logitstore.spec.paths import check_key
from logitstore.store.backend import Entry
from logitstore.store.cache import Cache, InUse
from logitstore.store.documents import COMMITS_FOLDER, HEADER_KEY, INDEX_KEY
from logitstore.store.location import Location
from logitstore.store.objects import ObjectBackend

__all__ = ["RemoteReader"]

_ID_DIGITS = 32

_log = logging.getLogger("logitstore")


class RemoteReader:
    """The reading half of a backend, for one store.

    A store's entries lie in the cache under the digests of its location and of its header, so that
    neither another server nor another store at the same place can answer for it. Below, names that
    are created once (plans, commits, tables, objects) need no further question; header, index and
    lists of names are asked for at each opening, and the last answer serves offline.

    Args:
        offline: the cache only; no request is made.
    """

    def __init__(self, location: Location, cache: Cache | None, *, offline: bool = False) -> None:
        self.location = location
        self._source = ObjectBackend(location)
        self._cache = cache
        self._offline = offline
        self._id: str | None = None
        self._in_use: InUse | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_in_use": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._hold()

    def get(self, key: str, *, limit_bytes: int, sha256: str | None = None) -> bytes | None:
        if key == HEADER_KEY:
            return self._header(limit_bytes)
        mutable = key == INDEX_KEY
        if self._offline or not mutable:
            data = self._read(key)
            if data is not None and len(data) <= limit_bytes:
                return data
        if self._offline:
            if mutable and self._read(f"lists/{COMMITS_FOLDER}") is not None:
                return None  # it was not sealed when it was read last
            self._refuse_missing(key)
        data = self._fetch(key, limit_bytes, sha256)
        if data is not None and _is_intact(data, key, sha256):
            self._write(key, data, replace=mutable)
        return data

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        if self._offline:
            self._refuse_missing(f"{key} bytes {offset} to {offset + length}")
        return self._source.get_range(key, offset, length, size_bytes=size_bytes)

    def get_chunk(
        self, key: str, offset: int, length: int, *, size_bytes: int, crc32c: int
    ) -> tuple[memoryview, int]:
        name = _range_name(key, offset, length)
        held = self._read_checked(name)
        # Its own checksum was right; this compares it with what the commit now says.
        if held is not None and len(held[0]) == length and held[1] == crc32c:
            return held
        view = self.get_range(key, offset, length, size_bytes=size_bytes)
        found = crc32c_of(view)
        if found != crc32c:
            self._tell_damaged(key)
            view = self.get_range(key, offset, length, size_bytes=size_bytes)
            found = crc32c_of(view)
        if found == crc32c:
            self._write(name, view, checksum=found, replace=True)
        return view, found

    def list(self, folder: str) -> list[Entry]:
        name = f"lists/{folder}"
        if not self._offline:
            entries = self._source.list(folder)
            self._write(name, json.dumps([asdict(e) for e in entries]).encode(), replace=True)
            return entries
        data = self._read(name)
        if data is None:
            self._refuse_missing(folder)
        return [Entry(**entry) for entry in json.loads(data)]

    def holds(self, key: str, offset: int, length: int) -> bool:
        """Whether the cache has this range of an object."""
        name = _range_name(key, offset, length)
        return self._cache is not None and self._cache.holds(f"{self._id}/{name}")

    def is_near(self, key: str, offset: int, length: int) -> bool:
        name = _range_name(key, offset, length)
        return self._cache is not None and self._cache.read_ahead(f"{self._id}/{name}")

    @property
    def offline(self) -> bool:
        """Whether only the cache is read."""
        return self._offline

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that open this store again in the same way."""
        if self._cache is None:
            return {}
        return {
            "cache_dir": self._cache.folder.parent,
            "cache_limit_bytes": self._cache.limit_bytes,
            "offline": self._offline,
        }

    def close(self) -> None:
        self._source.close()
        if self._in_use is not None:
            self._in_use.close()
            self._in_use = None

    def _refuse_missing(self, what: str) -> NoReturn:
        assert self._cache is not None
        raise NotFoundError(
            "not-cached",
            "offline, and not in the cache",
            where=f"{self.location}/{what}",
            expected=f"everything that is read, in {self._cache.folder}",
            hint="read it once without offline=True and with the same cache_dir, or use "
            "`logitstore copy`",
        )

    def _header(self, limit_bytes: int) -> bytes | None:
        place = sha256_hex(str(self.location).encode())[:_ID_DIGITS]
        if self._offline:
            assert self._cache is not None
            for found in self._cache.stores(place):
                self._id = found
                data = self._read(HEADER_KEY)
                if data is not None:
                    self._hold()
                    return data
            self._refuse_missing(HEADER_KEY)
        data = self._fetch(HEADER_KEY, limit_bytes, None)
        if data is not None and _is_intact(data, HEADER_KEY, None):
            self._id = f"{place}-{sha256_hex(data)[:_ID_DIGITS]}"
            self._write(HEADER_KEY, data, replace=True)
        return data

    def _fetch(self, key: str, limit_bytes: int, sha256: str | None) -> bytes | None:
        data = self._source.get(key, limit_bytes=limit_bytes)
        if data is not None and not _is_intact(data, key, sha256):
            self._tell_damaged(key)
            data = self._source.get(key, limit_bytes=limit_bytes)
        return data

    def _tell_damaged(self, key: str) -> None:
        _log.warning("%s/%s: arrived damaged; asking once more", self.location, key)

    def _read(self, name: str) -> bytes | None:
        found = self._read_checked(name)
        return None if found is None else bytes(found[0])

    def _read_checked(self, name: str) -> tuple[memoryview, int] | None:
        if self._cache is None or self._id is None:
            return None
        check_key(name, where=str(self.location))
        return self._cache.read_checked(f"{self._id}/{name}")

    def _write(
        self,
        name: str,
        data: bytes | memoryview,
        *,
        checksum: int | None = None,
        replace: bool = False,
    ) -> None:
        if self._cache is not None and self._id is not None:
            check_key(name, where=str(self.location))
            self._cache.write(f"{self._id}/{name}", data, checksum=checksum, replace=replace)

    def _hold(self) -> None:
        """Offline, what is removed cannot be had again."""
        if self._offline and self._cache is not None and self._id is not None:
            self._in_use = self._cache.in_use(self._id)


def _range_name(key: str, offset: int, length: int) -> str:
    """An object's name is used once, so that name and range stand for the bytes."""
    return f"{key}/{offset}-{length}"


def _is_intact(data: bytes, key: str, sha256: str | None) -> bool:
    """Whether a file is what is expected, or at least what was once written."""
    if sha256 is not None:
        return hashlib.sha256(data).hexdigest() == sha256
    try:
        read_body(data, where=key)
    except LogitstoreError:
        return False
    return True
