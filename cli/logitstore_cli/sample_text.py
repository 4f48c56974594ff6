"""One sample as rows of text and numbers, for `inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from logitstore.record.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.spec.header import Header
from logitstore.spec.signals import EMPTY_SLOT
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["decode_sample"]

# Of the ids a position keeps, the heaviest; a dense row would list the whole vocabulary.
_KEPT_SHOWN = 16


def decode_sample(store: Store, sample: int, rows: int | None) -> dict[str, Any]:
    """A JSON-able view of one sample.

    Args:
        rows: how many positions, None for all.

    Raises: NotFoundError sample-out-of-range; what `Store.read_chunk` raises.
    """
    shard, chunk, row = store.locate(sample)
    record = store.read_chunk(shard, chunk).sample(row)
    header = store.header
    text = _texts(store)
    tokens = record.get("tokens")
    label = labels(record)
    fields = [name for name in header.stored_fields if name in record]
    length = record.num_positions
    value, kept = _kept(record, header)
    return {
        "sample": sample,
        "shard": store.shards[shard].shard,
        "chunk": chunk,
        "row": row,
        "sample_key": next(iter(record.sample_keys()), None),
        "length": length,
        "fields": fields,
        "kept_value": value,
        "rows": [
            {
                "position": position,
                "id": None if tokens is None else int(tokens[position]),
                "text": "" if tokens is None else text(int(tokens[position])),
                "label": None if label[position] == IGNORE else int(label[position]),
                "label_text": "" if label[position] == IGNORE else text(int(label[position])),
                "fields": {name: _finite(record[name][position]) for name in fields},
                "kept": [
                    {"id": i, "text": text(i), "value": _finite(v)} for i, v in kept(position)
                ],
            }
            for position in range(length if rows is None else min(rows, length))
        ],
    }


def _texts(store: Store) -> Any:
    """id -> text, from the store's table; without one, the number."""
    tokenizer = store.header.tokenizer
    if tokenizer is None or tokenizer.table is None:
        return str
    name = tokenizer.table
    table = TokenizerTable.decode(store.table(name), where=f"{store.location}/tables/{name}")
    return lambda token: table.text([token])


def _kept(record: Record, header: Header) -> tuple[str | None, Any]:
    """What the numbers beside kept ids mean, and a function from position to (id, number) pairs."""
    kind = header.signal.kind
    if kind == "topk":
        return "probability", lambda p: _pairs(*_entries(record, "ids", "logprobs", p), exp=True)
    if header.signal.kind == "sampled":
        scale = 1 / header.signal.rounds
        return "share of draws", lambda p: _pairs(
            *_entries(record, "ids", "counts", p), scale=scale
        )
    if kind == "threshold":
        return "head probability", lambda p: _pairs(
            *_entries(record, "head_ids", "head_logprobs", p), exp=True
        )
    if kind == "scores":
        return "score", lambda p: _pairs(*_given(*_entries(record, "ids", "scores", p)))
    if kind == "dense":
        return "logit", lambda p: _pairs(np.arange(header.vocab_size), record["logits"][p])
    return None, lambda p: []


def _entries(record: Record, ids: str, values: str, position: int) -> tuple[Any, Any]:
    column = record.schema.column(ids)
    assert column is not None
    if column.axis == "position":
        return record[ids][position], record[values][position]
    start, stop = record.group_offsets(column.axis)[position : position + 2]
    return record[ids][start:stop], record[values][start:stop]


def _given(ids: Any, scores: Any) -> tuple[Any, Any]:
    """Candidates without the slots that are empty."""
    return ids[ids != EMPTY_SLOT], scores[ids != EMPTY_SLOT]


def _pairs(
    ids: Any, values: Any, *, exp: bool = False, scale: float = 1.0
) -> Iterator[tuple[int, float]]:
    numbers = np.asarray(values, np.float64)
    numbers = (np.exp(numbers) if exp else numbers) * scale
    heaviest = np.argsort(-numbers, kind="stable")[:_KEPT_SHOWN]
    return ((int(ids[i]), float(numbers[i])) for i in heaviest)


def _finite(value: Any) -> float | int:
    """JSON has no infinities; a log-prob of -inf shows as the lowest float16."""
    if isinstance(value, np.integer):
        return int(value)
    return float(np.nan_to_num(np.float64(value), neginf=-65504.0, posinf=65504.0))
