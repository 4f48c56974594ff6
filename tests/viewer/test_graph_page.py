"""What the page of a graph record draws, against sums over the same logits kept whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from logitstore import store
from logitstore_cli.commands.view import OpenedStores
from logitstore_server.viewer import viewer_app
from tests.viewer.viewed import VOCAB, push

K = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for name, signal in (
        ("dense", "dense:dtype=float32"),
        ("rank", f"graph:k={K}"),
        ("vocab", f"graph:k={K},form=vocab"),
    ):
        push(folder / name, signal)
    return folder


@pytest.fixture(scope="module")
def products_VV(folder: Path) -> np.ndarray:
    """Of sample 1: the sum of v v^T over its valid positions, v the K largest logits in place."""
    record = store.open(folder / "dense").sample(1)
    # The last position has no next token.
    logits_TV = record["logits"][:-1].astype(np.float64)
    least = np.sort(logits_TV, -1)[:, -K, None]
    v_TV = np.where(logits_TV >= least, logits_TV, 0.0)
    return v_TV.T @ v_TV


def drawn(folder: Path, name: str) -> dict[str, Any]:
    client = TestClient(viewer_app(OpenedStores((str(folder / name),))))
    (segment,) = client.get(f"/stores/{name}/samples/1.json").json()["graph"]["segments"]
    return segment


def test_ranks_show_the_sums_of_products_of_the_largest_logits(folder: Path) -> None:
    record = store.open(folder / "dense").sample(1)
    v_TK = -np.sort(-record["logits"][:-1].astype(np.float64), -1)[:, :K]
    told = drawn(folder, "rank")
    assert told["positions"] == len(v_TK)
    np.testing.assert_allclose(told["matrix"], v_TK.T @ v_TK, rtol=1e-4)
    np.testing.assert_allclose(told["row_sums"], (v_TK.T @ v_TK).sum(-1), rtol=1e-4)


def test_nodes_and_edges_are_the_heaviest_first(folder: Path, products_VV: np.ndarray) -> None:
    told = drawn(folder, "vocab")
    sums_V = products_VV.sum(-1)
    used = np.flatnonzero(products_VV.any(-1))
    assert told["total_nodes"] == len(used) < VOCAB
    heaviest = sorted(used, key=lambda i: -abs(sums_V[i]))[: len(told["nodes"])]
    assert [node["id"] for node in told["nodes"]] == heaviest
    np.testing.assert_allclose([n["sum"] for n in told["nodes"]], sums_V[heaviest], rtol=1e-4)
    weights = [edge["weight"] for edge in told["edges"]]
    np.testing.assert_allclose(
        weights, [products_VV[edge["a"], edge["b"]] for edge in told["edges"]], rtol=1e-4
    )
    pairs = np.abs(products_VV[np.triu_indices(VOCAB, 1)])
    np.testing.assert_allclose(np.abs(weights), -np.sort(-pairs)[: len(weights)], rtol=1e-4)
