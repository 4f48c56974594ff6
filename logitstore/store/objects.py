"""A store in an object store (s3, gs, az) or, read-only, on an HTTP server; through obstore."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from logitstore.spec.errors import FormatError, IntegrityError, LogitstoreError, StorageError
from logitstore.spec.paths import check_key
from logitstore.store.backend import Entry
from logitstore.store.local import storage_error
from logitstore.store.location import Location

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["ObjectBackend"]

# Enough for a restart of a server; a wrong host is reported after a few seconds.
_RETRIES = 6
_RETRY_TIMEOUT = timedelta(seconds=60)

_PROBE_RACERS = 8
_HASH_BLOCK_BYTES = 4 << 20

# The process that first used obstore. Its runtime does not survive a fork: a child's first call
# would wait for ever.
_runtime_pid: int | None = None


def _check_process(location: Location) -> None:
    global _runtime_pid
    pid = os.getpid()
    if _runtime_pid is None:
        _runtime_pid = pid
    elif _runtime_pid != pid:
        raise StorageError(
            "fork-unsafe",
            "a remote store cannot be read in a forked child once the parent has used one",
            where=location,
            got=f"process {pid}, forked from {_runtime_pid}",
            expected="a process started with 'forkserver' or 'spawn'",
            hint="DataLoader(..., multiprocessing_context='forkserver')",
        )


class ObjectBackend:
    """An object store as storage; http(s) locations are read-only and cannot be listed."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._single_writer = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._client: ObjectStore | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"location": self.location, "_single_writer": self._single_writer}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    # reading

    def get(self, key: str, *, limit_bytes: int) -> bytes | None:
        try:
            with self._errors(key, may_be_missing=True):
                result = self._store().get(key)
                size = result.meta["size"]
                if size <= limit_bytes:
                    return bytes(result.bytes())
        except FileNotFoundError:
            return None
        raise FormatError(
            "document-too-large",
            "file exceeds its size limit",
            where=self._where(key),
            got=f"{size} bytes",
            expected=f"at most {limit_bytes}",
        )

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        try:
            with self._errors(key, may_be_missing=True):
                result = self._store().get(key, options={"range": (offset, offset + length)})
                size = result.meta["size"]
                data = memoryview(result.bytes()) if size == size_bytes else memoryview(b"")
        except FileNotFoundError:
            raise IntegrityError(
                "object-missing",
                "a committed object is not there",
                where=self._where(key),
                hint="restore it from a copy; `logitstore verify` lists all damage",
            ) from None
        if size != size_bytes:
            raise IntegrityError(
                "object-size-mismatch",
                "object has another size than its commit says",
                where=self._where(key),
                got=f"{size} bytes",
                expected=f"{size_bytes} bytes",
                hint="restore it from a copy; `logitstore verify` lists all damage",
            )
        if len(data) != length:
            raise StorageError(
                "storage-failed",
                "the server answered with another range than was asked for",
                where=self._where(key),
                got=f"{len(data)} bytes",
                expected=f"{length} bytes from {offset}",
            )
        return data

    def size(self, key: str) -> int | None:
        try:
            with self._errors(key, may_be_missing=True):
                return self._store().head(key)["size"]
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[Entry]:
        self._refuse_http("cannot be listed")
        with self._errors(folder):
            found = self._store().list_with_delimiter(folder or None)["objects"]
        entries = [Entry(m["path"], m["size"], m["last_modified"].timestamp()) for m in found]
        return sorted(entries, key=lambda entry: entry.key)

    # writing

    def create(self, key: str, data: bytes, *, kind: str) -> bool:
        self._refuse_http("cannot be written")
        if self._single_writer:
            # No condition to rely on; the look before is for mistakes, not for races.
            if self.size(key) is not None:
                return False
            with self._errors(key):
                self._store().put(key, data, mode="overwrite", use_multipart=False)
            return True
        return self._create_if_absent(key, data)

    def _create_if_absent(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors(key):
            try:
                self._store().put(key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def create_object(self, key: str) -> RemoteObjectWriter:
        self._refuse_http("cannot be written")
        return RemoteObjectWriter(self, key)

    def upload(self, key: str, file: BinaryIO) -> None:
        """Send an object; it becomes visible as a whole."""
        with self._errors(key):
            self._store().put(key, file, mode="overwrite")

    def probe(self) -> Literal["create-only", "single-writer"]:
        """Let racers create one key: where more than one succeeds, the condition is ignored."""
        self._refuse_http("cannot be written")
        key = f"probes/{secrets.token_hex(8)}"
        with ThreadPoolExecutor(_PROBE_RACERS) as pool:
            won = list(
                pool.map(
                    lambda racer: self._create_if_absent(key, b"racer %d" % racer),
                    range(_PROBE_RACERS),
                )
            )
        won.append(self._create_if_absent(key, b"late"))
        # Left behind where deletion is not allowed; readers never look there.
        with suppress(StorageError):
            self.delete(key)
        # None when the winner's reply was lost.
        return "create-only" if sum(won) <= 1 else "single-writer"

    def use_single_writer(self) -> None:
        self._single_writer = True

    def settle(self) -> None:
        """Nothing to do: an object store answers when it has the bytes."""

    def delete(self, key: str) -> None:
        self._refuse_http("cannot be written")
        with suppress(FileNotFoundError), self._errors(key, may_be_missing=True):
            self._store().delete(key)

    def close(self) -> None:
        with self._lock:
            self._client = None

    def _store(self) -> ObjectStore:
        _check_process(self.location)
        with self._lock:
            if self._client is None:
                self._client = _connect(self.location)
            return self._client

    def _where(self, key: str) -> str:
        return f"{self.location}/{key}" if key else str(self.location)

    def _refuse_http(self, what: str) -> None:
        if self.location.kind == "http":
            raise StorageError(
                "permission-denied", f"a plain HTTP server {what}", where=self.location
            )

    @contextmanager
    def _errors(self, key: str, *, may_be_missing: bool = False) -> Iterator[None]:
        """Turn obstore's errors into ours; FileNotFoundError stays where a key may be missing."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        if key:
            check_key(key, where=str(self.location))
        try:
            yield
        except LogitstoreError:
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StorageError(
                "permission-denied",
                "the object store refuses",
                where=self._where(key),
                got=_first_lines(error),
                hint="credentials are taken from the environment (AWS_*, GOOGLE_*, AZURE_*)",
            ) from error
        except (BaseError, OSError, ValueError) as error:
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            raise StorageError(
                "storage-failed",
                "storage operation failed",
                where=self._where(key),
                got=_first_lines(error),
            ) from error


class RemoteObjectWriter:
    """An object kept in a local temporary file, `file`, until it is whole."""

    def __init__(self, backend: ObjectBackend, key: str) -> None:
        self._backend = backend
        self._key = key
        try:
            self.file: BinaryIO = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, tempfile.gettempdir()) from error

    def finish(self) -> tuple[int, str]:
        try:
            self.file.flush()
            self.file.seek(0)
            digest = hashlib.sha256()
            while block := self.file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
            size = self.file.tell()
            self.file.seek(0)
        except OSError as error:
            raise storage_error(error, tempfile.gettempdir()) from error
        try:
            self._backend.upload(self._key, self.file)
        finally:
            self.abandon()
        return size, digest.hexdigest()

    def abandon(self) -> None:
        with suppress(OSError):
            self.file.close()


def _connect(location: Location) -> ObjectStore:
    from obstore.store import from_url

    url = str(location)
    options: Any = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if url.startswith("http://") or (url.startswith("s3://") and endpoint.startswith("http://")):
        options["allow_http"] = True
    try:
        return from_url(
            url,
            client_options=options,
            retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
        )
    except Exception as error:  # obstore raises several unrelated types for a bad configuration
        raise StorageError(
            "storage-failed", "cannot connect", where=location, got=_first_lines(error)
        ) from error


def _first_lines(error: BaseException) -> str:
    """The message without obstore's multi-line debug rendering of the cause."""
    return " ".join(str(error).split("\n\nDebug source:")[0].split())[:400]
