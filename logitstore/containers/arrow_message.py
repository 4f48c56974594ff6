"""One look into an Arrow IPC message before pyarrow may act on it.

Source: Apache Arrow `format/Message.fbs` (slots of Message and RecordBatch), FlatBuffers internals
(a table starts with the distance back to its vtable).
"""

from __future__ import annotations

import struct

__all__ = ["refuse_compression"]

_CONTINUATION = 0xFFFF_FFFF
# Slots of the flatbuffer tables Message and RecordBatch.
_MESSAGE_HEADER = 2
_BATCH_COMPRESSION = 3


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
