"""store.json: what a store is, written once."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, model_validator

from logitstore.spec.document import Document, Strict
from logitstore.spec.errors import FormatError
from logitstore.spec.id_ranks import RANKS_FEATURE
from logitstore.spec.images import IMAGES_FEATURE, Augmentation, Images
from logitstore.spec.schema import Schema
from logitstore.spec.signals import SignalSpec

__all__ = [
    "AUX_FIELDS",
    "FORMAT_VERSION",
    "READER_FEATURES",
    "Augmentation",
    "Header",
    "Images",
    "Packing",
    "Software",
    "TableRef",
    "TeacherInfo",
    "TokenizerInfo",
]

FORMAT_VERSION = 1

# Features this version can read. A store that needs another one is refused by name.
READER_FEATURES: frozenset[str] = frozenset({IMAGES_FEATURE, "pairs", RANKS_FEATURE})

# Optional per-position fields, in stored order. `lse_at` is listed by temperature in the header
# instead.
AUX_FIELDS: tuple[str, ...] = (
    "label_logprob",
    "label_rank",
    "entropy",
    "top1_logprob",
    "log_tail",
    "lse",
    "logit_mean",
    "byte_end",
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 63)]


class Software(Strict):
    """Who wrote a document."""

    name: str
    version: str


class TeacherInfo(Strict):
    """Provenance of the distributions.

    Attributes:
        name: as the user named it (`hf:PATH`, `py:module:function`, `push`).
        revision: of a hub model, when known.
        fingerprint: sha256 over the weights and the configuration, when the teacher has files.
        engine, engine_version: the library that ran it.
        compute_dtype: dtype of the forward pass.
        device_type: "cpu", "cuda", ...
        threads_per_worker: CPU threads of one worker; results are byte-identical for equal values.
        masked_rows: rows of the output layer beyond the tokenizer's real size, masked before
            softmax.
    """

    name: str
    revision: str | None = None
    fingerprint: Sha256 | None = None
    engine: str | None = None
    engine_version: str | None = None
    compute_dtype: str | None = None
    device_type: str | None = None
    threads_per_worker: Annotated[int, Field(ge=1)] | None = None
    masked_rows: Annotated[int, Field(ge=0)] = 0


class TokenizerInfo(Strict):
    """The tokenizer, by content.

    Attributes:
        fingerprint: sha256 of the id -> bytes table (see `table`).
        size: number of ids.
        bos_id: id put before each document under `bos="document"`.
        bos: "document" adds bos_id before every document, "none" adds nothing.
        table: name of the store's table with every id's bytes, so that no model is needed to read
            text.
        special_ids: ids of control tokens.
    """

    name: str
    fingerprint: Sha256
    size: Annotated[int, Field(ge=1)]
    bos: Literal["document", "none"]
    bos_id: Annotated[int, Field(ge=0)] | None = None
    table: str | None = None
    special_ids: tuple[int, ...] = ()


class Packing(Strict):
    """How documents become samples.

    Attributes:
        seq_len: tokens of a full window; the last window of a plan unit may be shorter.
        attention: "block-diagonal" keeps segments apart and restarts position ids; "full" does not.
        document_separator: text that splits a text file into documents; None: one file, one
            document.
        text_key: field of a JSONL or Parquet row that holds the text.
    """

    seq_len: Annotated[int, Field(ge=2)]
    attention: Literal["block-diagonal", "full"] = "block-diagonal"
    document_separator: str | None = None
    text_key: str | None = None


class TableRef(Strict):
    """A create-only table of the store: `tables/<name>`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    bytes: Size
    sha256: Sha256


