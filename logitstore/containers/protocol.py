"""What a container does, and the checks that both share."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import google_crc32c
import numpy as np

from logitstore.record.record import Record, columns_needed
from logitstore.record.views import views_problem
from logitstore.spec.commit import ChunkRow, Commit, Layout
from logitstore.spec.errors import FormatError, IntegrityError, UsageError
from logitstore.spec.header import Header
from logitstore.spec.schema import Schema
from logitstore.spec.signals import EMPTY_SLOT

__all__ = [
    "MAX_ARRAY_BYTES",
    "Container",
    "ShardSummary",
    "ShardWriter",
    "check_chunk",
    "check_header",
    "check_record",
    "check_values",
    "column_set",
    "crc32c",
    "malformed",
]

# One array of one chunk, decoded. Larger is an attack or a mistake: 2,048 positions of dense
# float16 logits over 262,144 ids reach it exactly.
MAX_ARRAY_BYTES = 1 << 30

_ID_COLUMNS = ("tokens", "label", "ids", "head_ids", "tail_ids", "node_ids", "edge_ids")


@dataclass(frozen=True)
class ShardSummary:
    """What a writer has put into the object; the commit records it.

    Attributes:
        chunks: the chunk table.
        layout: padded sizes of the zarr arrays; None for arrow and for an object without chunks.
        column_bytes: stored bytes by array; "container" is the rest. Adds up to the object.
        samples, positions: of all chunks.
    """

    chunks: tuple[ChunkRow, ...]
    layout: Layout | None
    column_bytes: dict[str, int]
    samples: int
    positions: int


class ShardWriter(Protocol):
    """Writes one object. The bytes are a function of header and records alone."""

    def add(self, chunk: Record) -> None:
        """Appends one chunk: whole samples, with every column of the header's schema.

        Raises: FormatError chunk-malformed.
        """

    def finish(self) -> ShardSummary:
        """Writes what is left. The file stays open; flushing and closing are the caller's."""


