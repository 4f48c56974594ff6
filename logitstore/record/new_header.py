"""A header from what a user chose: schema, features and digests follow."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from logitstore.record.schema import aux_fields, build_schema
from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.errors import UsageError
from logitstore.spec.header import (
    Header,
    Images,
    Packing,
    Software,
    TableRef,
    TeacherInfo,
    TokenizerInfo,
)
from logitstore.spec.id_ranks import RANKS_FEATURE
from logitstore.spec.images import IMAGES_FEATURE
from logitstore.spec.version import __version__

__all__ = ["new_header", "now", "software"]


def now() -> str:
    """The current time as documents write it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def software() -> Software:
    """This version of logitstore, as documents name it."""
    return Software(name="logitstore", version=__version__)


def new_header(
    signal: Any,
    *,
    vocab_size: int,
    configuration: Mapping[str, Any],
    teacher: TeacherInfo,
    container: Literal["zarr", "arrow"] = "zarr",
    sample_kind: Literal["sequence", "classification"] = "sequence",
    aux: Iterable[str] | None = None,
    lse_at: Iterable[float] = (),
    always_ids: Iterable[int] = (),
    labelled: bool = True,
    loss_mask: bool = False,
    chunk_positions: int = 2048,
    seed: int = 0,
    tokenizer: TokenizerInfo | None = None,
    packing: Packing | None = None,
    tables: Iterable[TableRef] = (),
    commit_mode: Literal["create-only", "single-writer"] = "create-only",
    images: Images | None = None,
    rank_ids: bool = False,
) -> Header:
    """A header with a fresh uuid. `signal` is a spec, `aux` names or None for the signal's
    defaults; `labelled` says whether classification samples have labels; with `rank_ids` the
    store's objects hold frequency ranks for ids, and it needs the table of them.

    Raises: UsageError unknown-signal, unknown-aux, k-exceeds-vocabulary, bad-argument.
    """
    always = tuple(always_ids)
    if any(not 0 <= i < vocab_size for i in always) or len(set(always)) != len(always):
        raise UsageError(
            "bad-argument",
            "always-ids must be distinct ids of the vocabulary",
            got=always,
            expected=f"0..{vocab_size - 1}",
        )
    names = aux_fields(signal, vocab_size, aux, sample_kind=sample_kind, labelled=labelled)
    temperatures = tuple(float(t) for t in lse_at)
    if signal.kind == "scores" and (always or temperatures or loss_mask):
        raise UsageError(
            "bad-argument",
            "scores of given candidates are no distribution over the vocabulary",
            where=f"signal {signal}",
            got="always-ids, lse_at or a loss mask",
            expected="none of them; an id that is always needed can be a candidate",
        )
    schema = build_schema(
        signal,
        vocab_size=vocab_size,
        sample_kind=sample_kind,
        aux=names,
        lse_at=temperatures,
        labelled=labelled,
        loss_mask=loss_mask,
        num_always=len(always),
        images=images,
    )
    features = ["pairs"] if any(group.pairs for group in schema.groups) else []
    features += [] if images is None else [IMAGES_FEATURE]
    if rank_ids:
        _check_ranks(signal, container)
        features.append(RANKS_FEATURE)
    return Header(
        reader_features=tuple(features),
        store_uuid=uuid.uuid4().hex,
        created=now(),
        writer=software(),
        container=container,
        sample_kind=sample_kind,
        alignment="next-token" if sample_kind == "sequence" else "none",
        signal=signal,
        vocab_size=vocab_size,
        chunk_positions=chunk_positions,
        schema_=schema,
        lse_at=temperatures,
        always_ids=always,
        seed=seed,
        commit_mode=commit_mode,
        teacher=teacher,
        tokenizer=tokenizer,
        packing=packing,
        tables=tuple(tables),
        images=images,
        configuration=dict(configuration),
        configuration_sha256=sha256_hex(canonical_json(dict(configuration))),
    )


def _check_ranks(signal: Any, container: str) -> None:
    """Ranks pay where lists of ids are compressed."""
    if signal.kind in ("topk", "sampled", "threshold") and container == "zarr":
        return
    raise UsageError(
        "bad-argument",
        "frequency ranks make compressed lists of ids smaller, and nothing else",
        where="rank_ids",
        got=f"signal {signal} in container {container}",
        expected="topk, sampled or threshold in container zarr",
    )
