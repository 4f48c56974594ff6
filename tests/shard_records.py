"""Headers, records and commits made of nothing, for tests of what stores and objects hold."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np

from logitstore.containers import container
from logitstore.record import Record, build_schema
from logitstore.spec.commit import Commit, ObjectRef
from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.header import Header, Software, TeacherInfo
from logitstore.spec.schema import Column, Group, Schema
from logitstore.spec.signals import ThresholdSpec, TopKSpec
from logitstore.spec.statistics import Statistics

STORE_UUID = "0123456789abcdef0123456789abcdef"
_SOFTWARE = Software(name="logitstore-tests", version="1")
_CREATED = "2026-01-01T00:00:00Z"


def _sequence(*columns: Column, groups: tuple[Group, ...] = ()) -> Schema:
    return Schema(
        columns=(
            Column(name="sample_lengths", dtype="uint32", axis="sample"),
            Column(name="num_sample_key", dtype="uint16", axis="sample"),
            Column(name="sample_key", dtype="uint8", axis="sample_key"),
            Column(name="tokens", dtype="uint32", axis="position"),
            *columns,
        ),
        groups=(Group(name="sample_key", owner="sample", text=True), *groups),
    )


# One schema for every shape of column that a signal uses.
SCHEMAS: dict[str, Schema] = {
    "fixed-k": build_schema(
        TopKSpec(k=5),
        vocab_size=1000,
        sample_kind="sequence",
        aux=("label_logprob", "label_rank", "entropy", "log_tail", "lse"),
        lse_at=(2.0,),
        loss_mask=True,
        num_always=2,
    ),
    "nucleus": _sequence(
        Column(name="num_ids", dtype="uint16", axis="position"),
        Column(name="ids", dtype="uint32", axis="ids"),
        Column(name="logprobs", dtype="float16", axis="ids", step=1 / 16),
        groups=(Group(name="ids", owner="position"),),
    ),
    "sampled": _sequence(
        Column(name="num_ids", dtype="uint16", axis="position"),
        Column(name="ids", dtype="uint32", axis="ids"),
        Column(name="counts", dtype="uint16", axis="ids"),
        groups=(Group(name="ids", owner="position", id_column="ids", pairs="pairs"),),
    ),
    "threshold": _sequence(
        Column(name="label_logprob", dtype="float16", axis="position"),
        Column(name="num_heads", dtype="uint8", axis="position"),
        Column(name="head_ids", dtype="uint32", axis="heads"),
        Column(name="head_logprobs", dtype="float16", axis="heads", step=1 / 64),
        Column(name="num_tail", dtype="uint16", axis="position"),
        Column(name="tail_ids", dtype="uint32", axis="tail"),
        groups=(
            Group(name="heads", owner="position"),
            Group(name="tail", owner="position", id_column="tail_ids", pairs="tail_pairs"),
        ),
    ),
    "threshold-signal": build_schema(
        ThresholdSpec(tau="1/40"),
        vocab_size=1000,
        sample_kind="classification",
        aux=("label_logprob",),
    ),
    "every-type": _sequence(
        Column(name="flags", dtype="bool", axis="position", inner=(3,)),
        Column(name="small", dtype="uint8", axis="sample"),
        Column(name="wide", dtype="uint64", axis="position"),
        Column(name="signed", dtype="int32", axis="sample", inner=(2, 3)),
        Column(name="reals", dtype="float32", axis="position"),
        Column(name="num_edges", dtype="uint32", axis="sample"),
        Column(name="edges", dtype="float32", axis="edges", inner=(2,)),
        groups=(Group(name="edges", owner="sample"),),
    ),
}


def header(
    schema: Schema,
    *,
    container: str,
    vocab_size: int = 1000,
    chunk_positions: int = 64,
    reader_features: tuple[str, ...] = (),
) -> Header:
    """A header around a schema."""
    configuration = {"signal": "topk:5", "vocab_size": vocab_size}
    return Header(
        store_uuid=STORE_UUID,
        created=_CREATED,
        writer=_SOFTWARE,
        reader_features=reader_features,
        container=container,  # type: ignore[arg-type]
        sample_kind="sequence" if schema.column("tokens") else "classification",
        alignment="next-token" if schema.column("tokens") else "none",
        signal=TopKSpec(k=5),
        vocab_size=vocab_size,
        chunk_positions=chunk_positions,
        schema=schema,
        teacher=TeacherInfo(name="py:tests:none"),
        configuration=configuration,
        configuration_sha256=sha256_hex(canonical_json(configuration)),
    )


def random_record(
    schema: Schema, lengths: Sequence[int], *, seed: int, vocab_size: int = 1000, entries: int = 6
) -> Record:
    """Samples of the given lengths, arbitrary values, at most `entries` in each owner's group."""
    rng = np.random.default_rng(seed)
    count = {"sample": len(lengths), "position": sum(lengths)}
    arrays: dict[str, np.ndarray] = {"sample_lengths": np.array(lengths, np.uint32)}
    for group in schema.groups:
        most = min(entries, vocab_size)
        counts = rng.integers(0, most + 1, count[group.owner])
        column = schema.column(group.count_column)
        assert column is not None
        arrays[column.name] = counts.astype(column.dtype)
        count[group.name] = int(counts.sum())
        if group.id_column is not None:
            picked = [np.sort(_distinct(rng, vocab_size, n)) for n in counts]
            arrays[group.id_column] = np.concatenate([*picked, np.empty(0)]).astype(np.uint32)
        if group.text:
            letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz#@0123456789", np.uint8)
            arrays[group.name] = rng.choice(letters, count[group.name])
    for column in schema.columns:
        if column.name not in arrays:
            shape = (count[column.axis], *column.inner)
            arrays[column.name] = _values(rng, column, shape, vocab_size)
    return Record(schema, {c.name: arrays[c.name] for c in schema.columns})


