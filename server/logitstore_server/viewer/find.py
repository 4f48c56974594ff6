"""Search in one store: by sample key, text or token id, and by measures; always bounded.

A search is among at most `MAX_SHARDS` shards, best first by the statistics in their commits, and
decodes at most `MAX_CHUNKS` chunks of them. What was not looked at is said, and where to go on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.display.entries import SampleEntries
from logitstore.display.glyphs import readable, visible
from logitstore.display.measures import MEASURES, derives_from_logits, measure_sample
from logitstore.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.spec.errors import LogitstoreError, UsageError
from logitstore_server.viewer.sample_page import number
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["MAX_CELLS", "MAX_CHUNKS", "MAX_RESULTS", "MAX_SHARDS", "find"]

MAX_CHUNKS = 64
# Commits that one search may have to read, a millisecond each.
MAX_SHARDS = 512
# Dense logits that one search derives a measure from, some seconds' worth.
MAX_CELLS = 1 << 27
MAX_RESULTS = 100
_LARGEST = 1 << 53
# Bytes of text shown before and after a hit.
_AROUND = 36
_KEY = re.compile(r"(?P<file>.+)#(?P<document>[0-9]+)@[0-9]+")
# measure -> its name in the statistics of a shard
_STATISTIC = {"label_rank": "label_rank_log2"}
ORDERS = ("unsure", "sure", "corpus")


@dataclass(frozen=True)
class _Query:
    key: str
    text: bytes
    token: int | None
    measure: str
    least: float | None
    greatest: float | None
    order: str
    shards_from: int
    skip: int


def find(viewed: ViewedStore, query: Mapping[str, str]) -> dict[str, Any]:
    """Samples, or positions for a search by text or token id.

    Args:
        query: `key` (part of a sample's key), `text`, `token` (an id), `measure`, `least` and
            `greatest` (of the measure), `order` (unsure, sure or corpus), `shards_from` (shards
            already searched), `skip` (chunks of the next ones already looked at).

    Raises: UsageError bad-argument.
    """
    asked = _parse(query)
    shards = _shards_in_order(viewed, asked)
    everything = list(_chunks_in_order(viewed, shards))
    num_shards = len(viewed.store.shards)
    images = viewed.header.images
    body: dict[str, Any] = {
        "store": viewed.name,
        "query": {
            "key": query.get("key", ""),
            "text": query.get("text", ""),
            "token": query.get("token", ""),
            "measure": asked.measure,
            "least": query.get("least", ""),
            "greatest": query.get("greatest", ""),
            "order": asked.order,
        },
        "measures": [[scale.name, scale.title] for scale in MEASURES.values()],
        "digits": MEASURES[asked.measure].digits,
        "sample_kind": viewed.header.sample_kind,
        "pictures": images is not None and images.thumbnail_factor is not None,
        "has_text": viewed.table_problem is None and viewed.table is not None,
        "unit": "positions" if asked.text or asked.token is not None else "samples",
        "num_chunks": len(everything),
        "num_shards": num_shards,
        "shards_from": asked.shards_from,
        "shards_searched": len(shards),
    }
    results: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    looked = cells = 0
    for shard, chunk, first in islice(everything, asked.skip, asked.skip + MAX_CHUNKS):
        looked += 1
        try:
            record = viewed.chunk(shard, chunk)
        except LogitstoreError as error:
            problems.append({"shard": viewed.store.shards[shard].shard, **error.as_dict()})
            continue
        if derives_from_logits(record, (asked.measure,)):
            cells += record.num_positions * viewed.header.vocab_size
        for row in range(record.num_samples):
            results.extend(_matches(viewed, record.sample(row), first + row, asked))
        if cells > MAX_CELLS:
            break
    results = [r for r in results if _inside(r["value"], asked)]
    if asked.order != "corpus":
        sign = 1 if (asked.order == "unsure") == MEASURES[asked.measure].rising else -1
        results.sort(key=lambda r: math.inf if r["value"] is None else -sign * r["value"])
    end = asked.skip + looked
    going_on = None
    if end < len(everything):
        going_on = {"shards_from": asked.shards_from, "skip": end}
    elif asked.shards_from + len(shards) < num_shards:
        going_on = {"shards_from": asked.shards_from + len(shards), "skip": 0}
    return {
        **body,
        "results": results[:MAX_RESULTS],
        "num_results": len(results),
        "chunks_from": asked.skip,
        "chunks_looked_at": looked,
        "next": going_on,
        "truncated": len(results) > MAX_RESULTS,
        "partial": looked < len(everything) or len(shards) < num_shards or bool(problems),
        "problems": problems,
    }


def _parse(query: Mapping[str, str]) -> _Query:
    measure = query.get("measure") or "entropy"
    order = query.get("order") or "unsure"
    if measure not in MEASURES:
        raise UsageError(
            "bad-argument", "no such measure", where="measure", expected=", ".join(MEASURES)
        )
    if order not in ORDERS:
        raise UsageError("bad-argument", "no such order", where="order", expected=", ".join(ORDERS))
    token = _number(query, "token", int)
    return _Query(
        key=query.get("key", ""),
        text=query.get("text", "").encode(),
        token=None if token is None else int(token),
        measure=measure,
        least=_number(query, "least", float),
        greatest=_number(query, "greatest", float),
        order=order,
        shards_from=max(0, int(_number(query, "shards_from", int) or 0)),
        skip=max(0, int(_number(query, "skip", int) or 0)),
    )


def _number(query: Mapping[str, str], name: str, kind: Callable[[str], float]) -> float | None:
    text = query.get(name, "").strip()
    if not text:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    # Also of int(), whose results may be too long to be compared with anything.
    if not -_LARGEST <= value <= _LARGEST:
        raise UsageError("bad-argument", "not a number", where=name, expected="such as 5 or -2.5")
    return value


def _shards_in_order(viewed: ViewedStore, asked: _Query) -> list[int]:
    """The shards of this search, the most promising first. Those that a plan gives the key's
    document to come before all others; the others are searched as the corpus has them, `MAX_SHARDS`
    at a time."""
    shards = viewed.store.shards
    holding = _shards_of_key(viewed, asked.key)
    order = sorted(range(len(shards)), key=lambda shard: shards[shard].shard not in holding)
    order = order[asked.shards_from :][:MAX_SHARDS]
    if asked.order != "corpus":
        sign = 1.0 if (asked.order == "unsure") == MEASURES[asked.measure].rising else -1.0
        means = {shard: _shard_mean(viewed, shard, asked.measure) for shard in order}
        order.sort(key=lambda shard: -sign * means[shard])
        order.sort(key=lambda shard: shards[shard].shard not in holding)
    return order


def _chunks_in_order(viewed: ViewedStore, shards: list[int]) -> Iterator[tuple[int, int, int]]:
    """(shard, chunk, number of its first sample)."""
    store = viewed.store
    starts = np.concatenate([[0], np.cumsum([view.samples for view in store.shards])])
    for shard in shards:
        first = int(starts[shard])
        try:
            chunks = store.commit(shard).chunks
        except LogitstoreError:
            continue  # the overview names it
        for chunk, row in enumerate(chunks):
            yield shard, chunk, first
            first += row.samples


def _shard_mean(viewed: ViewedStore, shard: int, measure: str) -> float:
    try:
        measures = viewed.store.commit(shard).statistics.measures
    except LogitstoreError:
        return 0.0
    found = measures.get(_STATISTIC.get(measure, measure))
    return 0.0 if found is None else found.mean


def _shards_of_key(viewed: ViewedStore, key: str) -> set[str]:
    """Shards that a plan gives the key's document to."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        return set()
    document = int(parts["document"])
    found = set()
    try:
        plans = viewed.store.plans()
    except LogitstoreError:
        plans = ()  # only the order suffers
    for plan in plans:
        files = () if plan.corpus is None else plan.corpus.files
        for shard in plan.shards:
            for span in shard.spans:
                inside = span.first_document <= document < span.first_document + span.documents
                if inside and span.file < len(files) and files[span.file].name == parts["file"]:
                    found.add(shard.shard)
    return found


def _matches(
    viewed: ViewedStore, record: Record, sample: int, asked: _Query
) -> Iterator[dict[str, Any]]:
    key = next(iter(record.sample_keys()), "")
    if asked.key and asked.key not in key:
        return
    hits = list(_hits(viewed, record, asked))
    if not hits and (asked.text or asked.token is not None):
        return
    found = measure_sample(SampleEntries(record, viewed.header), (asked.measure,))
    values = found[asked.measure].values
    result = {"sample": sample, "sample_key": readable(key)}
    if not asked.text and asked.token is None:
        mean = None
        if values is not None and np.isfinite(values).any():
            mean = number(values[np.isfinite(values)].mean())
        start = visible(b"".join(_bytes(viewed, record)[:24]), 2 * _AROUND)
        if "tokens" not in record and len(known := labels(record)) and known[0] != IGNORE:
            start = viewed.glyphs(int(known[0])).text
        yield {
            **result,
            "position": None,
            "value": mean,
            "positions": record.num_positions,
            "before": "",
            "hit": start,
            "after": "",
        }
        return
    for position, before, hit, after in hits:
        yield {
            **result,
            "position": position,
            "value": None if values is None else number(values[position]),
            "positions": record.num_positions,
            "before": before,
            "hit": hit,
            "after": after,
        }


def _hits(
    viewed: ViewedStore, record: Record, asked: _Query
) -> Iterator[tuple[int, str, str, str]]:
    """(position, text before, hit, text after)."""
    if "tokens" not in record or not (asked.text or asked.token is not None):
        return
    tokens = record["tokens"]
    pieces = _bytes(viewed, record)
    ends: NDArray[np.int64] = np.cumsum([len(piece) for piece in pieces])
    whole = b"".join(pieces)
    if asked.token is not None:
        spans = [
            (int(p), int(ends[p]) - len(pieces[p]), int(ends[p]))
            for p in np.flatnonzero(tokens == asked.token)
        ]
    else:
        places = (m.start() for m in re.finditer(re.escape(asked.text), whole))
        spans = [
            (int(np.searchsorted(ends, at, side="right")), at, at + len(asked.text))
            for at in places
        ]
    for position, start, stop in spans:
        if asked.token is not None and asked.text and asked.text not in pieces[position]:
            continue
        yield (
            position,
            visible(whole[max(0, start - _AROUND) : start], 4 * _AROUND),
            visible(whole[start:stop], 4 * _AROUND),
            visible(whole[stop : stop + _AROUND], 4 * _AROUND),
        )


def _bytes(viewed: ViewedStore, record: Record) -> list[bytes]:
    """Bytes of each token; nothing where the store keeps no table."""
    table = None if viewed.table_problem is not None else viewed.table
    tokens = record.get("tokens")
    if tokens is None:
        return []
    if table is None:
        return [b""] * len(tokens)
    size = len(table)
    return [(table.tokens[t] or b"") if t < size else b"" for t in map(int, tokens)]


def _inside(value: float | None, asked: _Query) -> bool:
    if asked.least is None and asked.greatest is None:
        return True
    if value is None:
        return False
    return (asked.least is None or value >= asked.least) and (
        asked.greatest is None or value <= asked.greatest
    )
