"""commits/<shard>.<generation>.json: the create-only document that makes one shard visible."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from logitstore.spec.document import Document, Strict
from logitstore.spec.header import Sha256, Size, Software, Uuid
from logitstore.spec.plan import ShardName
from logitstore.spec.statistics import Statistics

__all__ = ["ChunkRow", "Commit", "Layout", "ObjectRef", "Quarantined"]

Crc32c = Annotated[int, Field(ge=0, lt=1 << 32)]


ObjectName = Annotated[
    str, Field(pattern=r"^[0-9]{4}-[0-9]{6}\.[0-9a-f]{8,32}\.(zarr\.zip|arrow)$")
]


class ObjectRef(Strict):
    """A shard's bytes: `shards/<name>`."""

    name: ObjectName
    bytes: Size
    sha256: Sha256


class Layout(Strict):
    """Padded sizes of the zarr arrays: samples S, positions P, entries E per group or pairs
    array."""

    samples: Annotated[int, Field(ge=1)]
    positions: Annotated[int, Field(ge=1)]
    entries: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)


class ChunkRow(Strict):
    """One chunk: a contiguous byte range of the object that holds whole samples."""

    offset: Size
    bytes: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=1)]
    positions: Annotated[int, Field(ge=1)]
    crc32c: Crc32c


class Quarantined(Strict):
    """A sample that could not be captured after repeated tries."""

    sample_key: str
    reason: str


class Commit(Document):
    """Makes one shard visible.

    Attributes:
        plan, plan_fingerprint: the plan the shard belongs to.
        generation: 1 for the first commit of a shard; a repair adds one; the highest wins.
        attempt: random name of the attempt whose object won.
        column_bytes: stored bytes by column, headers and padding included.
        notes: what happened on the way that a reader may want to know (a halved micro-batch).
    """

    document_name: ClassVar[str] = "commit"

    store_uuid: Uuid
    plan: Annotated[int, Field(ge=1)]
    plan_fingerprint: Sha256
    shard: ShardName
    generation: Annotated[int, Field(ge=1, le=9999)]
    attempt: Annotated[str, Field(pattern=r"^[0-9a-f]{8,32}$")]
    created: str
    writer: Software
    object: ObjectRef
    samples: Size
    positions: Size
    layout: Layout | None = None
    chunks: tuple[ChunkRow, ...]
    column_bytes: dict[str, Size]
    statistics: Statistics
    quarantined: tuple[Quarantined, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _rules(self) -> Commit:
        if sum(c.samples for c in self.chunks) != self.samples:
            raise ValueError("chunk samples must add up to the shard's")
        if sum(c.positions for c in self.chunks) != self.positions:
            raise ValueError("chunk positions must add up to the shard's")
        end = 0
        for number, chunk in enumerate(self.chunks):
            if chunk.offset < end:
                raise ValueError(f"chunk {number} overlaps the one before it")
            end = chunk.offset + chunk.bytes
        if end > self.object.bytes:
            raise ValueError("chunks reach beyond the object")
        prefix = f"{self.shard}.{self.attempt}."
        if not self.object.name.startswith(prefix):
            raise ValueError("object name does not belong to this shard and attempt")
        return self