class Header(Document):
    """store.json.

    Attributes:
        format_version: a reader refuses a greater one.
        reader_features: a reader refuses a store that lists a name it does not know.
        store_uuid: ties plans, commits and index to this store.
        sample_kind: "sequence" (one position per token) or "classification" (one position per
            sample).
        alignment: "next-token": row t is the distribution over token t + 1; "none": no such
            relation.
        vocab_size: V, real ids only.
        chunk_positions: capacity of a chunk in positions; a longer sample gets a chunk of its own.
        schema_: every column of a record (JSON key `schema`).
        lse_at: temperatures T whose logsumexp(z / T) is stored, column `lse_at_<i>` in this order.
        always_ids: control tokens stored at every position beside the signal.
        seed: of the counter-based random function.
        commit_mode: "create-only" where the storage refuses to overwrite; "single-writer" where it
            does not, and only one process may commit.
        images: of classification samples, where the store keeps views or thumbnails.
        configuration: everything that decides the stored bytes, for people and for the diff on
            resume.
        configuration_sha256: of the canonical JSON of `configuration`.
    """

    document_name: ClassVar[str] = "store header"

    format: Literal["logitstore"] = "logitstore"
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    reader_features: tuple[str, ...] = ()
    store_uuid: Uuid
    created: str
    writer: Software
    container: Literal["zarr", "arrow"]
    sample_kind: Literal["sequence", "classification"]
    alignment: Literal["next-token", "none"]
    signal: SignalSpec
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    chunk_positions: Annotated[int, Field(ge=1, le=1 << 24)]
    schema_: Schema = Field(alias="schema")
    lse_at: tuple[Annotated[float, Field(gt=0)], ...] = ()
    always_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    commit_mode: Literal["create-only", "single-writer"] = "create-only"
    teacher: TeacherInfo
    tokenizer: TokenizerInfo | None = None
    packing: Packing | None = None
    tables: tuple[TableRef, ...] = ()
    images: Images | None = None
    configuration: dict[str, JsonValue]
    configuration_sha256: Sha256

    model_config = ConfigDict(
        **Document.model_config, populate_by_name=True, serialize_by_alias=True
    )

    @model_validator(mode="after")
    def _rules(self) -> Header:
        if self.sample_kind == "sequence" and self.schema_.column("tokens") is None:
            raise ValueError("a sequence store needs the column tokens")
        if len(set(self.lse_at)) != len(self.lse_at):
            raise ValueError("lse_at temperatures must differ")
        images = self.images
        if (images is not None) != (IMAGES_FEATURE in self.reader_features):
            raise ValueError(f"images and the feature {IMAGES_FEATURE} come together")
        if images is not None and self.sample_kind == "sequence":
            raise ValueError("sequences are no images")
        views = images is not None and images.augmentation is not None
        if views != (self.schema_.column("view") is not None):
            raise ValueError("an augmentation and the column view come together")
        shape = None if images is None else images.thumbnail_shape
        column = self.schema_.column("thumbnail")
        if shape != (None if column is None else column.inner):
            raise ValueError("thumbnails have another shape than the images say")
        return self

    @property
    def stored_fields(self) -> tuple[str, ...]:
        """Names of the optional per-position fields this store holds."""
        return tuple(name for name in AUX_FIELDS if self.schema_.column(name) is not None)

    @classmethod
    def check_version(cls, body: Any, *, where: str) -> None:
        """Refuse a newer format or an unknown reader feature by name, whatever else the body holds.

        Raises: FormatError format-too-new, unknown-reader-feature.
        """
        if not isinstance(body, dict):
            return
        version, features = body.get("format_version"), body.get("reader_features", [])
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatError(
                "format-too-new",
                "store was written in a newer format",
                where=where,
                got=f"format_version {version}",
                expected=f"at most {FORMAT_VERSION}",
                hint="upgrade logitstore",
            )
        unknown = [f for f in features if f not in READER_FEATURES] if _is_names(features) else []
        if unknown:
            raise FormatError(
                "unknown-reader-feature",
                "store needs a feature this version does not know",
                where=where,
                got=", ".join(unknown),
                expected="of " + ", ".join(sorted(READER_FEATURES)),
                hint="upgrade logitstore",
            )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
