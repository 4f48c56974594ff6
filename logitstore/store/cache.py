"""A folder that keeps what was read from remote stores, for all processes of one user on one host.

Entries are files that appear whole (temporary name, then rename) and hold their own checksum.
Losing one costs a download, so nothing is flushed to disk; what a crash tears is found by its
checksum. The least recently used go first: reading an entry sets its file's time.

    <folder>/logitstore-cache-1/lock          held while an entry is added or entries are removed
                                size          bytes of all entries; at most too high after a crash
                                tmp/          entries being written
                                stores/<id>/  entries of one store, under its keys
                                stores/<id>/in-use   locked while a process depends on the entries
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from logitstore.containers.protocol import crc32c
from logitstore.spec.errors import StorageError, UsageError
from logitstore.store.local import storage_error
from logitstore.store.mapping import mapped

__all__ = ["DEFAULT_LIMIT_BYTES", "Cache", "InUse"]

DEFAULT_LIMIT_BYTES = 50 * 10**9

_FOLDER = "logitstore-cache-1"
_IN_USE = "in-use"
_CHECKSUM = struct.Struct("<I")
# Room is made in portions, since finding the oldest entries means looking at all of them.
_KEEP_SHARE = 0.9
# No process needs this long to write one entry: its writer has died.
_ABANDONED_S = 3600.0
# Chunks go before the documents without which they cannot be found.
_CHUNKS = "shards"

_SIZE_DIGITS = 20

# Smaller entries are read, since a mapping takes as long as copying them does.
_MAP_FROM_BYTES = 1 << 16

_log = logging.getLogger("logitstore")


class InUse:
    """While it is held, no process removes entries of one store. A process that dies lets go."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Cache:
    """Entries by name, up to a total size. Safe to use from threads, processes and forked children.

    Args:
        folder: made when missing, for this user alone; on a disk of this host.
        limit_bytes: of all entries; processes that share a folder should name the same.

    Raises: UsageError bad-argument; StorageError permission-denied when others may write to the
    folder (they could plant entries there), disk-full, storage-failed.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int | None = None) -> None:
        self.limit_bytes = DEFAULT_LIMIT_BYTES if limit_bytes is None else limit_bytes
        if self.limit_bytes <= 0:
            raise UsageError(
                "bad-argument", "must be positive", where="cache_limit_bytes", got=limit_bytes
            )
        self.folder = Path(folder).expanduser().absolute() / _FOLDER
        self._told = False
        try:
            for each in (self.folder, self.folder / "tmp", self.folder / "stores"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.folder)
            self._remove_abandoned()
        except OSError as error:
            raise _named(error, self.folder) from error

    def read(self, name: str) -> bytes | None:
        """An entry's bytes, None when it is not there. A damaged one is removed."""
        found = self.read_checked(name)
        return None if found is None else bytes(found[0])

    def read_checked(self, name: str) -> tuple[memoryview, int] | None:
        """An entry's bytes, and the CRC-32C that they were found to have.

        They are a view of the file's pages, if there are many. An entry's file is never written to
        again, and stays readable for who maps it when it is removed.
        """
        path = self._path(name)
        try:
            data = _contents(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell("not read from the cache", error)
            return None
        body = data[: -_CHECKSUM.size]
        checksum = crc32c(body)
        if len(data) > _CHECKSUM.size and data[len(body) :] == _CHECKSUM.pack(checksum):
            return body, checksum
        _log.warning("%s: damaged entry of the cache removed", path)
        self.remove(name)
        return None

    def holds(self, name: str) -> bool:
        """Whether an entry is there; its bytes are not looked at."""
        return os.path.isfile(self._path(name))

    def read_ahead(self, name: str) -> bool:
        """Whether an entry is there; the disk begins to read it."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        return True

    def write(
        self,
        name: str,
        data: bytes | memoryview,
        *,
        checksum: int | None = None,
        replace: bool = False,
    ) -> bool:
        """Add an entry; False when there is no room beside what is in use, or the disk refuses.

        Args:
            checksum: CRC-32C of the data, where the caller knows it.
            replace: also when an entry of that name is there.
        """
        try:
            if checksum is None:
                checksum = crc32c(data)
            return self._write(self._path(name), data, checksum, replace)
        except OSError as error:
            self._tell("not cached", error)
            return False

    def remove(self, name: str) -> None:
        """Remove an entry; it may be gone already."""
        with suppress(OSError), self._locked():
            path = self._path(name)
            size = os.stat(path).st_size
            os.unlink(path)
            self._set_size(self._size() - size)

    def in_use(self, store: str) -> InUse:
        """Keep the entries `stores/<store>/...` until it is closed.

        Raises: StorageError.
        """
        try:
            with self._locked():  # no folder is removed meanwhile
                folder = self.folder / "stores" / store
                folder.mkdir(mode=0o700, exist_ok=True)
                return InUse(folder / _IN_USE)
        except OSError as error:
            raise _named(error, self.folder) from error

    def stores(self, prefix: str) -> list[str]:
        """Stores whose id begins so, the one opened last first."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.folder / "stores") as entries:
            for entry in entries:
                if entry.name.startswith(prefix):
                    with suppress(FileNotFoundError):
                        opened = os.stat(Path(entry.path) / "store.json").st_mtime_ns
                        found.append((-opened, entry.name))
        return [name for _, name in sorted(found)]

    def size_bytes(self) -> int:
        """Bytes of all entries, counted on the disk."""
        return sum(entry.size for entry in self._entries())

    def _tell(self, what: str, error: OSError) -> None:
        """Once. Reading goes on without: a cache is not worth a training run."""
        if not self._told:
            self._told = True
            _log.warning("%s: %s: %s", self.folder, what, error)

    def _path(self, name: str) -> str:
        # Not a Path: joining its parts takes longer than opening the file.
        return f"{self.folder}/stores/{name}"

    def _write(self, path: str, data: bytes | memoryview, checksum: int, replace: bool) -> bool:
        parts = [memoryview(data), memoryview(_CHECKSUM.pack(checksum))]
        size = sum(len(part) for part in parts)
        temporary = f"{self.folder}/tmp/{secrets.token_hex(16)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o600), "wb", buffering=0) as file:
                _write_all(file.fileno(), parts)
            with self._locked():
                before = _size_of(path)
                if before and not replace:
                    return True
                held = self._size() - before
                if held + size > self.limit_bytes:
                    held = self._make_room(size) - _size_of(path)
                if held + size > self.limit_bytes:
                    return False
                # Before the rename: a crash between them leaves a size that is too high, and the
                # next search for room counts again.
                self._set_size(held + size)
                try:
                    os.rename(temporary, path)
                except FileNotFoundError:
                    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                    os.rename(temporary, path)
                return True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def _make_room(self, size: int) -> int:
        """Remove the oldest entries that nobody depends on; bytes that are left."""
        entries = sorted(self._entries(), key=lambda e: (not e.is_chunk, e.used_ns))
        held = sum(entry.size for entry in entries)
        goal = min(self.limit_bytes - size, int(self.limit_bytes * _KEEP_SHARE))
        kept: dict[Path, bool] = {}
        for entry in entries:
            if held <= goal:
                break
            if entry.store not in kept:
                kept[entry.store] = _is_in_use(entry.store)
            if not kept[entry.store]:
                entry.path.unlink(missing_ok=True)
                held -= entry.size
                # Fails while the folder holds anything; new entries wait for the lock.
                with suppress(OSError):
                    entry.path.parent.rmdir()
        self._set_size(held)
        self._remove_abandoned()
        return held

    def _entries(self) -> Iterator[_Entry]:
        for folder, _, files in os.walk(self.folder / "stores"):
            place = Path(folder).relative_to(self.folder / "stores").parts
            for name in files:
                if name == _IN_USE:
                    continue
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield _Entry(
                        path,
                        self.folder / "stores" / place[0],
                        _CHUNKS in place,
                        status.st_size,
                        status.st_mtime_ns,
                    )

    def _remove_abandoned(self) -> None:
        for path in (self.folder / "tmp").iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()

    def _size(self) -> int:
        try:
            with open(f"{self.folder}/size", "rb", buffering=0) as file:
                return int(file.read(_SIZE_DIGITS))
        except (FileNotFoundError, ValueError):
            return self.size_bytes()

    def _set_size(self, size: int) -> None:
        # Written over and never cut: file systems flush a file that was cut and written again.
        descriptor = os.open(f"{self.folder}/size", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, b"%0*d" % (_SIZE_DIGITS, max(0, size)), 0)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(f"{self.folder}/lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # Said aloud: a child that was forked meanwhile holds the same lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


class _Entry:
    __slots__ = ("is_chunk", "path", "size", "store", "used_ns")

    def __init__(self, path: Path, store: Path, is_chunk: bool, size: int, used_ns: int) -> None:
        self.path, self.store, self.is_chunk = path, store, is_chunk
        self.size, self.used_ns = size, used_ns


def _contents(path: str) -> memoryview:
    data = mapped(path) if os.stat(path).st_size >= _MAP_FROM_BYTES else None
    if data is None:
        with open(path, "rb", buffering=0) as file:
            data = memoryview(file.readall())
    return data


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    while parts:
        done = os.writev(descriptor, parts)
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][done:]


def _size_of(path: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(path).st_size
    return 0


def _is_in_use(store: Path) -> bool:
    try:
        descriptor = os.open(store / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or mode & 0o022:
        raise StorageError(
            "permission-denied",
            "others may write to the cache, and could plant entries there",
            where=folder,
            got=f"owner {status.st_uid}, mode {mode:04o}",
            expected=f"owner {os.geteuid()}, mode 0700",
            hint="name another cache folder, or remove this one",
        )


def _named(error: OSError, where: object) -> StorageError:
    return error if isinstance(error, StorageError) else storage_error(error, where)