class Container(Protocol):
    """One way to keep records as bytes."""

    name: str
    suffix: str

    def writer(self, file: BinaryIO, header: Header) -> ShardWriter:
        """A writer to `file`, which must be at offset 0. It only appends: no seek, no read.

        Raises: UsageError bad-argument when a full chunk would exceed `MAX_ARRAY_BYTES`.
        """

    def decode(
        self,
        data: bytes | memoryview,
        header: Header,
        commit: Commit,
        chunk: int,
        columns: Collection[str] | None = None,
        *,
        verified: bool = False,
    ) -> Record:
        """The record in a chunk's byte range.

        Args:
            data: exactly the bytes that the commit's chunk table names.
            columns: only these (with the counts their groups need); None for all.
            verified: the caller has compared the crc32c before; do not do it again.

        Raises: IntegrityError chunk-checksum-mismatch; FormatError chunk-malformed.
        """

    def validate_object(self, file: BinaryIO, header: Header, commit: Commit) -> None:
        """Checks that what a stock reader of the object is told is what header and commit say.

        Args:
            file: seekable; the whole object.

        Raises: FormatError chunk-malformed.
        """


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of the bytes."""
    # The library refuses memoryviews but takes arrays, without a copy.
    return int(google_crc32c.value(np.frombuffer(data, np.uint8)))


def malformed(where: str, what: str, *, got: object = None, expected: object = None) -> FormatError:
    """The error for bytes that contradict header or commit."""
    return FormatError(
        "chunk-malformed",
        what,
        where=where,
        got=got,
        expected=expected,
        hint="no conforming writer makes such an object; `logitstore verify` lists all damage",
    )


def check_chunk(
    data: bytes | memoryview, commit: Commit, chunk: int, *, verified: bool
) -> tuple[ChunkRow, str]:
    """The chunk's row and a name for messages, after length and crc32c agree.

    Raises: IntegrityError chunk-checksum-mismatch; FormatError chunk-malformed for no such row.
    """
    where = f"{commit.object.name} chunk {chunk}"
    if not 0 <= chunk < len(commit.chunks):
        raise malformed(where, "no such chunk", expected=f"below {len(commit.chunks)}")
    row = commit.chunks[chunk]
    size = memoryview(data).nbytes
    if size != row.bytes:
        raise IntegrityError(
            "chunk-checksum-mismatch",
            "chunk has another length than its commit says",
            where=where,
            got=f"{size} bytes",
            expected=f"{row.bytes} bytes",
        )
    if not verified:
        actual = crc32c(data)
        if actual != row.crc32c:
            raise IntegrityError(
                "chunk-checksum-mismatch",
                "chunk is damaged",
                where=where,
                got=f"crc32c {actual:08x}",
                expected=f"crc32c {row.crc32c:08x}",
                hint="restore the object from a copy; `logitstore verify` lists all damage",
            )
    return row, where


def column_set(schema: Schema, columns: Collection[str] | None) -> set[str]:
    """Names of the columns a decoded record will hold."""
    if columns is None:
        return {c.name for c in schema.columns}
    return columns_needed(schema, columns)


def check_header(header: Header) -> None:
    """Refuses a store whose full chunk would be too large, before a teacher works for it.

    Raises: UsageError bad-argument.
    """
    for column in header.schema_.columns:
        if column.axis != "position":
            continue
        position_bytes = math.prod(column.inner) * np.dtype(column.dtype).itemsize
        if position_bytes * header.chunk_positions > MAX_ARRAY_BYTES:
            raise UsageError(
                "bad-argument",
                f"column {column.name} is too large for chunks of this many positions",
                where="chunk_positions",
                got=f"{header.chunk_positions} positions of {position_bytes} bytes",
                expected=f"at most {MAX_ARRAY_BYTES // position_bytes} positions",
            )


def check_record(record: Record, header: Header) -> None:
    """Refuses records that a chunk cannot hold.

    Raises: FormatError chunk-malformed.
    """
    where, schema = "record to be written", header.schema_
    if record.schema != schema:
        raise malformed(where, "record has another schema than the header")
    missing = [c.name for c in schema.columns if c.name not in record]
    if missing:
        raise malformed(where, "record lacks columns", got=", ".join(missing))
    if record.num_samples == 0 or record.num_positions == 0:
        raise malformed(where, "a chunk needs at least one sample and one position")
    for name, array in record.arrays.items():
        if array.nbytes > MAX_ARRAY_BYTES:
            raise malformed(
                where,
                f"column {name} is too large for one chunk",
                got=f"{array.nbytes} bytes",
                expected=f"at most {MAX_ARRAY_BYTES}; use fewer positions per chunk",
            )
    check_values(record, header, where)


def check_values(record: Record, header: Header, where: str) -> None:
    """Refuses ids outside the vocabulary and strings that are not UTF-8 each.

    On some devices an index out of range ends the process.

    Raises: FormatError chunk-malformed.
    """
    for name in _ID_COLUMNS:
        ids = record.get(name)
        if ids is not None and header.signal.kind == "scores":
            ids = ids[ids != EMPTY_SLOT]
        if ids is not None and ids.size and int(ids.max()) >= header.vocab_size:
            raise malformed(
                where,
                f"column {name} holds ids outside the vocabulary",
                got=int(ids.max()),
                expected=f"below {header.vocab_size}",
            )
    for group in record.schema.groups:
        text = record.get(group.name) if group.text else None
        if text is None:
            continue
        offsets = record.group_offsets(group)
        starts = offsets[:-1][offsets[1:] > offsets[:-1]]
        try:
            text.tobytes().decode()
        except UnicodeDecodeError as error:
            raise malformed(where, f"group {group.name} is not UTF-8: {error}") from None
        if np.any(text[starts] & 0xC0 == 0x80):
            raise malformed(where, f"a string of group {group.name} starts inside a character")
    problem = views_problem(record, header.images)
    if problem is not None:
        raise malformed(where, f"a view cannot be: {problem}")
