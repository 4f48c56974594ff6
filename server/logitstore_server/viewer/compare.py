"""Two stores over the same corpus, position by position.

A record tells some probabilities exactly. Over the ids that both tell exactly, with everything else
as one further outcome, divergences of the two distributions are computed; by the data processing
inequality (Cover and Thomas, "Elements of Information Theory", 2006, section 2.8) they are lower
bounds of those over the whole vocabulary, and equal to them when every id is told.

Letters: C ids that both records tell exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.display.entries import Entries
from logitstore.display.measures import Scale
from logitstore.spec.errors import AlignmentError, LogitstoreError, NotFoundError, UsageError
from logitstore_server.viewer.sample_page import ViewedSample, number
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["COMPARISONS", "ComparedSample", "compare_position", "compare_stores"]

# Samples of one answer, positions of each that are compared, and rows shown.
MAX_SAMPLES = 8
MAX_POSITIONS = 2048
MAX_ROWS = 100
# Ranks that overlap looks at.
OVERLAP = 10

# name -> title, what it says
COMPARISONS = {
    "kl": ("KL(A‖B)", "nats; what B loses of A"),
    "js": ("Jensen–Shannon", "nats, at most ln 2"),
    "missed": ("A outside B's ids", "share of A's mass on ids that B does not tell; at most this"),
    "overlap": (f"Overlap@{OVERLAP}", f"share of the {OVERLAP} most probable ids that both name"),
    "agree": ("Top-1 agreement", "1: the same most probable id"),
}


# The heat map's colours: a stronger one says that the stores disagree more.
SCALES = {
    scale.name: scale
    for scale in (
        Scale("kl", "KL(A‖B)", "nats", (0.01, 0.03, 0.1, 0.3, 0.6, 1.2, 2.5), None),
        Scale("js", "Jensen–Shannon", "nats", (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5), None),
        Scale("missed", "A outside B's ids", "", (0.01, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5), None),
        Scale(
            "overlap", f"Overlap@{OVERLAP}", "", (0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35), None, 2
        ),
        Scale("agree", "Top-1 agreement", "", (0.5,) * 7, None, 0),
    )
}


def compare_position(a: Entries, b: Entries, vocab_size: int) -> dict[str, Any]:
    """Divergences (nats) of one position.

    `exact` tells whether they are exact and not lower bounds; `shared` is C, the number of ids both
    tell exactly. A value is None where the records do not tell it.
    """
    p, q = _known(a), _known(b)
    shared = sorted(p.keys() & q.keys())
    exact = len(shared) == vocab_size
    out: dict[str, Any] = {"shared": len(shared), "exact": exact, "kl": None, "js": None}
    if shared:
        p_C = _with_rest([p[i] for i in shared], exact)
        q_C = _with_rest([q[i] for i in shared], exact)
        middle = (p_C + q_C) / 2
        out["kl"] = _kl(p_C, q_C)
        out["js"] = (_kl(p_C, middle) + _kl(q_C, middle)) / 2
        out["missed"] = max(0.0, 1.0 - float(p_C[: len(shared)].sum()))
    else:
        out["missed"] = None
    out["agree"] = None if a.top1 is None or b.top1 is None else float(a.top1 == b.top1)
    depth = min(OVERLAP, a.ranked, b.ranked)
    both = set(a.ids[:depth].tolist()) & set(b.ids[:depth].tolist())
    out["overlap"] = len(both) / depth if depth else None
    return out


class ComparedSample:
    """One sample of two stores.

    Attributes:
        one, other: the sample in each.
        rows: what `compare_position` tells of each position that both tell something about, of at
            most `MAX_POSITIONS`; in order.

    Raises: UsageError bad-argument when the stores do not hold the same tokens there; what reading
    raises.
    """

    def __init__(self, a: ViewedStore, b: ViewedStore, sample: int) -> None:
        self.one, self.other = _pair(a, b, sample)
        self.rows: list[dict[str, Any]] = []
        glyphs = a.glyphs
        record = self.one.record
        for position in range(min(self.one.positions, MAX_POSITIONS)):
            of_a, of_b = self.one.entries.at(position), self.other.entries.at(position)
            if of_a is None or of_b is None:
                continue
            found = compare_position(of_a, of_b, a.header.vocab_size)
            token = glyphs(int(record["tokens"][position])).text if "tokens" in record else ""
            tops = [None if of.top1 is None else glyphs(of.top1).text for of in (of_a, of_b)]
            self.rows.append(
                {
                    "position": position,
                    **found,
                    "token": token,
                    "a_top": tops[0],
                    "b_top": tops[1],
                }
            )

    def tokens(self, start: int, count: int) -> dict[str, Any]:
        """Text of consecutive positions, with the comparisons as its measures."""
        body = self.one.tokens(start, count)
        row = {row["position"]: row for row in self.rows}
        shown = range(body["from"], body["from"] + body["count"])
        body["measures"] = {
            name: [
                None if p not in row or row[p][name] is None else number(row[p][name])
                for p in shown
            ]
            for name in COMPARISONS
        }
        return body

    def page(self, order: str, measure: str, position: int) -> dict[str, Any]:
        """Everything the page shows except tokens and entries: the positions that disagree most
        first.

        Raises: UsageError bad-argument.
        """
        for name, given, known in (
            ("order", order, (*COMPARISONS, "position")),
            ("measure", measure, tuple(COMPARISONS)),
        ):
            if given and given not in known:
                raise UsageError(
                    "bad-argument", f"no such {name}", where=name, expected=", ".join(known)
                )
        order = order or "kl"
        one, a, b = self.one, self.one.viewed, self.other.viewed
        rows = list(self.rows)
        if order != "position":
            least_first = order in ("overlap", "agree")
            rows.sort(key=lambda row: _sort_key(row[order], least_first))
        exact = bool(rows) and all(row["exact"] for row in rows)
        return {
            "a": a.name,
            "b": b.name,
            "a_signal": str(a.header.signal),
            "b_signal": str(b.header.signal),
            "sample_kind": a.header.sample_kind,
            "sample": one.number,
            "sample_in_b": self.other.number,
            "samples": a.store.num_samples,
            "sample_key": one.key,
            "positions": one.positions,
            "position": min(position, max(one.positions - 1, 0)),
            "mapped": min(one.positions, MAX_POSITIONS),
            "compared": len(rows),
            "order": order,
            "measure": measure or (order if order in COMPARISONS else "kl"),
            "measures": [_measure(name, rows, exact) for name in COMPARISONS],
            "comparisons": [[name, title, what] for name, (title, what) in COMPARISONS.items()],
            "means": _means(rows),
            "exact": exact,
            "rows": [_rounded(row) for row in rows[:MAX_ROWS]],
            "truncated": len(rows) > MAX_ROWS,
            "partial": one.positions > MAX_POSITIONS,
        }


def _measure(name: str, rows: list[dict[str, Any]], exact: bool) -> dict[str, Any]:
    """A comparison as the heat map's script takes a measure."""
    scale, (_, what) = SCALES[name], COMPARISONS[name]
    known = any(row[name] is not None for row in rows)
    source = "unavailable"
    if known:
        source = "lower bound" if name in ("kl", "js") and not exact else "derived"
    how = what if known else f"{what}; these records do not tell it"
    return scale.as_dict(source=source, how=how)


