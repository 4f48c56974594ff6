"""index.json: written by `seal`; with it, a store of any size opens in two requests."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from logitstore.spec.commit import ObjectName
from logitstore.spec.document import Document, Strict
from logitstore.spec.header import Sha256, Size, Uuid
from logitstore.spec.plan import ShardName
from logitstore.spec.statistics import Statistics

__all__ = ["Index", "IndexRow", "PlanRef"]


class PlanRef(Strict):
    """A plan the index covers, by content."""

    number: Annotated[int, Field(ge=1)]
    sha256: Sha256


class IndexRow(Strict):
    """One shard: enough to know order, sizes and statistics; its commit adds the chunk table."""

    shard: ShardName
    generation: Annotated[int, Field(ge=1, le=9999)]
    commit_sha256: Sha256
    object: ObjectName
    object_bytes: Size
    object_sha256: Sha256
    samples: Size
    positions: Size


class Index(Document):
    """All visible shards of a sealed store, in reading order."""

    document_name: ClassVar[str] = "index"

    store_uuid: Uuid
    header_sha256: Sha256
    created: str
    plans: tuple[PlanRef, ...]
    shards: tuple[IndexRow, ...]
    samples: Size
    positions: Size
    statistics: Statistics
    column_bytes: dict[str, Size]

    @model_validator(mode="after")
    def _rules(self) -> Index:
        names = [row.shard for row in self.shards]
        if names != sorted(set(names)):
            raise ValueError("shards must be in ascending order, each once")
        if sum(row.samples for row in self.shards) != self.samples:
            raise ValueError("samples must add up")
        if sum(row.positions for row in self.shards) != self.positions:
            raise ValueError("positions must add up")
        return self
