"""A store in an object store (s3, gs, az) or, read-only, on an HTTP server; through obstore."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from logitstore.containers.protocol import crc32c as crc32c_of
from logitstore.spec.errors import FormatError, IntegrityError, LogitstoreError, StorageError
from logitstore.spec.paths import check_key
from logitstore.store.backend import Entry
from logitstore.store.credentials import (
    STALE_ENVIRONMENT,
    TOKEN,
    TOKEN_FILE,
    TOKEN_HOSTS,
    bearer_token,
    bound_host,
    environment_mark,
    is_environment,
    without_token,
)
from logitstore.store.local import storage_error
from logitstore.store.location import Location
from logitstore.store.retry import retrying
from logitstore.store.retry_after import retry_after_s

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["ObjectBackend"]

# Object stores are tried again by obstore itself first, which knows their errors. It knows no
# Retry-After, so that HTTP servers are left to `retrying`, as is whatever fails for longer.
_RETRIES = 6
_RETRY_TIMEOUT = timedelta(seconds=60)
_BUSY = (429, 503)

_TOKEN_HINT = (
    f"the bearer token is taken from {TOKEN}, or from the file {TOKEN_FILE} names; "
    f"without {TOKEN_HOSTS} it goes to the first host alone"
)
_CREDENTIALS_HINT = "credentials are taken from the environment (AWS_*, GOOGLE_*, AZURE_*)"

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
        # In a worker: what the parent's token is for, and the credentials that it had.
        self._token_host: str | None = None
        self._parents: tuple[bytes, bytes] | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._client: ObjectStore | None = None

    def __getstate__(self) -> dict[str, object]:
        return {
            "location": self.location,
            "_single_writer": self._single_writer,
            "_token_host": bound_host(),
            "_parents": environment_mark(),
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    # reading

    def get(self, key: str, *, limit_bytes: int, sha256: str | None = None) -> bytes | None:
        def fetch() -> tuple[int, bytes]:
            with self._errors(key, may_be_missing=True):
                result = self._store().get(key)
                size = result.meta["size"]
                return size, bytes(result.bytes()) if size <= limit_bytes else b""

        try:
            size, data = retrying(fetch)
        except FileNotFoundError:
            return None
        if size <= limit_bytes:
            return data
        raise FormatError(
            "document-too-large",
            "file exceeds its size limit",
            where=self._where(key),
            got=f"{size} bytes",
            expected=f"at most {limit_bytes}",
        )

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        def fetch() -> tuple[int, memoryview]:
            with self._errors(key, may_be_missing=True):
                result = self._store().get(key, options={"range": (offset, offset + length)})
                size = result.meta["size"]
                return size, memoryview(result.bytes() if size == size_bytes else b"")

        try:
            size, data = retrying(fetch)
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

    def get_chunk(
        self, key: str, offset: int, length: int, *, size_bytes: int, crc32c: int
    ) -> tuple[memoryview, int]:
        data = self.get_range(key, offset, length, size_bytes=size_bytes)
        return data, crc32c_of(data)

    def is_near(self, key: str, offset: int, length: int) -> bool:
        return False

    def size(self, key: str) -> int | None:
        def ask() -> int:
            with self._errors(key, may_be_missing=True):
                return self._store().head(key)["size"]

        try:
            return retrying(ask)
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[Entry]:
        self._refuse_http("cannot be listed")

        def ask() -> Sequence[Any]:
            with self._errors(folder):
                return self._store().list_with_delimiter(folder or None)["objects"]

        found = retrying(ask)
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
                self._client = _connect(self.location, self._token_host)
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
            http = self.location.kind == "http"
            raise StorageError(
                "permission-denied",
                "the server refuses" if http else "the object store refuses",
                where=self._where(key),
                got=_first_lines(error),
                hint=self._stale_hint() or (_TOKEN_HINT if http else _CREDENTIALS_HINT),
            ) from None
        except (BaseError, OSError, ValueError) as error:
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            raise self._storage_failed(key, _first_lines(error)) from None

    def _stale_hint(self) -> str | None:
        stale = self._parents is not None and not is_environment(self._parents)
        return STALE_ENVIRONMENT if stale else None

    def _storage_failed(self, key: str, told: str) -> StorageError:
        missing = _missing_credentials(self.location, told, self._stale_hint())
        if missing is not None:
            return missing
        status = _status(told)
        data: dict[str, Any] = {}
        if _may_pass(told, status):
            data["transient"] = True
            asked_s = None
            if status in _BUSY and self.location.kind == "http":
                asked_s = retry_after_s(self._where(key))
            if asked_s is not None:
                data["retry_after_s"] = asked_s
        return StorageError(
            "storage-failed",
            "storage operation failed",
            where=self._where(key),
            got=told,
            data=data,
        )


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


def _connect(location: Location, token_host: str | None) -> ObjectStore:
    from obstore.store import from_url

    url = str(location)
    options: Any = {}
    named = [os.environ.get(name, "") for name in _ENDPOINTS.get(url.partition(":")[0], ())]
    # Unencrypted only where somebody has written so.
    if any(text.startswith("http://") for text in (url, *named)):
        options["allow_http"] = True
    token = bearer_token(url, first_host=token_host) if location.kind == "http" else None
    if token:
        options["default_headers"] = {"authorization": f"Bearer {token}"}
    retries = _RETRIES if location.kind == "object" else 0
    try:
        return from_url(
            url,
            client_options=options,
            retry_config={"max_retries": retries, "retry_timeout": _RETRY_TIMEOUT},
        )
    except Exception as error:  # obstore raises several unrelated types for a bad configuration
        told = _first_lines(error)
        raise _missing_credentials(location, told) or StorageError(
            "storage-failed", "cannot connect", where=location, got=told
        ) from None


# Where obstore takes an address other than the cloud's own from.
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}

# Where obstore looks when the environment holds nothing: the metadata service of a cloud's machine.
_METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal")
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public "
    "bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT, the path of a service account's key",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def _missing_credentials(
    location: Location, told: str, hint: str | None = None
) -> StorageError | None:
    if not (any(s in told for s in _METADATA_SERVICES) or "Account must be specified" in told):
        return None
    return StorageError(
        "credentials-missing",
        "no credentials in the environment, and this machine has none from its cloud",
        where=location,
        got=told,
        expected=_VARIABLES.get(str(location).partition(":")[0]),
        hint=hint,
    )


def _status(told: str) -> int | None:
    match = re.search(r"status code: ([1-5][0-9]{2})\b", told)
    return int(match[1]) if match else None


def _may_pass(told: str, status: int | None) -> bool:
    """Whether the same request may succeed later: overload, a restart, a cut connection."""
    if status is not None:
        return status in (408, 429) or status >= 500
    return "HTTP error: " in told and "redirect" not in told


def _first_lines(error: BaseException) -> str:
    """The message without obstore's multi-line debug rendering of the cause, and without secrets
    that a server sent back in it."""
    text = " ".join(str(error).split("\n\nDebug source:")[0].split())
    return without_token(text)[:400]
