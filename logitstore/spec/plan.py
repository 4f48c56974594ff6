"""plans/NNNNNN.json: the immutable list of shards a capture will produce."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from logitstore.spec.document import Document, Strict, canonical_json, sha256_hex
from logitstore.spec.header import Sha256, Size, Uuid

__all__ = ["CorpusFile", "CorpusInfo", "Plan", "ShardPlan", "Span", "shard_name"]

ShardName = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{6}$")]


def shard_name(plan: int, index: int) -> str:
    """Name of shard `index` of plan `plan`; names sort in reading order."""
    return f"{plan:04d}-{index:06d}"


class CorpusFile(Strict):
    """One input file, by content. `name` is its path below the folder that all files share."""

    name: str
    bytes: Size
    sha256: Sha256


class CorpusInfo(Strict):
    """The input a plan was made from; a file that changes afterwards is refused."""

    format: str
    files: tuple[CorpusFile, ...]
    documents: Size
    fingerprint: Sha256


class Span(Strict):
    """Consecutive documents of one file.

    Attributes:
        file: index into `CorpusInfo.files`.
        first_document: number of the span's first document inside the file, from 0.
        documents: how many.
        offset, bytes: byte range of the span in the file, where the format has one.
    """

    file: Annotated[int, Field(ge=0)]
    first_document: Size
    documents: Annotated[int, Field(ge=1)]
    offset: Size | None = None
    bytes: Size | None = None


class ShardPlan(Strict):
    """One unit of work. Documents never cross it.

    Attributes:
        spans: what it is made from.
        max_tokens: it ends after so many tokens (the last shard of a capture limited to a prefix).
    """

    shard: ShardName
    spans: tuple[Span, ...] = ()
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class Plan(Document):
    """A numbered list of shards. Number 1 is the first; only `append` adds further ones.

    Attributes:
        kind: "corpus": `shards` is complete before capture starts; "push": a writer session, whose
            shards are the commits that carry this plan's number.
        fingerprint: sha256 over the header's configuration digest, the corpus and the shard list.
    """

    document_name: ClassVar[str] = "plan"

    store_uuid: Uuid
    number: Annotated[int, Field(ge=1, le=9999)]
    kind: Literal["corpus", "push"]
    created: str
    configuration_sha256: Sha256
    corpus: CorpusInfo | None = None
    shards: tuple[ShardPlan, ...] = ()
    fingerprint: Sha256

    @model_validator(mode="after")
    def _rules(self) -> Plan:
        names = [s.shard for s in self.shards]
        if names != [shard_name(self.number, i) for i in range(len(names))]:
            raise ValueError("shards must be numbered consecutively under the plan's number")
        if self.kind == "push" and names:
            raise ValueError("a push plan lists no shards")
        if self.fingerprint != plan_fingerprint(
            self.configuration_sha256, self.number, self.corpus, self.shards
        ):
            raise ValueError("fingerprint does not match configuration, corpus and shards")
        return self


def plan_fingerprint(
    configuration_sha256: str,
    number: int,
    corpus: CorpusInfo | None,
    shards: tuple[ShardPlan, ...],
) -> str:
    """Digest of everything that decides the bytes of a plan's shards."""
    return sha256_hex(
        canonical_json(
            {
                "configuration_sha256": configuration_sha256,
                "number": number,
                "corpus": None if corpus is None else corpus.model_dump(mode="json"),
                "shards": [s.model_dump(mode="json", exclude_none=True) for s in shards],
            }
        )
    )