def compare_stores(a: ViewedStore, b: ViewedStore, first: int) -> dict[str, Any]:
    """Means over `MAX_SAMPLES` samples from `first`, those that disagree most first."""
    _comparable(a, b)
    total = min(a.store.num_samples, b.store.num_samples)
    samples: list[dict[str, Any]] = []
    problems = []
    for sample in range(first, min(first + MAX_SAMPLES, total)):
        try:
            found = ComparedSample(a, b, sample).page("kl", "kl", 0)
        except LogitstoreError as error:
            problems.append({"sample": sample, **error.as_dict()})
            continue
        samples.append(
            {k: found[k] for k in ("sample", "sample_key", "compared", "means", "exact")}
        )
    samples.sort(key=lambda row: _sort_key(row["means"]["kl"], False))
    means = {}
    for name in COMPARISONS:
        known = [row for row in samples if row["means"][name] is not None]
        weight = sum(row["compared"] for row in known)
        total_value = sum(row["means"][name] * row["compared"] for row in known)
        means[name] = number(total_value / weight) if weight else None
    end = min(first + MAX_SAMPLES, total)
    return {
        "a_signal": str(a.header.signal),
        "b_signal": str(b.header.signal),
        "a_samples": a.store.num_samples,
        "b_samples": b.store.num_samples,
        "from": first,
        "to": end,
        "next": end if end < total else None,
        "samples": samples,
        "means": means,
        "exact": bool(samples) and all(row["exact"] for row in samples),
        "comparisons": [[name, title, what] for name, (title, what) in COMPARISONS.items()],
        "partial": first > 0 or end < total,
        "problems": problems,
    }


