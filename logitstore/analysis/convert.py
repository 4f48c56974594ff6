"""Narrower or differently packed copies of a store, without the teacher, where that is exact.

What is exact: another container; fewer ids of a top-K record; a nucleus of one; q8 for f16 (with
    its
stated bound); any signal from dense logits; fewer ranks of a graph. Everything else would invent
numbers the teacher never gave, and is refused with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.containers.ranked import IdRanks, count_ids, uses_ranks
from logitstore.record import Record
from logitstore.record.new_header import new_header, now
from logitstore.record.schema import aux_fields, layout_of
from logitstore.record.sequences import IGNORE, labels, loss_mask
from logitstore.record.statistics import merge, statistics_of
from logitstore.record.threshold import decode_threshold
from logitstore.record.topk import narrow_topk
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.spec.id_ranks import RANKS_TABLE
from logitstore.spec.plan import Plan, plan_fingerprint
from logitstore.spec.signals import (
    DenseSpec,
    GraphSpec,
    ThresholdSpec,
    TopKSpec,
    parse_signal,
)
from logitstore.store import Store, StoreWriter, create
from logitstore.store import open as open_store

__all__ = ["Converted", "convert"]

# More say nothing new of how frequent ids are.
_COUNTED_CHUNKS = 64

Columns = dict[str, NDArray[Any]]
Transform = Callable[[Record], Columns]


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        shards, skipped: shards written now, and those an earlier run had written.
        samples, positions: of the whole copy.
        source_bytes, target_bytes: object bytes before and after.
    """

    shards: int
    skipped: int
    samples: int
    positions: int
    source_bytes: int
    target_bytes: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    signal: str | None = None,
    container: Literal["zarr", "arrow"] | None = None,
    rank_ids: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Copy a store with another signal or container. Interrupted, the same call goes on.

    Args:
        source, target: folders or URLs; the target is created, or continued when it was begun by
            the same conversion of the same source.
        signal: such as "topk:32"; None keeps the source's.
        container: "zarr" or "arrow"; None keeps the source's.
        rank_ids: keep frequency ranks for ids, by how often the copy holds each; False: the ids
            themselves; None: as the source, where the copy's signal and container can.
        progress: called with the name of each shard once it is written.

    Raises: UsageError conversion-refused (with the reason), unknown-signal; what opening and
        creating
    stores raises.
    """
    with open_store(source) as store:
        old = store.header
        spec = old.signal if signal is None else parse_signal(signal)
        transform = _transform(old, spec)
        kind = container or old.container
        if rank_ids is None:
            can = spec.kind in ("topk", "sampled", "threshold") and kind == "zarr"
            rank_ids = can and uses_ranks(old)
        header = _header(store, spec, kind, rank_ids)
        tables = {ref.name: store.table(ref.name) for ref in old.tables}
        tables.pop(RANKS_TABLE, None)
        if rank_ids:
            tables[RANKS_TABLE] = _ranks(store, header, transform).encode()
        with create(target, header, tables) as writer:
            return _copy(store, writer, transform, progress)


def _copy(
    store: Store,
    writer: StoreWriter,
    transform: Transform,
    progress: Callable[[str], None] | None,
) -> Converted:
    header = writer.header
    make = _maker(store, header, transform)
    plans = {plan.number: writer.add_plan(_plan(plan, header)) for plan in store.plans()}
    done = writer.committed()
    written = 0
    for index, shard in enumerate(store.shards):
        if shard.shard in done:
            continue
        commit = store.commit(index)
        parts = []
        with writer.begin(shard.shard, plans[commit.plan]) as attempt:
            for chunk in range(len(commit.chunks)):
                record = store.read_chunk(index, chunk)
                copy = make(record)
                attempt.add(copy)
                parts.append(statistics_of(copy))
            mass = commit.statistics.cumulative_mass
            statistics = merge(parts).model_copy(update={"cumulative_mass": mass})
            attempt.commit(statistics=statistics, quarantined=commit.quarantined)
        written += 1
        if progress is not None:
            progress(shard.shard)
    with writer.reader() as copied:
        return Converted(
            shards=written,
            skipped=len(store.shards) - written,
            samples=copied.num_samples,
            positions=copied.num_positions,
            source_bytes=sum(s.object_bytes for s in store.shards),
            target_bytes=sum(s.object_bytes for s in copied.shards),
        )


def _maker(store: Store, header: Header, transform: Transform) -> Callable[[Record], Record]:
    """The function from a source record to the copy's."""
    columns_of = _from_dense(header) if isinstance(store.header.signal, DenseSpec) else transform

    def make(record: Record) -> Record:
        columns = columns_of(record)
        return Record(
            header.schema_,
            {c.name: columns[c.name].astype(c.dtype, copy=False) for c in header.schema_.columns},
        )

    return make


