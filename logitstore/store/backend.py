"""What the store asks of a disk or an object store: whole files, ranges, and one create-only
rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

from logitstore.store.location import Location

__all__ = ["Backend", "Entry", "ObjectWriter", "ReadBackend"]


@dataclass(frozen=True)
class Entry:
    """A listed file.

    Attributes:
        key: path inside the store, with `/`.
        size_bytes: its size.
        modified_s: when it was last written, seconds since 1970 by the storage's clock.
    """

    key: str
    size_bytes: int
    modified_s: float


class ObjectWriter(Protocol):
    """An object being written under a temporary name; `finish` gives it its name."""

    file: BinaryIO

    def finish(self) -> tuple[int, str]:
        """Make the object durable under its key; its size in bytes and SHA-256."""
        ...

    def abandon(self) -> None:
        """Forget what was written; harmless after `finish`."""
        ...


class ReadBackend(Protocol):
    """What reading a store asks of its storage. Keys are checked relative paths.

    Every method raises StorageError (disk-full, permission-denied, storage-failed,
    credentials-missing; fork-unsafe for remote storage in a forked child) and, offline,
    NotFoundError not-cached.
    """

    location: Location

    def get(self, key: str, *, limit_bytes: int, sha256: str | None = None) -> bytes | None:
        """A whole small file, None when it does not exist.

        Args:
            sha256: of the file, where it is known: lets a remote reader ask again for a damaged
                one. The caller compares what it gets.

        Raises: FormatError document-too-large beyond `limit_bytes`.
        """
        ...

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        """Exactly `length` bytes of an object that must be `size_bytes` long.

        Raises: IntegrityError object-missing, object-size-mismatch.
        """
        ...

    def get_chunk(
        self, key: str, offset: int, length: int, *, size_bytes: int, crc32c: int
    ) -> tuple[memoryview, int]:
        """`get_range`, and the CRC-32C of what it got; the caller compares that.

        Args:
            crc32c: what it should be. A remote reader asks again for other bytes, once, and keeps
                these.
        """
        ...

    def is_near(self, key: str, offset: int, length: int) -> bool:
        """Whether a disk of this host has these bytes, so that nothing need be fetched; the disk
        begins to read them."""
        ...

    def list(self, folder: str) -> list[Entry]:
        """Files of one folder, in order of their keys; "" is the store's own folder."""
        ...

    def close(self) -> None:
        """Release handles; arrays that were read stay valid."""
        ...


class Backend(ReadBackend, Protocol):
    """One store's storage, for reading and writing."""

    def size(self, key: str) -> int | None:
        """Size in bytes, None when it does not exist."""
        ...

    def create(self, key: str, data: bytes, *, kind: str) -> bool:
        """Make a small file durable under a name that must be free; False when it was taken.

        True means that this call created it; False may also be the second try of a call whose first
        reply was lost, so the caller reads back what is there. `kind` names the write step.
        """
        ...

    def create_object(self, key: str) -> ObjectWriter:
        """Begin an object under a name that no other attempt uses."""
        ...

    def probe(self) -> Literal["create-only", "single-writer"]:
        """Whether `create` is safe against other writers; asked once, when a store is made."""
        ...

    def use_single_writer(self) -> None:
        """From now on `create` looks first and then writes, since it cannot do both at once."""
        ...

    def settle(self) -> None:
        """Make names durable that other processes created and may not have lived to flush."""
        ...

    def delete(self, key: str) -> None:
        """Remove a file; it may be gone already."""
        ...
