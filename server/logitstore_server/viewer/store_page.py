"""A store's overview and its shards, from documents alone: no chunk is read for these pages."""

from __future__ import annotations

import math
from typing import Any

from logitstore.display.glyphs import class_names
from logitstore.spec.errors import LogitstoreError, NotFoundError
from logitstore.spec.statistics import CumulativeMass, Measure, Reliability
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["SHARDS_SHOWN", "overview", "provenance", "shard_page"]

# Rows of the shard table on one page, and of a shard's chunk table.
SHARDS_SHOWN = 100
CHUNKS_SHOWN = 256
# Always-ids, and samples that a shard left out.
IDS_SHOWN = 24
LEFT_OUT_SHOWN = 100

# Of the cumulative mass; names in its statistics.
MASS_LEVELS = ("0.90", "0.95", "0.99")

# measure -> title, and what the horizontal axis says
_TITLES = {
    "entropy": ("Entropy", "nats"),
    "top1_prob": ("Top-1 probability", "probability"),
    "kept_mass": ("Kept mass", "share of mass"),
    "num_ids": ("Unique ids", "ids per position"),
    "label_rank_log2": ("Label rank", "log2(1 + rank)"),
    "label_logprob": ("Label log-prob", "nats"),
}


def overview(viewed: ViewedStore, first_shard: int = 0) -> dict[str, Any]:
    """Everything the overview shows; statistics that cannot be read are replaced by the reason."""
    store = viewed.store
    total = sum(view.object_bytes for view in store.shards)
    body: dict[str, Any] = {
        "store": viewed.name,
        "location": str(store.location),
        "sealed": store.sealed,
        "signal": str(viewed.header.signal),
        "samples": store.num_samples,
        "positions": store.num_positions,
        "bytes": total,
        "bytes_per_position": total / store.num_positions if store.num_positions else None,
        "provenance": provenance(viewed),
        "table_problem": _problem(viewed.table_problem),
        "sample_kind": viewed.header.sample_kind,
        "has_text": viewed.table_problem is None and viewed.table is not None,
        "has_names": bool(class_names(viewed.header)),
        "statistics_from": _aux(viewed),
        "problem": None,
        "damage": [error.as_dict() for error in _damage(viewed)],
        "labels": 0,
        "nll": None,
        "columns": [],
        "charts": [],
        "reliability": None,
        "cumulative_mass": None,
        **_shards(viewed, first_shard),
    }
    try:
        statistics = viewed.statistics
        body["columns"] = _columns(viewed.column_bytes, total, store.num_positions)
    except LogitstoreError as error:
        body["problem"] = _problem(error)
        return body
    logprob = statistics.measures.get("label_logprob")
    body["labels"] = statistics.labels
    body["nll"] = -logprob.mean if logprob is not None and logprob.count else None
    body["charts"] = [
        _chart(name, statistics.measures[name])
        for name in _TITLES
        if name in statistics.measures and statistics.measures[name].count
    ]
    body["reliability"] = _reliability(statistics.reliability)
    body["cumulative_mass"] = _mass(statistics.cumulative_mass)
    return body


def _aux(viewed: ViewedStore) -> str:
    """Fields that statistics are made from, as `precompute --aux` takes them."""
    labelled = viewed.header.schema_.column("label") is not None
    if viewed.header.sample_kind == "sequence" or labelled:
        return "entropy,top1_logprob,label_logprob,label_rank"
    return "entropy,top1_logprob"


def _damage(viewed: ViewedStore) -> list[LogitstoreError]:
    """Documents that cannot be read, as far as opening the store and its plan told."""
    found = list(viewed.store.damage)
    if isinstance(viewed.corpus, LogitstoreError) and viewed.corpus.where not in {
        error.where for error in found
    }:
        found.append(viewed.corpus)
    return found


