"""A header from what a user chose: schema, features and digests follow."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

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

__all__ = ["always_ids_of", "new_header", "now", "software", "temperatures_of"]


def now() -> str:
    """The current time as documents write it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def software() -> Software:
    """This version of logitstore, as documents name it."""
    return Software(name="logitstore", version=__version__)


def always_ids_of(given: Any, vocab_size: int) -> tuple[int, ...]:
    """Always-ids as a user gave them: distinct ids of the vocabulary, in any sequence or array.

    Raises: UsageError bad-argument.
    """
    ids = np.asarray(given if isinstance(given, str) else list(given))
    whole = ids.ndim == 1 and (not ids.size or np.issubdtype(ids.dtype, np.integer))
    if not whole or ((ids < 0) | (ids >= vocab_size)).any() or len(np.unique(ids)) != len(ids):
        raise UsageError(
            "bad-argument",
            "always-ids must be distinct ids of the vocabulary",
            where="always_ids",
            got=ids.tolist(),
            expected=f"integers from 0 to {vocab_size - 1}",
        )
    return tuple(int(i) for i in ids)


def temperatures_of(given: Any) -> tuple[float, ...]:
    """Temperatures of `lse_at` as a user gave them, in any sequence or array.

    Raises: UsageError bad-argument.
    """
    try:
        values = np.asarray(given if isinstance(given, str) else list(given), np.float64)
        valid = values.ndim == 1 and bool((np.isfinite(values) & (values > 0)).all())
    except (TypeError, ValueError):
        valid = False
    if not valid or len(np.unique(values)) != len(values):
        raise UsageError(
            "bad-argument",
            "temperatures must be positive, finite and distinct",
            where="lse_at",
            got=given,
            expected="a list of numbers such as [2.0, 4.0]",
        )
    return tuple(values.tolist())


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
    always = always_ids_of(always_ids, vocab_size)
    names = aux_fields(signal, vocab_size, aux, sample_kind=sample_kind, labelled=labelled)
    temperatures = temperatures_of(lse_at)
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
    try:
        configured = canonical_json(dict(configuration))
    except (TypeError, ValueError) as error:
        raise UsageError(
            "bad-argument",
            f"it cannot be written as JSON: {error}",
            where="configuration",
            expected="numbers, text, booleans, lists and dictionaries of them",
        ) from None
    features = ["pairs"] if any(group.pairs for group in schema.groups) else []
    features += [] if images is None else [IMAGES_FEATURE]
    if rank_ids:
        _check_ranks(signal, container)
        features.append(RANKS_FEATURE)
    try:
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
            configuration_sha256=sha256_hex(configured),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(
            "bad-argument",
            f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            got=repr(first["input"])[:80],
        ) from None


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
