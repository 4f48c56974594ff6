"""A ZIP of stored (uncompressed) entries, written by appending and read one range at a time.

Only what the zarr container needs: fixed timestamps, sizes in the local headers, no data
descriptors, so that a range of whole entries is readable without the central directory, in one way
only. The standard library's zipfile seeks back to complete local headers; an upload to an object
store cannot.

Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to
4.3.16 (zip64 and end records).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "MAX_ENTRY_BYTES",
    "Entry",
    "central_directory",
    "local_entry",
    "local_entry_bytes",
    "split_entries",
]

# Larger entries would need the zip64 form of the local header.
MAX_ENTRY_BYTES = 0xFFFF_FFFE

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_MAX_32 = 0xFFFF_FFFF
_MAX_16 = 0xFFFF

_VERSION = 20
_VERSION_64 = 45
_DATE = 0x21  # 1980-01-01, the earliest there is
_REGULAR_FILE = 0o100644 << 16


@dataclass(frozen=True)
class Entry:
    """One written entry: what the central directory says of it."""

    name: str
    offset: int
    bytes: int
    crc32: int


def local_entry(name: str, data: bytes, offset: int) -> tuple[bytes, Entry]:
    """Local header and data, to be appended at `offset`."""
    if len(data) > MAX_ENTRY_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes; an entry holds at most {MAX_ENTRY_BYTES}")
    crc = zlib.crc32(data)
    return _local_header(name, crc, len(data)) + data, Entry(name, offset, len(data), crc)


def local_entry_bytes(name: str, size: int) -> int:
    """Length of what `local_entry` makes of `size` bytes."""
    return _LOCAL.size + len(name.encode()) + size


def split_entries(data: memoryview, names: Sequence[str]) -> list[memoryview]:
    """Contents of the entries in a range that must hold exactly these, in this order.

    Raises: ValueError when a header differs in any byte from what `local_entry` writes (its CRC-32
    aside, which the caller's checksum over the range covers), or bytes are left over.
    """
    contents = []
    offset = 0
    for name in names:
        size_at = offset + 18
        if len(data) < offset + _LOCAL.size:
            raise ValueError(f"entry {name} is cut off")
        crc, size = struct.unpack_from("<2I", data, size_at - 4)
        header = _local_header(name, crc, size)
        start = offset + len(header)
        if data[offset:start] != header:
            raise ValueError(f"no plain local header of entry {name} at byte {offset}")
        offset = start + size
        if offset > len(data):
            raise ValueError(f"entry {name} reaches beyond its chunk")
        contents.append(data[start:offset])
    if offset != len(data):
        raise ValueError(f"{len(data) - offset} bytes follow the last entry")
    return contents


def central_directory(entries: Sequence[Entry], offset: int) -> bytes:
    """Central directory and end records, to be appended at `offset`."""
    parts = []
    for entry in entries:
        name = entry.name.encode()
        extra = b""
        low = entry.offset
        if entry.offset >= _MAX_32:
            extra = struct.pack("<2HQ", 1, 8, entry.offset)
            low = _MAX_32
        version = _VERSION_64 if extra else _VERSION
        parts.append(
            _CENTRAL.pack(
                b"PK\x01\x02",
                version | 3 << 8,  # made by Unix
                version,
                *(0, 0, 0, _DATE),  # flags, stored, time, date
                *(entry.crc32, entry.bytes, entry.bytes),
                *(len(name), len(extra), 0),  # no comment
                *(0, 0, _REGULAR_FILE, low),  # disk, internal and external attributes
            )
            + name
            + extra
        )
    directory = b"".join(parts)
    count, size = len(entries), len(directory)
    end = b""
    if count >= _MAX_16 or size >= _MAX_32 or offset >= _MAX_32:
        end = _END_64.pack(
            b"PK\x06\x06",
            _END_64.size - 12,
            *(_VERSION_64 | 3 << 8, _VERSION_64, 0, 0),
            *(count, count, size, offset),
        ) + _LOCATOR_64.pack(b"PK\x06\x07", 0, offset + size, 1)
    short = min(count, _MAX_16)
    end += _END.pack(b"PK\x05\x06", 0, 0, short, short, min(size, _MAX_32), min(offset, _MAX_32), 0)
    return directory + end


def _local_header(name: str, crc: int, size: int) -> bytes:
    encoded = name.encode()
    return (
        _LOCAL.pack(b"PK\x03\x04", _VERSION, 0, 0, 0, _DATE, crc, size, size, len(encoded), 0)
        + encoded
    )