def provenance(viewed: ViewedStore) -> list[dict[str, Any]]:
    """Where the numbers come from: groups of (term, value), values as text."""
    header = viewed.header
    teacher, tokenizer, packing = header.teacher, header.tokenizer, header.packing
    corpus: list[tuple[str, Any]] = []
    info = viewed.corpus
    if isinstance(info, LogitstoreError):
        corpus = [("corpus", f"cannot be read: {info.what}")]
    elif info is not None:
        corpus = [
            ("format", info.format),
            ("documents", f"{info.documents:,} in {len(info.files):,} files"),
            ("fingerprint", info.fingerprint),
        ]
    engine = " ".join(part for part in (teacher.engine, teacher.engine_version) if part)
    groups: list[tuple[str, list[tuple[str, Any]]]] = [
        (
            "Teacher",
            [
                ("name", teacher.name),
                ("revision", teacher.revision),
                ("fingerprint", teacher.fingerprint),
                ("engine", engine),
                ("compute dtype", teacher.compute_dtype),
                ("device", teacher.device_type),
            ],
        ),
        (
            "Tokenizer",
            []
            if tokenizer is None
            else [
                ("name", tokenizer.name),
                ("ids", f"{tokenizer.size:,}"),
                ("fingerprint", tokenizer.fingerprint),
                (
                    "BOS",
                    tokenizer.bos
                    if tokenizer.bos_id is None
                    else f"{tokenizer.bos}, id {tokenizer.bos_id}",
                ),
            ],
        ),
        ("Corpus", corpus),
        (
            "Store",
            [
                ("signal", str(header.signal)),
                ("fields", ", ".join(header.stored_fields) or "none"),
                ("temperatures", ", ".join(f"{t:g}" for t in header.lse_at)),
                ("always-ids", _first(header.always_ids)),
                ("vocabulary", f"{header.vocab_size:,}"),
                (
                    "packing",
                    None
                    if packing is None
                    else f"windows of {packing.seq_len:,} tokens, {packing.attention} attention",
                ),
                ("container", header.container),
                ("created", f"{header.created} by {header.writer.name} {header.writer.version}"),
                ("uuid", header.store_uuid),
            ],
        ),
    ]
    return [
        {"title": title, "terms": [[term, str(value)] for term, value in terms if value]}
        for title, terms in groups
        if any(value for _, value in terms)
    ]


def _first(ids: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:IDS_SHOWN]))
    return shown if len(ids) <= IDS_SHOWN else f"{shown}, … ({len(ids):,} in all)"


def shard_page(viewed: ViewedStore, shard: str, *, check: bool) -> dict[str, Any]:
    """One shard: its commit, its chunks, and on request a comparison of its bytes with them.

    Raises: NotFoundError shard-not-found.
    """
    store = viewed.store
    index = next((i for i, view in enumerate(store.shards) if view.shard == shard), None)
    if index is None:
        raise NotFoundError("shard-not-found", "no such shard is visible", where=store.location)
    state = viewed.check(index) if check else viewed.state(index)
    body: dict[str, Any] = {
        "store": viewed.name,
        "location": str(store.location),
        "shard": shard,
        "state": state.state,
        "problem": state.problem,
        "row": _shard_row(viewed, index),
        "first_sample": viewed.first_sample(index),
        "previous": store.shards[index - 1].shard if index else None,
        "next": store.shards[index + 1].shard if index + 1 < len(store.shards) else None,
        "chunks": [],
        "num_chunks": 0,
        "truncated": False,
        "commit": None,
    }
    try:
        commit = store.commit(index)
    except LogitstoreError as error:
        body["problem"] = error.as_dict()
        body["state"] = "damaged"
        return body
    sample = body["first_sample"]
    for number, chunk in enumerate(commit.chunks[:CHUNKS_SHOWN]):
        body["chunks"].append(
            {
                "chunk": number,
                "first_sample": sample,
                **chunk.model_dump(mode="json", exclude={"crc32c"}),
                "crc32c": f"{chunk.crc32c:08x}",
            }
        )
        sample += chunk.samples
    body["num_chunks"] = len(commit.chunks)
    body["truncated"] = (
        len(commit.chunks) > CHUNKS_SHOWN or len(commit.quarantined) > LEFT_OUT_SHOWN
    )
    body["commit"] = {
        "generation": commit.generation,
        "created": commit.created,
        "object": commit.object.name,
        "bytes": commit.object.bytes,
        "sha256": commit.object.sha256,
        "notes": list(commit.notes),
        "quarantined": [q.model_dump() for q in commit.quarantined[:LEFT_OUT_SHOWN]],
        "num_quarantined": len(commit.quarantined),
    }
    return body


def _shards(viewed: ViewedStore, first: int) -> dict[str, Any]:
    count = len(viewed.store.shards)
    first = min(max(first, 0), max(count - 1, 0)) // SHARDS_SHOWN * SHARDS_SHOWN
    shown = range(first, min(first + SHARDS_SHOWN, count))
    return {
        "num_shards": count,
        "first_shard": first,
        "shards_per_page": SHARDS_SHOWN,
        "truncated": count > len(shown),
        "shards": [_shard_row(viewed, i) for i in shown],
    }