def _ranks(store: Store, header: Header, transform: Transform) -> IdRanks:
    """Ids by how often they stand in evenly spaced chunks of what the copy will hold."""
    make = _maker(store, header, transform)
    chunks = [
        (shard, chunk)
        for shard in range(len(store.shards))
        for chunk in range(len(store.commit(shard).chunks))
    ]
    counts = np.zeros(header.vocab_size, np.int64)
    for i in range(min(len(chunks), _COUNTED_CHUNKS)):
        place = chunks[i * len(chunks) // min(len(chunks), _COUNTED_CHUNKS)]
        counts += count_ids(make(store.read_chunk(*place)), header.vocab_size)
    return IdRanks.by_frequency(counts)


def _plan(plan: Plan, header: Header) -> Plan:
    """The source's plan under the copy's identity: the same shards in the same order."""
    digest = header.configuration_sha256
    return plan.model_copy(
        update={
            "store_uuid": header.store_uuid,
            "created": now(),
            "configuration_sha256": digest,
            "fingerprint": plan_fingerprint(digest, plan.number, plan.corpus, plan.shards),
        }
    )


def _header(store: Store, spec: Any, container: Literal["zarr", "arrow"], rank_ids: bool) -> Header:
    old = store.header
    labelled = old.sample_kind == "sequence" or old.schema_.column("label") is not None
    kept = set(old.stored_fields)
    if isinstance(old.signal, DenseSpec) and spec != old.signal:
        # Everything can be computed from the logits, but for what never came from them.
        _, _, defaults, impossible = layout_of(spec, old.vocab_size)
        kept = (kept | set(defaults)) - impossible
        if not labelled:
            kept -= {"label_logprob", "label_rank"}
    elif isinstance(old.signal, TopKSpec) and (old.signal.coding, spec.coding) == ("f16", "q8"):
        kept = {*old.stored_fields, "top1_logprob"}
    elif old.signal.kind == "threshold" and spec.kind == "topk":
        kept = {*old.stored_fields, "log_tail"}
    return new_header(
        spec,
        vocab_size=old.vocab_size,
        configuration={
            "converted_from": {
                "store_uuid": old.store_uuid,
                "snapshot": store.snapshot.digest,
                "signal": str(old.signal),
            },
            "signal": str(spec),
            "container": container,
            **({"rank_ids": True} if rank_ids else {}),
            "source": old.configuration,
        },
        teacher=old.teacher,
        container=container,
        sample_kind=old.sample_kind,
        aux=aux_fields(spec, old.vocab_size, kept, sample_kind=old.sample_kind, labelled=labelled),
        lse_at=old.lse_at,
        always_ids=old.always_ids,
        labelled=labelled,
        loss_mask=old.schema_.column("loss_mask") is not None,
        chunk_positions=old.chunk_positions,
        seed=old.seed,
        tokenizer=old.tokenizer,
        packing=old.packing,
        rank_ids=rank_ids,
        images=old.images,
    )


def _transform(header: Header, target: Any) -> Transform:
    """The function from a source record to the copy's columns, or a refusal with its reason."""
    source = header.signal
    if source == target:
        return lambda record: dict(record.arrays)
    if isinstance(source, DenseSpec) and target.kind != "scores":
        return lambda record: dict(record.arrays)  # replaced by the encoder of the copy
    if isinstance(source, TopKSpec) and isinstance(target, TopKSpec):
        return _narrower_topk(source, target)
    if isinstance(source, ThresholdSpec) and isinstance(target, TopKSpec):
        return _head_as_topk(header, target)
    if isinstance(source, GraphSpec) and isinstance(target, GraphSpec):
        if source.form == target.form == "rank" and target.k <= source.k:
            return lambda record: _fewer_ranks(record, source.k, target.k)
        raise _refuse(source, target, "only fewer ranks of a rank-form graph follow from it")
    reasons = {
        "sampled": "a random sample has neither the largest ids nor their probabilities",
        "topk": "the ids outside the top K, from which samples would be drawn, were never stored"
        if target.kind in ("sampled", "threshold")
        else "the ids outside the top K were never stored"
        if target.kind == "dense"
        else "its log-probs are rounded, and sums are taken over raw logits",
        "threshold": "its tail is one random draw; the order below the head is not known",
        "graph": "sums over positions cannot be taken apart again",
        "scores": "only the given candidates were scored",
        "dense": "dense logits do not say which candidates would have been given",
    }
    raise _refuse(source, target, reasons[source.kind])


def _narrower_topk(source: TopKSpec, target: TopKSpec) -> Transform:
    if target.k > source.k:
        raise _refuse(source, target, f"ids beyond the {source.k} stored ones are not known")
    if source.coding == "q8" and target.coding == "f16":
        raise _refuse(source, target, "log-probs rounded to 1/16 nat do not become exact again")
    if source.p is not None and (target.p is None or target.p > source.p):
        raise _refuse(source, target, f"positions were cut at mass {source.p}")
    return lambda record: narrow_topk(record, k=target.k, p=target.p, q8=target.coding == "q8")


def _head_as_topk(header: Header, target: TopKSpec) -> Transform:
    """The exact head of a threshold record as a top-h record, where every position's head reaches.

    The stored heads are the largest ids other than the label; the label joins where its rank is
    below theirs. Head log-probs keep their rounding to 1/64 nat, and heads behind the largest that
    lie within one such step of each other may change places.
    """
    if header.always_ids:
        raise _refuse(header.signal, target, "always-ids are left out of the head")
    if target.coding == "q8":
        raise _refuse(
            header.signal, target, "heads that are rounded already would be rounded twice"
        )
    if "label_rank" not in header.stored_fields:
        raise _refuse(header.signal, target, "without label_rank the label's place is not known")

    def transform(record: Record) -> Columns:
        entries = decode_threshold(record, ())
        width = max(int(entries.num_heads.max()), 1)
        is_head = np.arange(width) < entries.num_heads[:, None]
        owner = np.repeat(np.arange(record.num_positions), entries.num_heads + entries.num_tails)
        begin = np.cumsum(entries.num_heads + entries.num_tails) - (
            entries.num_heads + entries.num_tails
        )
        head = (np.arange(len(owner)) - begin[owner]) < entries.num_heads[owner]
        ids = np.zeros(is_head.shape, np.uint32)
        probs = np.zeros(is_head.shape)
        place = np.full(is_head.shape, np.inf)
        ids[is_head], probs[is_head] = entries.ids[head], entries.weights[head]
        label_slot = np.zeros(is_head.shape, np.bool_)
        label_slot[is_head] = entries.is_label[head]
        others = is_head & ~label_slot
        place[others] = (np.cumsum(others, axis=1) - 1)[others]
        rank = record["label_rank"].astype(np.float64)[:, None]
        # The label stands before the head it outranks; below the last head its place is unknown.
        known = label_slot & (rank <= others.sum(1, keepdims=True))
        place = np.where(known, rank - 0.5, place)
        order = np.argsort(place, axis=1, kind="stable")
        reach = (others | known).sum(1)
        ids = np.take_along_axis(ids, order, 1)
        probs = np.take_along_axis(probs, order, 1)
        kept = np.arange(width) < np.minimum(reach, target.k)[:, None]
        if target.p is not None:
            kept &= (np.cumsum(probs, axis=1) - probs) < target.p
        mass = np.where(kept, probs, 0.0).sum(1)
        enough = reach >= target.k
        if target.p is not None:
            enough |= mass >= target.p
        if not enough.all():
            raise _refuse(
                header.signal,
                target,
                f"the head of {int((~enough).sum())} of {len(enough)} positions is shorter",
            )
        outside = np.where(kept, 0.0, probs).sum(1) + entries.tail_mass
        with np.errstate(divide="ignore"):
            logprobs, log_tail = np.log(probs), np.log(outside)
        columns = dict(record.arrays)
        columns["log_tail"] = log_tail
        if target.p is None:
            columns["ids"], columns["logprobs"] = ids[:, : target.k], logprobs[:, : target.k]
        else:
            columns["num_ids"] = kept.sum(1)
            columns["ids"], columns["logprobs"] = ids[kept], logprobs[kept]
        return columns

    return transform


def _fewer_ranks(record: Record, old_k: int, new_k: int) -> Columns:
    rows, cols = np.triu_indices(old_k)
    inside = (rows < new_k) & (cols < new_k)
    triangle = record["coactivation"][:, inside]
    full = np.zeros((len(triangle), new_k, new_k))
    a, b = np.triu_indices(new_k)
    full[:, a, b] = triangle
    full[:, b, a] = triangle
    columns = dict(record.arrays)
    columns["coactivation"], columns["row_sums"] = triangle, full.sum(2)
    return columns


def _from_dense(header: Header) -> Transform:
    """Encode stored logits as a capture would have, with the same keys and positions."""
    import torch

    from logitstore.record.random import key_of
    from logitstore.signals import Completion, encoder

    encode = encoder(header)

    def transform(record: Record) -> Columns:
        columns = dict(record.arrays)
        logits = columns.pop("logits")
        if isinstance(header.signal, DenseSpec):
            finite = np.abs(logits[np.isfinite(logits)])
            if finite.max(initial=0) > np.finfo(header.signal.dtype).max:
                raise _refuse(
                    DenseSpec(dtype="float32"),
                    header.signal,
                    f"a raw logit of {finite.max():.3g} does not fit",
                )
            return {**columns, "logits": logits}
        lengths = record["sample_lengths"].astype(np.int64)
        keys = np.array([key_of(k) for k in record.sample_keys()], np.uint64).view(np.int64)
        starts = record.sample_offsets()[:-1]
        label = labels(record)
        fresh = encode.encode(
            torch.from_numpy(logits.astype(np.float32)),
            labels_P=torch.from_numpy(np.where(label == IGNORE, -1, label)),
            keys_P=torch.from_numpy(np.repeat(keys, lengths)),
            positions_P=torch.from_numpy(
                np.arange(record.num_positions) - np.repeat(starts, lengths)
            ),
        )
        segments = record.get("segment_ids")
        if segments is None:
            segments = np.zeros(record.num_positions, np.uint16)
        fresh = encode.complete(
            fresh, Completion(record["sample_lengths"], segments, loss_mask(record))
        )
        return {**columns, **fresh}

    return transform


def _refuse(source: Any, target: Any, reason: str) -> UsageError:
    return UsageError(
        "conversion-refused",
        f"{target} does not follow from {source}: {reason}",
        hint="capture again with the signal you need, or see docs/signals.md",
    )
