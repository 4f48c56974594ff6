"""A graph record for the eye: per segment the co-activation of ranks, or nodes and edges.

Letters: k ranks, N nodes of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from logitstore.display.glyphs import Glyphs
from logitstore.record import Record
from logitstore.spec.header import Header

__all__ = ["graph_view"]

# Of each sample, segment and drawing; the page says how many there are.
MAX_SEGMENTS = 8
MAX_RANKS = 24
MAX_NODES = 16
MAX_EDGES = 48
_LEVELS = 8
# The drawing's size and the circle its nodes stand on.
SIZE, RADIUS = 420, 150


def graph_view(
    record: Record, header: Header, glyphs: Callable[[int], Glyphs]
) -> dict[str, Any] | None:
    """What the page draws; None for other signals."""
    signal = header.signal
    if signal.kind != "graph":
        return None
    positions = record["graph_positions"].tolist()
    count = len(positions)
    shown = range(min(count, MAX_SEGMENTS))
    if signal.form == "rank":
        segments = [_ranks(record, s, signal.k) for s in shown]
    else:
        segments = [_nodes(record, s, glyphs) for s in shown]
    for s, segment in zip(shown, segments, strict=True):
        segment.update(segment=s, positions=positions[s])
    return {"form": signal.form, "k": signal.k, "segments": segments, "total": count}


def _ranks(record: Record, segment: int, k: int) -> dict[str, Any]:
    """C [k, k] = sum of v v^T over the segment's positions, and f = C 1."""
    matrix = np.zeros((k, k))
    upper = np.triu_indices(k)
    matrix[upper] = record["coactivation"][segment]
    matrix += np.triu(matrix, 1).T
    part = matrix[:MAX_RANKS, :MAX_RANKS]
    low, high = float(part.min()), float(part.max())
    span = (high - low) or 1.0
    levels = np.minimum((part - low) / span * _LEVELS, _LEVELS - 1).astype(int)
    sums = record["row_sums"][segment].astype(np.float64)
    return {
        "matrix": [[_rounded(v) for v in row] for row in part],
        "levels": levels.tolist(),
        "row_sums": [_rounded(v) for v in sums[:MAX_RANKS]],
        "ranks": k,
    }


def _nodes(record: Record, segment: int, glyphs: Callable[[int], Glyphs]) -> dict[str, Any]:
    """The heaviest nodes on a circle and the strongest edges between any."""
    own = record["node_segments"] == segment
    ids, sums = record["node_ids"][own], record["node_sums"][own].astype(np.float64)
    order = np.argsort(-np.abs(sums), kind="stable")[:MAX_NODES]
    nodes = []
    for slot, index in enumerate(order):
        angle = 2 * math.pi * slot / max(len(order), 1) - math.pi / 2
        nodes.append(
            {
                "id": int(ids[index]),
                "text": glyphs(int(ids[index])).text,
                "sum": _rounded(sums[index]),
                "x": round(SIZE / 2 + RADIUS * math.cos(angle), 1),
                "y": round(SIZE / 2 + RADIUS * math.sin(angle), 1),
                "label_x": round(SIZE / 2 + (RADIUS + 14) * math.cos(angle), 1),
                "label_y": round(SIZE / 2 + (RADIUS + 14) * math.sin(angle) + 4, 1),
                "anchor": "middle"
                if abs(math.cos(angle)) < 0.2
                else ("start" if math.cos(angle) > 0 else "end"),
            }
        )
    place = {node["id"]: node for node in nodes}
    mine = record["edge_segments"] == segment
    pairs, weights = record["edge_ids"][mine], record["edge_weights"][mine].astype(np.float64)
    strongest = np.argsort(-np.abs(weights), kind="stable")[:MAX_EDGES]
    most = float(np.abs(weights).max()) if len(weights) else 1.0
    edges = []
    for index in strongest:
        a, b = (int(i) for i in pairs[index])
        edge: dict[str, Any] = {
            "line": None,
            "a": a,
            "b": b,
            "a_text": glyphs(a).text,
            "b_text": glyphs(b).text,
            "weight": _rounded(weights[index]),
            "width": round(0.5 + 4.5 * abs(float(weights[index])) / (most or 1.0), 2),
        }
        if a != b and a in place and b in place:
            edge["line"] = [place[a]["x"], place[a]["y"], place[b]["x"], place[b]["y"]]
        edges.append(edge)
    return {
        "nodes": nodes,
        "edges": edges,
        "total_nodes": len(ids),
        "total_edges": len(weights),
        "size": SIZE,
    }


def _rounded(value: Any) -> float:
    return float(f"{float(np.nan_to_num(value)):.5g}")
