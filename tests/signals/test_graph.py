"""Graph records against sums written out, for packed samples and both forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstore.record import Record
from logitstore.record.sequences import labels, loss_mask
from logitstore.signals import Completion, encoder
from logitstore.targets import from_records
from tests.signals.build import header_of

V, K = 40, 4
LENGTHS = [5, 3]
SEGMENTS = [0, 0, 0, 1, 1, 0, 0, 0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, V, generator=torch.Generator().manual_seed(2)) * 3 - 1


def graph_record(form: str, logits: torch.Tensor) -> tuple[Record, object]:
    header = header_of(f"graph:k={K},form={form}", V, sample_kind="sequence", aux=[])
    arrays = {
        "sample_lengths": np.array(LENGTHS, np.uint32),
        "num_sample_key": np.array([1, 1], np.uint16),
        "sample_key": np.frombuffer(b"ab", np.uint8),
        "tokens": np.arange(8, dtype=np.uint16),
        "segment_ids": np.array(SEGMENTS, np.uint16),
    }
    plain = header_of("topk:1", V, sample_kind="sequence", aux=[])
    bare = Record(plain.schema_, arrays)
    label = torch.from_numpy(labels(bare))
    enc = encoder(header)
    columns = enc.encode(
        logits,
        labels_P=torch.where(label < 0, -1, label),
        keys_P=torch.zeros(8, dtype=torch.int64),
        positions_P=torch.arange(8),
    )
    completion = Completion(arrays["sample_lengths"], arrays["segment_ids"], loss_mask(bare))
    columns = enc.complete(columns, completion)
    arrays.update({n: a.astype(header.schema_.column(n).dtype) for n, a in columns.items()})
    return Record(header.schema_, arrays), header


# (sample, segment) -> rows with a label
COUNTED = {0: [0, 1], 1: [3], 2: [5, 6]}


def test_rank_form_is_the_sum_of_outer_products(logits: torch.Tensor) -> None:
    record, header = graph_record("rank", logits)
    targets = from_records([record], header)
    assert targets.num_segments.tolist() == [2, 1]
    assert targets.num_positions.tolist() == [2, 1, 2]
    v = logits.double().sort(descending=True).values[:, :K]
    for group, rows in COUNTED.items():
        expected = sum(torch.outer(v[t], v[t]) for t in rows)
        assert torch.allclose(targets.coactivation[group].double(), expected, rtol=1e-5)
        assert torch.allclose(targets.row_sums[group].double(), expected.sum(1), rtol=1e-5)


def test_vocabulary_form_keeps_row_sums_of_every_node_and_the_strongest_edges(
    logits: torch.Tensor,
) -> None:
    record, header = graph_record("vocab", logits)
    targets = from_records([record], header)
    top = logits.double().topk(K)
    for group, rows in COUNTED.items():
        x = torch.zeros(len(rows), V, dtype=torch.float64)
        x.scatter_(1, top.indices[rows], top.values[rows])
        full = x.T @ x
        nodes = torch.unique(top.indices[rows])
        held = targets.node_ids[group][targets.node_ids[group] >= 0]
        assert torch.equal(held, nodes)
        sums = targets.row_sums[group][: len(nodes)].double()
        assert torch.allclose(sums, full.sum(1)[nodes], rtol=1e-5)
    edges = record["edge_ids"][: K * (K - 1) // 2]
    assert record["num_edges"].sum() <= 3 * 8 * K
    x = torch.zeros(2, V, dtype=torch.float64).scatter_(1, top.indices[:2], top.values[:2])
    full = (x.T @ x).numpy()
    weights = record["edge_weights"][: len(edges)]
    np.testing.assert_allclose(weights, full[edges[:, 0], edges[:, 1]], rtol=1e-5)
    assert np.all(np.abs(weights[:-1]) >= np.abs(weights[1:]) - 1e-4)
