"""One sample: its tokens with measures, and what each position keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from logitstore.display.entries import EXPLAINED, Entries, SampleEntries
from logitstore.display.measures import MEASURES, Measured, measure_sample
from logitstore.record.sequences import IGNORE
from logitstore.spec.errors import UsageError
from logitstore_server.viewer.graph import graph_view
from logitstore_server.viewer.image_panel import picture_data
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["MAX_TOKENS", "ViewedSample", "number"]

# Positions of one answer, of tokens and of entries.
MAX_TOKENS = 2048
MAX_POSITIONS = 256
# Ids of a position that one answer lists unless asked for more, and the most it ever lists.
TOP_SHOWN = 16
MAX_TOP = 1024
# Of a position's cumulative mass: where the curve is told, and the masses whose ids are counted.
MASS_RANKS = tuple(sorted({*(1 << n for n in range(20)), *(3 << n for n in range(18))}))
MASS_LEVELS = (0.9, 0.95, 0.99)
# Rows of the table on the page.
TABLE_ROWS = 32


class ViewedSample:
    """One sample of one store.

    Raises: NotFoundError sample-out-of-range; IntegrityError, FormatError and StorageError when its
    chunk cannot be read.
    """

    def __init__(self, viewed: ViewedStore, sample: int) -> None:
        self.viewed = viewed
        self.number = sample
        self.shard, self.chunk, self.row = viewed.store.locate(sample)
        self.record = viewed.chunk(self.shard, self.chunk).sample(self.row)
        self.entries = SampleEntries(self.record, viewed.header)
        self.measures = measure_sample(self.entries)
        self.positions = self.record.num_positions

    @property
    def key(self) -> str | None:
        """The sample's stable name, None where the store keeps none."""
        return next(iter(self.record.sample_keys()), None)

    def choose(self, measure: str | None) -> str:
        """The measure to show: the one asked for, else the first that has values."""
        if measure:
            if measure not in MEASURES:
                raise UsageError(
                    "bad-argument", "no such measure", where="measure", expected=", ".join(MEASURES)
                )
            return measure
        has = [name for name, found in self.measures.items() if found.values is not None]
        return has[0] if has else "entropy"

    def page(self, measure: str | None, position: int) -> dict[str, Any]:
        """Everything the page shows except tokens and entries, which come in pieces."""
        store = self.viewed.store
        position = min(max(position, 0), max(self.positions - 1, 0))
        start = position // TABLE_ROWS * TABLE_ROWS
        header = self.viewed.header
        return {
            "store": self.viewed.name,
            "location": str(store.location),
            "signal": str(header.signal),
            "sample_kind": header.sample_kind,
            "sample": self.number,
            "samples": store.num_samples,
            "sample_key": self.key,
            "shard": store.shards[self.shard].shard,
            "chunk": self.chunk,
            "row": self.row,
            "positions": self.positions,
            "segments": self._segments(),
            "measure": self.choose(measure),
            "position": position,
            "measures": [self._measure(found) for found in self.measures.values()],
            "rows": self.rows(start, min(start + TABLE_ROWS, self.positions)),
            "rows_from": start,
            "picture": picture_data(self),
            "graph": graph_view(self.record, header, self.viewed.glyphs),
        }

    def tokens(self, start: int, count: int) -> dict[str, Any]:
        """Glyphs and measures of consecutive positions, at most `MAX_TOKENS`."""
        stop = min(start + min(count, MAX_TOKENS), self.positions)
        part = slice(start, max(start, stop))
        tokens = self.record.get("tokens")
        ids = self.entries.labels[part] if tokens is None else tokens[part]
        shown = [self._glyphs(int(i)) for i in ids]
        segments = self.record.get("segment_ids")
        return {
            "from": start,
            "count": len(shown),
            "total": self.positions,
            "ids": [int(i) for i in ids],
            "text": [glyphs.text for glyphs in shown],
            "kind": [glyphs.kind for glyphs in shown],
            "segment": [] if segments is None else segments[part].tolist(),
            "measures": {
                name: [number(v, found.scale.digits + 3) for v in found.values[part]]
                for name, found in self.measures.items()
                if found.values is not None
            },
        }

    def kept(self, start: int, count: int, top: int = TOP_SHOWN) -> dict[str, Any]:
        """What consecutive positions keep, at most `MAX_POSITIONS`, the `top` heaviest of each."""
        stop = min(start + min(count, MAX_POSITIONS), self.positions)
        top = min(top, MAX_TOP)
        return {
            "from": start,
            "count": max(0, stop - start),
            "total": self.positions,
            "positions": [self._kept(p, self.entries.at(p), top) for p in range(start, stop)],
        }

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Table rows: position, token, next token, measures, the first kept ids."""
        tokens = self.record.get("tokens")
        rows = []
        for p in range(start, stop):
            entries = self.entries.at(p)
            label = int(self.entries.labels[p])
            rows.append(
                {
                    "position": p,
                    "id": None if tokens is None else int(tokens[p]),
                    "text": "" if tokens is None else self._glyphs(int(tokens[p])).text,
                    "label": None if label == IGNORE else label,
                    "label_text": "" if label == IGNORE else self._glyphs(label).text,
                    "values": {
                        name: None if found.values is None else number(found.values[p])
                        for name, found in self.measures.items()
                    },
                    "first": []
                    if entries is None
                    else [
                        {"text": self._glyphs(int(i)).text, "value": number(v)}
                        for i, v in zip(entries.ids[:3], entries.values[:3], strict=True)
                    ],
                }
            )
        return rows

    def _kept(self, position: int, entries: Entries | None, top: int) -> dict[str, Any]:
        if entries is None:
            label = _label_only(self.entries.label(position))
            return {
                "position": position,
                "entries": [],
                "kept": 0,
                "heads": None,
                "label": self._label(label),
                "mass": None,
                "outside": None,
                "always": [],
            }
        scores = entries.outside_kind == "undefined"
        listed = []
        for slot, (i, v) in enumerate(zip(entries.ids[:top], entries.values[:top], strict=True)):
            token = int(i)
            listed.append(
                {
                    "id": token,
                    **self._shown(token),
                    "value": number(v),
                    "logprob": None if scores or v <= 0 else number(math.log(v)),
                    "rank": slot if slot < entries.ranked else None,
                    "exact": bool(entries.exact[slot]),
                    "count": None if entries.counts is None else int(entries.counts[slot]),
                    "label": token == entries.label,
                }
            )
        return {
            "position": position,
            "entries": listed,
            "kept": len(entries.ids),
            "heads": entries.num_heads,
            "label": self._label(entries),
            "mass": _mass(entries),
            "outside": {
                "mass": None if entries.outside is None else number(entries.outside),
                "kind": entries.outside_kind,
                "how": EXPLAINED[entries.outside_kind],
            },
            "always": [
                {"id": i, **self._shown(i), "value": number(math.exp(v)), "logprob": number(v)}
                for i, v in entries.always.items()
            ],
        }

    def _label(self, entries: Entries) -> dict[str, Any] | None:
        if entries.label is None:
            return None
        logprob = entries.label_logprob
        return {
            "id": entries.label,
            **self._shown(entries.label),
            "value": None if logprob is None else number(math.exp(logprob)),
            "logprob": None if logprob is None else number(logprob),
            "rank": entries.label_rank,
            "kept": bool((entries.ids == entries.label).any()),
        }

    def _shown(self, token: int) -> dict[str, str]:
        glyphs = self._glyphs(token)
        return {"text": glyphs.text, "kind": glyphs.kind}

    def _glyphs(self, token: int) -> Any:
        return self.viewed.glyphs(token)

    def _measure(self, found: Measured) -> dict[str, Any]:
        mean = None
        if found.values is not None and not np.isnan(found.values).all():
            finite = found.values[np.isfinite(found.values)]
            mean = number(finite.mean()) if len(finite) else None
        return {**found.scale.as_dict(source=found.source, how=found.how), "mean": mean}

    def _segments(self) -> int:
        segments = self.record.get("segment_ids")
        return 1 if segments is None or not len(segments) else len(np.unique(segments))


def _mass(entries: Entries) -> dict[str, Any] | None:
    """The cumulative-mass curve at `MASS_RANKS`, and how many ids hold 90, 95 and 99 %: None where
    more are needed than the record ranks."""
    mass = entries.cumulative_mass()
    if mass is None:
        return None
    ks = [k for k in MASS_RANKS if k < len(mass)] + [len(mass)]
    needed = {}
    for level in MASS_LEVELS:
        # What is stored is rounded; the last of all ids makes it whole.
        reached = np.flatnonzero(mass >= level - 1e-6)
        needed[f"{level:.2f}"] = int(reached[0]) + 1 if len(reached) else None
    return {
        "ks": ks,
        "mass": [number(mass[k - 1]) for k in ks],
        "needed": needed,
        "ranked": len(mass),
    }


def _label_only(known: dict[str, Any]) -> Entries:
    """Entries of a position that keeps nothing but its label."""
    nothing = np.empty(0)
    return Entries(
        ids=nothing.astype(np.int64),
        values=nothing,
        exact=nothing.astype(np.bool_),
        ranked=0,
        outside=None,
        outside_kind="unknown",
        **known,
    )


def number(value: Any, digits: int = 6) -> float | None:
    """A float for JSON, in so many significant digits: None for what JSON cannot say as a number
    (NaN, and the log of nothing)."""
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
