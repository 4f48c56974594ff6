"""Looks into Arrow IPC metadata where pyarrow does not say what it finds.

Source: Apache Arrow `format/Message.fbs` and `format/File.fbs` (slots of tables), FlatBuffers
internals (a table starts with the distance back to its vtable).
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

__all__ = ["record_batch_ranges", "refuse_compression"]

_CONTINUATION = 0xFFFF_FFFF
# Slots of the flatbuffer tables Message and RecordBatch.
_MESSAGE_HEADER = 2
_BATCH_COMPRESSION = 3
_FOOTER_BATCHES = 3
_BLOCK = struct.Struct("<qi4xq")
_FILE_END = struct.Struct("<i6s")


def refuse_compression(data: memoryview) -> None:
    """Refuse body compression: buffers would announce their own decompressed sizes.

    pyarrow decompresses in `read_record_batch` and does not say beforehand that it will.

    Raises: ValueError; struct.error when the metadata is cut off.
    """
    continuation, metadata_bytes = struct.unpack_from("<2I", data, 0)
    if continuation != _CONTINUATION:
        raise ValueError("no encapsulated message")
    metadata = data[8 : 8 + metadata_bytes]
    message = struct.unpack_from("<I", metadata, 0)[0]
    slot = _table_slot(metadata, message, _MESSAGE_HEADER)
    if slot is None:
        raise ValueError("message without header")
    batch = slot + struct.unpack_from("<I", metadata, slot)[0]
    if _table_slot(metadata, batch, _BATCH_COMPRESSION) is not None:
        raise ValueError("compressed record batches are not allowed")


def record_batch_ranges(file: BinaryIO) -> list[tuple[int, int]]:
    """Offset and length of every record batch as the footer of an IPC file gives them.

    Raises: ValueError; struct.error when the footer is cut off.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _FILE_END.size, 0))
    footer_bytes, _ = _FILE_END.unpack(file.read())
    start = size - _FILE_END.size - footer_bytes
    if not 0 < start < size:
        raise ValueError("no footer")
    file.seek(start)
    footer = memoryview(file.read(footer_bytes))
    slot = _table_slot(footer, struct.unpack_from("<I", footer)[0], _FOOTER_BATCHES)
    if slot is None:
        return []
    vector = slot + struct.unpack_from("<I", footer, slot)[0]
    (count,) = struct.unpack_from("<I", footer, vector)
    if count * _BLOCK.size > len(footer):
        raise ValueError("footer is shorter than its list of batches")
    blocks = [_BLOCK.unpack_from(footer, vector + 4 + i * _BLOCK.size) for i in range(count)]
    return [(offset, metadata_bytes + body_bytes) for offset, metadata_bytes, body_bytes in blocks]


def _table_slot(data: memoryview, table: int, field: int) -> int | None:
    """Position of a flatbuffer table's field, or None when the table does not hold it."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise ValueError("flatbuffer table without vtable")
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * field
    if entry + 2 > vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + offset if offset else None
