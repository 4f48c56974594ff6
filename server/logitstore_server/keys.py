"""Keys that clients send: made, listed, revoked, and recognised.

A key is `ls_<id>_<secret>`: the id is public, names the key in lists and logs and finds its entry;
the secret holds 256 random bits. The file keeps the SHA-256 of the whole key. A slow password hash
would gain nothing: nobody can guess 256 bits, however fast the hash.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from logitstore.spec.errors import LogitstoreError, NotFoundError, StorageError

__all__ = ["ALL_STORES", "KEY_PREFIX", "Key", "KeyRing", "create_key", "read_keys", "revoke_key"]

KEY_PREFIX = "ls_"
ALL_STORES = "*"
_SECRET_BYTES = 32
_MAX_FILE_BYTES = 16 << 20
# Writable by the group, or open to others in any way.
_UNSAFE_MODE = stat.S_IWGRP | stat.S_IRWXO


class Key(BaseModel):
    """One key as the file keeps it: everything but the secret."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern="^[a-z2-7]{8}$")
    label: str = Field(max_length=200)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    stores: tuple[str, ...]
    metrics: bool
    created: AwareDatetime
    expires: AwareDatetime | None
    revoked: AwareDatetime | None = None

    def state(self, now: dt.datetime) -> str:
        """ "valid", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"

    def may_read(self, store: str) -> bool:
        return ALL_STORES in self.stores or store in self.stores


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(default=1, ge=1, le=1)
    keys: list[Key] = []


def create_key(
    file: Path,
    *,
    label: str,
    stores: Sequence[str],
    metrics: bool,
    expires: dt.datetime | None,
) -> tuple[str, Key]:
    """Add a key to the file, which is created if need be. Returns the key's text and its entry.

    The text exists nowhere else and cannot be had again.
    """
    key_id = base64.b32encode(secrets.token_bytes(5)).decode().lower()
    text = f"{KEY_PREFIX}{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    key = Key(
        id=key_id,
        label=label,
        sha256=_sha256(text),
        stores=tuple(stores),
        metrics=metrics,
        created=_now(),
        expires=expires,
    )
    with _locked(file):
        _write(file, [*(read_keys(file) if file.exists() else []), key])
    return text, key


def revoke_key(file: Path, key_id: str) -> Key:
    """Revoke a key; the running service refuses it from its next request on.

    Raises: NotFoundError key-not-found.
    """
    with _locked(file):
        keys = {key.id: key for key in read_keys(file)}
        if key_id not in keys:
            raise NotFoundError(
                "key-not-found",
                "no key has this id",
                where=file,
                got=key_id,
                expected="an id that `logitstore keys list` shows",
            )
        if keys[key_id].revoked is None:
            keys[key_id] = keys[key_id].model_copy(update={"revoked": _now()})
            _write(file, list(keys.values()))
    return keys[key_id]


def read_keys(file: Path) -> list[Key]:
    """The entries of a file of keys.

    Raises: StorageError keys-file: missing, unreadable, open to other users, or malformed.
    """
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            data = opened.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise _unusable(file, f"cannot be read: {error.strerror}") from None
    if status.st_mode & _UNSAFE_MODE:
        raise _unusable(
            file,
            "other users of this machine may read or change it",
            got=f"mode {stat.S_IMODE(status.st_mode):04o}",
            expected="mode 0600, or 0640",
            hint=f"chmod 600 {file}",
        )
    try:
        return _KeyFile.model_validate_json(data).keys
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise _unusable(file, f"is malformed: {place} {problem['msg']}".strip()) from None


class KeyRing:
    """The keys of a file, read again whenever the file has changed.

    Every worker process looks at the file itself at each request, so that all agree.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._path = os.fspath(file)
        self._stamp: tuple[int, ...] | None = None
        self._keys: dict[str, Key] = {}
        # Compared when the id is unknown, so that this takes as long as a wrong secret.
        self._nobody = _sha256(secrets.token_hex())

    def find(self, text: str) -> Key | None:
        """The valid key of this text, or None: unknown, expired or revoked.

        Raises: StorageError keys-file, also for a file that broke while the service runs.
        """
        self.refresh()
        key_id, _, _ = text.removeprefix(KEY_PREFIX).partition("_")
        key = self._keys.get(key_id)
        same = hmac.compare_digest(_sha256(text), key.sha256 if key else self._nobody)
        return key if key is not None and same and key.state(_now()) == "valid" else None

    def valid(self, key_id: str) -> Key | None:
        """The key of this id, or None: unknown, expired or revoked.

        Raises: StorageError keys-file, as `find` does.
        """
        self.refresh()
        key = self._keys.get(key_id)
        return key if key is not None and key.state(_now()) == "valid" else None

    def refresh(self) -> None:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise _unusable(self._file, f"cannot be read: {error.strerror}") from None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode)
        if stamp != self._stamp:
            self._keys = {key.id: key for key in read_keys(self._file)}
            self._stamp = stamp


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One writer of the folder at a time; a lock of the folder leaves no file behind."""
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unusable(file, f"its folder cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: Path, keys: list[Key]) -> None:
    # mkstemp makes files of mode 0600 with names that nobody can foresee. An existing file's mode
    # and owner group are a choice of its owner and stay.
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(_KeyFile(keys=keys).model_dump_json(indent=2).encode() + b"\n")
                opened.flush()
                if file.exists():
                    status = file.stat()
                    os.fchmod(opened.fileno(), stat.S_IMODE(status.st_mode))
                    os.fchown(opened.fileno(), -1, status.st_gid)
                os.fsync(opened.fileno())
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise _unusable(file, f"cannot be written: {error.strerror}") from None


def _unusable(
    file: Path,
    what: str,
    *,
    got: str | None = None,
    expected: str | None = None,
    hint: str | None = None,
) -> LogitstoreError:
    return StorageError("keys-file", what, where=file, got=got, expected=expected, hint=hint)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
