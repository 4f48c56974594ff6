"""A store in a folder: files that appear whole, stay, and never replace one another.

A file is written under a temporary name in its own folder, flushed, linked to its final name
(`link` fails if that name exists), the folder is flushed, and the temporary name removed. A crash
at any point leaves either no file of that name or the whole file.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from logitstore.containers.protocol import crc32c as crc32c_of
from logitstore.spec.errors import FormatError, IntegrityError, StorageError
from logitstore.spec.paths import check_key
from logitstore.store.backend import Entry
from logitstore.store.location import Location
from logitstore.store.lru import ProcessLRU
from logitstore.store.steps import step

__all__ = ["LocalBackend", "OpenFile", "is_temporary", "storage_error"]

# Open mappings per process; each holds a file descriptor, of which a process has often only 1,024.
MAX_MAPPINGS = 256

_FOLDERS = ("tables", "plans", "shards", "commits")

_HASH_BLOCK_BYTES = 4 << 20
# A leading dot keeps temporary names out of the names that a document may hold.
_TEMPORARY = re.compile(r"\.[A-Za-z0-9._-]{1,230}\.[0-9a-f]{8}\.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file name is one that an unfinished write leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


def storage_error(error: OSError, where: object) -> StorageError:
    """The named error for what the operating system said."""
    number = error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            "disk-full",
            "no space left",
            where=where,
            hint="free some space and run the same command again; committed work is kept",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            "permission-denied",
            "the process may not read or write there",
            where=where,
            got=error.strerror,
        )
    return StorageError("storage-failed", "storage operation failed", where=where, got=str(error))


class OpenFile:
    """A file's descriptor, closed when nobody holds this object any more."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class LocalBackend:
    """A folder as storage. Safe to use from several threads, and in forked children."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._root = location.path
        self._durable_folders: set[Path] = set()
        self._mappings: ProcessLRU[str, mmap.mmap] = ProcessLRU(MAX_MAPPINGS, _one)
        self._files: ProcessLRU[str, OpenFile] = ProcessLRU(MAX_MAPPINGS, _one)

    @property
    def open_objects(self) -> int:
        """Files of objects that are held open."""
        return len(self._mappings) + len(self._files)

    # reading

    def get(self, key: str, *, limit_bytes: int, sha256: str | None = None) -> bytes | None:
        path = self._path(key)
        try:
            descriptor = self._open(path)
            if descriptor is None:
                return None
            with open(descriptor, "rb") as file:
                size = os.fstat(descriptor).st_size
                if size <= limit_bytes:
                    return file.read(limit_bytes)
        except OSError as error:
            raise storage_error(error, path) from error
        raise FormatError(
            "document-too-large",
            "file exceeds its size limit",
            where=path,
            got=f"{size} bytes",
            expected=f"at most {limit_bytes}",
        )

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        try:
            mapping = self._mapping(key, size_bytes)
            # Asked again at each read: touching pages of a file that shrank kills the process.
            actual = mapping.size()
        except OSError as error:
            raise storage_error(error, self._path(key)) from error
        if actual != size_bytes:
            raise _size_mismatch(self._path(key), actual, size_bytes)
        return memoryview(mapping)[offset : offset + length]

    def get_chunk(
        self, key: str, offset: int, length: int, *, size_bytes: int, crc32c: int
    ) -> tuple[memoryview, int]:
        data = self.get_range(key, offset, length, size_bytes=size_bytes)
        return data, crc32c_of(data)

    def is_near(self, key: str, offset: int, length: int) -> bool:
        return True

    def open_object(self, key: str, *, size_bytes: int) -> OpenFile:
        """A committed object's file, for who sends it on without looking at it.

        Raises: IntegrityError object-missing, object-size-mismatch; StorageError.
        """
        file = self._files.get(key)
        if file is None:
            file = self._files.put(key, OpenFile(self._open_committed(key, size_bytes)))
        actual = os.fstat(file.descriptor).st_size
        if actual != size_bytes:
            raise _size_mismatch(self._path(key), actual, size_bytes)
        return file

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            descriptor = self._open(path)
            if descriptor is None:
                return None
            try:
                return os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error(error, path) from error

    def list(self, folder: str) -> list[Entry]:
        path = self._folder(folder)
        entries = []
        try:
            with os.scandir(path) as scan:
                for item in scan:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        if item.is_file():
                            status = item.stat()
                            key = f"{folder}/{item.name}" if folder else item.name
                            entries.append(Entry(key, status.st_size, status.st_mtime))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise storage_error(error, path) from error
        return sorted(entries, key=lambda entry: entry.key)

    def _mapping(self, key: str, size_bytes: int) -> mmap.mmap:
        mapping = self._mappings.get(key)
        if mapping is not None:
            return mapping
        descriptor = self._open_committed(key, size_bytes)
        try:
            mapping = mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        return self._mappings.put(key, mapping)

    def _open_committed(self, key: str, size_bytes: int) -> int:
        path = self._path(key)
        try:
            descriptor = self._open(path)
        except OSError as error:
            raise storage_error(error, path) from error
        if descriptor is None:
            raise IntegrityError(
                "object-missing",
                "a committed object is not there",
                where=path,
                hint="restore it from a copy; `logitstore verify` lists all damage",
            )
        actual = os.fstat(descriptor).st_size
        if actual != size_bytes or actual == 0:
            os.close(descriptor)
            raise _size_mismatch(path, actual, size_bytes)
        return descriptor

    def _open(self, path: Path) -> int | None:
        """A descriptor of a regular file inside the store, None when there is none."""
        try:
            # Non-blocking: opening a named pipe must not wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StorageError("storage-failed", "not a regular file", where=path)
            real = os.path.realpath(path)
            root = os.path.realpath(self._root)
            if os.path.commonpath([real, root]) != root:
                raise FormatError(
                    "path-not-allowed",
                    "a link leads out of the store",
                    where=path,
                    got=real,
                    expected=f"a file inside {root}",
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    # writing

    def create(self, key: str, data: bytes, *, kind: str) -> bool:
        writer = self._writer(self._path(key), kind)
        try:
            writer.write(data)
            return writer.publish()
        finally:
            writer.abandon()

    def create_object(self, key: str) -> LocalObjectWriter:
        path = self._path(key)
        return LocalObjectWriter(path, self._writer(path, "object"))

    def probe(self) -> Literal["create-only"]:
        return "create-only"

    def use_single_writer(self) -> None:
        """A copy of a store that was made elsewhere for a single writer: here `create` holds."""

    def settle(self) -> None:
        for folder in (self._root, *(self._root / name for name in _FOLDERS)):
            try:
                if folder.is_dir():
                    _sync_folder(folder)
            except OSError as error:
                raise storage_error(error, folder) from error

    def delete(self, key: str) -> None:
        folder, _, name = key.rpartition("/")
        path = self._folder(folder) / name if is_temporary(name) else self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path) from error

    def close(self) -> None:
        self._mappings.clear()
        self._files.clear()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key, where=str(self._root))

    def _folder(self, folder: str) -> Path:
        return self._path(folder) if folder else self._root

    def _prepare_folder(self, folder: Path) -> None:
        """Create a folder and missing parents, each made durable in the one that holds it."""
        if folder in self._durable_folders:
            return
        existed = folder.is_dir()
        if not existed:
            self._prepare_folder(folder.parent)
            with suppress(FileExistsError):
                os.mkdir(folder)
        try:
            # Also for one that was there: its creator may have died before this.
            _sync_folder(folder.parent)
        except PermissionError:
            if not existed:
                raise
        self._durable_folders.add(folder)

    def _writer(self, path: Path, kind: str) -> _FileWriter:
        try:
            self._prepare_folder(path.parent)
            step(kind, "folder")
            return _FileWriter(path, kind)
        except OSError as error:
            raise storage_error(error, path) from error


class _FileWriter:
    """One file on its way from a temporary name to its final one."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._kind = kind
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = os.open(self._temporary, flags, 0o666)
        step(kind, "open")

    def write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            raise storage_error(error, self._path) from error

    def publish(self) -> bool:
        """Flush, link to the final name and flush the folder; False when the name was taken."""
        try:
            step(self._kind, "filled")
            os.fsync(self.descriptor)
            step(self._kind, "synced")
            created = self._link()
            step(self._kind, "linked")
            # Also for a name that was there: its creator may have died before this.
            _sync_folder(self._path.parent)
            step(self._kind, "durable")
        except OSError as error:
            raise storage_error(error, self._path) from error
        return created

    def _link(self) -> bool:
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise StorageError(
                "storage-failed",
                "the file system has no hard links, with which files are created only once",
                where=self._path,
                hint="keep the store on another file system or in an object store",
            ) from error
        return True

    def abandon(self) -> None:
        """Remove the temporary name and close; harmless when repeated."""
        if self.descriptor < 0:
            return
        descriptor, self.descriptor = self.descriptor, -1
        # What is left behind is found by gc; a failure here must not hide an earlier one.
        with suppress(OSError):
            os.close(descriptor)
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
            step(self._kind, "done")