def write_shard(
    head: Header, records: Sequence[Record], *, attempt: str = "0a1b2c3d"
) -> tuple[bytes, Commit]:
    """The object with one chunk per record, and the commit that makes it visible."""
    kind = container(head.container)
    file = io.BytesIO()
    writer = kind.writer(file, head)
    for record in records:
        writer.add(record)
    summary = writer.finish()
    data = file.getvalue()
    name = f"0001-000000.{attempt}{kind.suffix}"
    commit = Commit(
        store_uuid=head.store_uuid,
        plan=1,
        plan_fingerprint="0" * 64,
        shard="0001-000000",
        generation=1,
        attempt=attempt,
        created=_CREATED,
        writer=_SOFTWARE,
        object=ObjectRef(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
        samples=summary.samples,
        positions=summary.positions,
        layout=summary.layout,
        chunks=summary.chunks,
        column_bytes=summary.column_bytes,
        statistics=Statistics(),
    )
    return data, commit


def _distinct(rng: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    """Distinct ids; the last one is in play so that every width is tried."""
    if vocab_size <= 4096:
        return rng.choice(vocab_size, count, replace=False)
    found = {vocab_size - 1}
    while len(found) < count:
        found.add(int(rng.integers(vocab_size)))
    return np.array(sorted(found)[len(found) - count :], np.uint64)


def _values(
    rng: np.random.Generator, column: Column, shape: tuple[int, ...], vocab_size: int
) -> np.ndarray:
    if column.step is not None:
        return (rng.integers(0, 400, shape) * -column.step + 0.0).astype(column.dtype)
    if column.dtype.startswith("float"):
        values = -rng.gamma(1.0, 3.0, shape)
        values[rng.random(shape) < 0.05] = -np.inf
        return values.astype(column.dtype)
    if column.dtype == "bool":
        return rng.random(shape) < 0.5
    if column.name.endswith(("ids", "tokens", "label")):
        top = min(vocab_size - 1, np.iinfo(column.dtype).max)
        return rng.integers(0, top, shape, dtype=np.uint64, endpoint=True).astype(column.dtype)
    info = np.iinfo(column.dtype)
    return rng.integers(info.min, info.max, shape, dtype=column.dtype, endpoint=True)
