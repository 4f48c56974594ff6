"""Graph signal: outer products of top-k raw logits, summed over the valid positions of each
segment.

Per position v = the k largest raw logits in descending order. Rank form: one node per rank,
C = sum_t v_t v_t^T, f = C 1. Vocabulary form: one node per id that is in any valid position's top
k, X[t, id] = logit if selected else 0, C = X^T X; stored are every node's row sum and the strongest
edges. Sums run in float64 on the CPU once a chunk's positions are complete; a block only has to
give k numbers per position, so nothing of size [P, V] waits.

Source: arXiv:2505.13893 (InfiGFusion).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitstore.signals.encoder import Completion, Rows, register
from logitstore.signals.selection import exact_topk
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import Header
from logitstore.spec.signals import GRAPH_EDGES_PER_NODE, GraphSpec

__all__ = ["GraphEncoder"]

Columns = dict[str, NDArray[Any]]


@register("graph")
class GraphEncoder:
    """row_sums and co-activation per segment (rank form), or nodes and strongest edges (vocab
    form)."""

    def __init__(self, spec: GraphSpec, header: Header) -> None:
        self._spec = spec
        self.intermediate = {"graph_values": np.dtype("float32"), "graph_ids": np.dtype("uint32")}

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        found = exact_topk(rows.z, self._spec.k)
        # An id that cannot occur has no logit; as a node it would turn every sum into -inf.
        values = found.values.nan_to_num(neginf=0.0)
        return {"graph_values": values, "graph_ids": found.ids}

    def complete(self, columns: Columns, completion: Completion) -> Columns:
        """Replace per-position values by per-segment sums."""
        values = columns.pop("graph_values").astype(np.float64)
        ids = columns.pop("graph_ids").astype(np.int64)
        segment = completion.segment_of_position()
        num_segments = int(segment[-1]) + 1 if len(segment) else 0
        columns["num_segments"] = completion.segments_per_sample()
        valid = completion.mask_P
        columns["graph_positions"] = np.bincount(segment[valid], minlength=num_segments)
        values, ids, segment = values[valid], ids[valid], segment[valid]
        if self._spec.form == "rank":
            columns.update(_rank_form(values, segment, num_segments))
        else:
            first = np.cumsum(columns["num_segments"]) - columns["num_segments"]
            columns.update(_vocab_form(values, ids, segment, first, num_segments, self._spec.k))
        for name in ("row_sums", "coactivation", "node_sums", "edge_weights"):
            _check_range(columns.get(name))
        return columns


def _check_range(sums: NDArray[np.float64] | None) -> None:
    """Sums of products of two logits must fit float32."""
    largest = 0.0 if sums is None or not sums.size else float(np.abs(sums).max())
    if largest > float(np.finfo(np.float32).max):
        raise TeacherError(
            "teacher-nonfinite",
            "a sum of products of raw logits does not fit float32",
            got=largest,
            expected="logits below 1e18 in size",
        )


def _rank_form(
    values_Pk: NDArray[np.float64], segment_P: NDArray[np.int64], num_segments: int
) -> Columns:
    k = values_Pk.shape[1]
    upper = np.triu_indices(k)
    triangle = np.zeros((num_segments, len(upper[0])))
    row_sums = np.zeros((num_segments, k))
    if len(values_Pk):
        starts = np.flatnonzero(np.diff(segment_P, prepend=-1))
        present = segment_P[starts]
        for s, (start, stop) in enumerate(zip(starts, [*starts[1:], len(values_Pk)], strict=True)):
            v = values_Pk[start:stop]
            triangle[present[s]] = (v.T @ v)[upper]
        row_sums[present] = np.add.reduceat(values_Pk * values_Pk.sum(1, keepdims=True), starts)
    return {"coactivation": triangle, "row_sums": row_sums}


def _vocab_form(
    values_Pk: NDArray[np.float64],
    ids_Pk: NDArray[np.int64],
    segment_P: NDArray[np.int64],
    first_segment_S: NDArray[np.int64],
    num_segments: int,
    k: int,
) -> Columns:
    """Nodes with row sums, and the strongest edges by absolute weight, per segment."""
    node_parts: list[tuple[NDArray[Any], ...]] = []
    edge_parts: list[tuple[NDArray[Any], ...]] = []
    bounds = np.searchsorted(segment_P, np.arange(num_segments + 1))  # segments ascend
    for segment in range(num_segments):
        rows = slice(bounds[segment], bounds[segment + 1])
        v, ids = values_Pk[rows], ids_Pk[rows]
        nodes, node_of = np.unique(ids, return_inverse=True)
        node_of = node_of.reshape(ids.shape)
        sums = np.bincount(
            node_of.ravel(), (v * v.sum(1, keepdims=True)).ravel(), minlength=len(nodes)
        )
        a, b = np.triu_indices(k, 1)
        low = np.minimum(node_of[:, a], node_of[:, b]).ravel()
        high = np.maximum(node_of[:, a], node_of[:, b]).ravel()
        pair, pair_of = np.unique(low * max(len(nodes), 1) + high, return_inverse=True)
        weight = np.bincount(pair_of, (v[:, a] * v[:, b]).ravel(), minlength=len(pair))
        keep = np.argsort(-np.abs(weight), kind="stable")[: GRAPH_EDGES_PER_NODE * k]
        inside = (
            segment - first_segment_S[np.searchsorted(first_segment_S, segment, side="right") - 1]
        )
        node_parts.append((nodes, np.full(len(nodes), inside), sums))
        edge = np.stack(
            [nodes[pair[keep] // max(len(nodes), 1)], nodes[pair[keep] % max(len(nodes), 1)]], 1
        )
        edge_parts.append((edge, np.full(len(keep), inside), weight[keep]))
    owner = np.searchsorted(first_segment_S, np.arange(num_segments), side="right") - 1
    samples = len(first_segment_S)
    node_ids, node_segments, node_sums = (np.concatenate(p) for p in zip(*node_parts, strict=True))
    edge_ids, edge_segments, edge_weights = (
        np.concatenate(p) for p in zip(*edge_parts, strict=True)
    )
    return {
        "num_nodes": np.bincount(owner, [len(p[0]) for p in node_parts], minlength=samples),
        "node_ids": node_ids,
        "node_segments": node_segments,
        "node_sums": node_sums,
        "num_edges": np.bincount(owner, [len(p[0]) for p in edge_parts], minlength=samples),
        "edge_ids": edge_ids,
        "edge_segments": edge_segments,
        "edge_weights": edge_weights,
    }