class LocalObjectWriter:
    """A shard object being written; `file` is what a container writes to."""

    def __init__(self, path: Path, writer: _FileWriter) -> None:
        self._path = path
        self._writer = writer
        self.file: BinaryIO = open(self._writer.descriptor, "w+b", closefd=False)  # noqa: SIM115

    def finish(self) -> tuple[int, str]:
        try:
            self.file.flush()
            self.file.seek(0)
            digest = hashlib.sha256()
            size = 0
            while block := self.file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
        except OSError as error:
            raise storage_error(error, self._path) from error
        try:
            if not self._writer.publish():
                raise StorageError(
                    "storage-failed",
                    "the object's name is taken, although attempts have names of their own",
                    where=self._path,
                )
        finally:
            self.abandon()
        return size, digest.hexdigest()

    def abandon(self) -> None:
        # Unwritten buffers are of no use any more, and a full disk would refuse them again.
        with suppress(OSError, ValueError):
            self.file.close()
        self._writer.abandon()


def _one(_: object) -> int:
    return 1


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_mismatch(path: Path, got: int, expected: int) -> IntegrityError:
    return IntegrityError(
        "object-size-mismatch",
        "object has another size than its commit says",
        where=path,
        got=f"{got} bytes",
        expected=f"{expected} bytes",
        hint="restore it from a copy; `logitstore verify` lists all damage",
    )