def _shard_row(viewed: ViewedStore, index: int) -> dict[str, Any]:
    view = viewed.store.shards[index]
    state = viewed.state(index)
    row: dict[str, Any] = {
        "shard": view.shard,
        "generation": view.generation,
        "samples": view.samples,
        "positions": view.positions,
        "bytes": view.object_bytes,
        "bytes_per_position": view.object_bytes / view.positions if view.positions else None,
        "object": view.object,
        "entropy": None,
        "state": state.state,
        "problem": state.problem,
    }
    try:
        statistics = viewed.store.commit(index).statistics
    except LogitstoreError as error:
        return {**row, "state": "damaged", "problem": error.as_dict()}
    entropy = statistics.measures.get("entropy")
    if entropy is not None and entropy.count:
        row["entropy"] = [entropy.least, entropy.mean, entropy.greatest]
    return row


def _columns(sizes: dict[str, int], total: int, positions: int) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "bytes": size,
            "per_position": size / positions if positions else None,
            "share": size / total if total else 0.0,
        }
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]


def _chart(name: str, measure: Measure) -> dict[str, Any]:
    """A histogram between the first and the last bin that holds anything."""
    title, axis = _TITLES[name]
    histogram = measure.histogram
    used = [i for i, count in enumerate(histogram.counts) if count]
    part = range(used[0], used[-1] + 1)
    last = len(histogram.counts) - 1
    return {
        "name": name,
        "title": title,
        "axis": axis,
        "count": measure.count,
        "mean": measure.mean,
        "std": math.sqrt(max(0.0, measure.total_squares / measure.count - measure.mean**2)),
        "least": measure.least,
        "greatest": measure.greatest,
        "width": histogram.width,
        "bins": [
            {
                "from": round(histogram.low + i * histogram.width, 6),
                "to": round(histogram.low + (i + 1) * histogram.width, 6),
                "count": histogram.counts[i],
                "share": histogram.counts[i] / measure.count,
                # The outermost bins also hold what lies beyond.
                "open": (i == 0 and measure.least < histogram.low)
                or (i == last and measure.greatest >= histogram.low + (last + 1) * histogram.width),
            }
            for i in part
        ],
    }


def _reliability(found: Reliability | None) -> dict[str, Any] | None:
    """Confidence against accuracy, and the expected calibration error.

    ECE = sum over bins of share of positions times |accuracy − mean confidence|. Source: Naeini,
    Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    if found is None or not (total := sum(found.counts)):
        return None
    bins, error = [], 0.0
    width = 1 / len(found.counts)
    for i, count in enumerate(found.counts):
        confidence = found.confidence[i] / count if count else None
        accuracy = found.correct[i] / count if count else None
        if confidence is not None and accuracy is not None:
            error += count / total * abs(accuracy - confidence)
        bins.append(
            {
                "from": i * width,
                "to": (i + 1) * width,
                "count": count,
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )
    return {
        "bins": bins,
        "ece": error,
        "positions": total,
        "accuracy": sum(found.correct) / total,
        "confidence": sum(found.confidence) / total,
        "rule": f"{len(bins)} bins of equal width over [0, 1]; 1 falls into the last",
    }


def _mass(found: CumulativeMass | None) -> dict[str, Any] | None:
    """Mean mass of the k most probable ids; for each level, the least k of the curve whose mean
    mass reaches it, and those that half and nine tenths of the positions need."""
    if found is None or not found.positions:
        return None
    levels = []
    for level in (name for name in MASS_LEVELS if name in found.reach):
        counts = found.reach[level]
        reached, needed = 0, {}
        for k, count in zip(found.ks, counts, strict=True):
            reached += count
            for share in (0.5, 0.9):
                if share not in needed and reached >= share * found.positions:
                    needed[share] = k
        ends = zip(found.ks, found.mass, strict=True)
        mean = next((k for k, mass in ends if mass >= float(level) * found.positions), None)
        levels.append(
            {"level": level, "mean": mean, "half": needed.get(0.5), "most": needed.get(0.9)}
        )
    return {
        "positions": found.positions,
        "ks": list(found.ks),
        "mass": [mass / found.positions for mass in found.mass],
        "levels": levels,
    }


def _problem(error: LogitstoreError | None) -> dict[str, Any] | None:
    return None if error is None else error.as_dict()