def _pair(a: ViewedStore, b: ViewedStore, sample: int) -> tuple[ViewedSample, ViewedSample]:
    """The sample in both stores: at the same number, with the same tokens."""
    _comparable(a, b)
    one = ViewedSample(a, sample)
    if sample >= b.store.num_samples:
        raise NotFoundError(
            "sample-out-of-range", "the second store has no such sample", got=sample
        )
    other = ViewedSample(b, sample)
    same = one.positions == other.positions and one.key == other.key
    if same and "tokens" in one.record and "tokens" in other.record:
        same = bool((one.record["tokens"] == other.record["tokens"]).all())
    if not same:
        raise UsageError(
            "bad-argument",
            "the two stores hold different samples under this number",
            where=f"sample {sample}",
            got=f"{one.key} and {other.key}",
            expected="captures of one corpus with equal packing",
        )
    return one, other


def _comparable(a: ViewedStore, b: ViewedStore) -> None:
    one, other = a.header.tokenizer, b.header.tokenizer
    prints = [None if t is None else t.fingerprint for t in (one, other)]
    if prints[0] != prints[1] or a.header.vocab_size != b.header.vocab_size:
        raise AlignmentError(
            "tokenizer-mismatch",
            "the two stores do not share a tokenizer",
            got=f"{a.header.vocab_size:,} and {b.header.vocab_size:,} ids",
            expected="equal fingerprints",
        )


def _known(entries: Entries) -> dict[int, float]:
    """id -> probability, of the ids that a record tells exactly."""
    if entries.outside_kind == "undefined":
        return {}
    known = dict(
        zip(
            entries.ids[entries.exact].tolist(),
            entries.values[entries.exact].tolist(),
            strict=True,
        )
    )
    for i, logprob in entries.always.items():
        known.setdefault(i, float(np.exp(logprob)))
    if entries.label is not None and entries.label_logprob is not None:
        known.setdefault(entries.label, float(np.exp(entries.label_logprob)))
    return known


def _with_rest(values: list[float], everything: bool) -> NDArray[np.float64]:
    """Probabilities [C], and what is left as one more outcome; together 1 despite rounding."""
    told = np.array(values)
    total = told.sum()
    rest = 0.0 if everything else max(0.0, 1.0 - total)
    whole = np.append(told, rest)
    return whole / whole.sum() if whole.sum() > 0 else whole


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Sum of p ln(p / q); a floor of 1e-12 under q, since rounding may leave nothing there."""
    used = p > 0
    return max(0.0, float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum()))


def _sort_key(value: float | None, least_first: bool) -> float:
    if value is None:
        return float("inf")
    return value if least_first else -value


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in COMPARISONS:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = number(np.mean(values)) if values else None
    return means


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: number(v) if isinstance(v, float) else v for k, v in row.items()}
