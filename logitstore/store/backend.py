"""What the store asks of a disk or an object store: whole files, ranges, and one create-only
rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

from logitstore.store.location import Location

__all__ = ["Backend", "Entry", "ObjectWriter"]


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


class Backend(Protocol):
    """One store's storage. Keys are checked relative paths.

    Every method raises StorageError (disk-full, permission-denied, storage-failed; fork-unsafe for
    remote storage in a forked child).
    """

    location: Location

    def get(self, key: str, *, limit_bytes: int) -> bytes | None:
        """A whole small file, None when it does not exist.

        Raises: FormatError document-too-large beyond `limit_bytes`.
        """
        ...

    def get_range(self, key: str, offset: int, length: int, *, size_bytes: int) -> memoryview:
        """Exactly `length` bytes of an object that must be `size_bytes` long.

        Raises: IntegrityError object-missing, object-size-mismatch.
        """
        ...

    def size(self, key: str) -> int | None:
        """Size in bytes, None when it does not exist."""
        ...

    def list(self, folder: str) -> list[Entry]:
        """Files of one folder, in order of their keys; "" is the store's own folder."""
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

    def close(self) -> None:
        """Release handles; arrays that were read stay valid."""
        ...
