"""Pushing scored candidates: link-prediction contexts of a real graph, and what is refused."""

from __future__ import annotations

import json

import networkx
import numpy as np
import pytest
import torch

import logitstore
from logitstore import losses
from logitstore import store as stores
from logitstore.spec.errors import LogitstoreError, TargetsError, TeacherError, UsageError
from logitstore_cli.main import run

NODES = 34
SLOTS = 12


def karate_contexts() -> dict[int, tuple[list[int], list[float]]]:
    """Anchor -> (candidates within two hops, Adamic-Adar scores): a teacher that reads the graph.

    Anchors have different numbers of candidates, at most SLOTS.
    """
    graph = networkx.karate_club_graph()
    contexts = {}
    for anchor in graph:
        near = sorted(networkx.single_source_shortest_path_length(graph, anchor, cutoff=2))
        candidates = [node for node in near if node != anchor][:SLOTS]
        scored = networkx.adamic_adar_index(graph, [(anchor, node) for node in candidates])
        contexts[anchor] = (candidates, [score for _, _, score in scored])
    return contexts


def open_writer(path, **options):
    return logitstore.writer(
        path,
        signal=f"scores:{SLOTS}",
        vocab_size=NODES,
        sample_kind="classification",
        labelled=False,
        **options,
    )


def push_karate(path, container: str = "zarr") -> dict[int, tuple[list[int], list[float]]]:
    contexts = karate_contexts()
    with open_writer(path, container=container) as w:
        for anchor, (ids, scores) in contexts.items():
            w.add_scores(torch.tensor(ids), torch.tensor(scores), sample_key=f"karate#{anchor}")
    return contexts


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_candidates_come_back_and_empty_slots_are_padding(tmp_path, container):
    contexts = push_karate(tmp_path / "s", container)
    assert len({len(ids) for ids, _ in contexts.values()}) > 1
    assert stores.verify(tmp_path / "s", full=True).ok
    dataset = logitstore.LogitDataset(tmp_path / "s")
    batch = logitstore.collate([dataset[i] for i in range(len(dataset))])
    assert batch.targets.ids.shape == (NODES, SLOTS)
    assert batch.tokens is None
    assert batch.labels.tolist() == [-100] * NODES
    for key, ids, scores in zip(
        batch.sample_keys, batch.targets.ids, batch.targets.scores, strict=True
    ):
        expected_ids, expected_scores = contexts[int(key.partition("#")[2])]
        given = ids >= 0
        assert ids[given].tolist() == expected_ids
        np.testing.assert_allclose(scores[given], np.float32(expected_scores))
        assert scores[~given].eq(0).all()


def test_a_student_without_the_graph_learns_the_teachers_ranks(tmp_path):
    push_karate(tmp_path / "s")
    dataset = logitstore.LogitDataset(tmp_path / "s", shuffle=True)
    torch.manual_seed(0)
    student_ND = torch.nn.Parameter(torch.randn(NODES, 16) * 0.3)
    optimizer = torch.optim.Adam([student_ND], lr=0.05)

    def terms(batch) -> tuple[torch.Tensor, torch.Tensor]:
        anchors_B = torch.tensor([int(k.partition("#")[2]) for k in batch.sample_keys])
        contexts_BCD = student_ND[batch.targets.ids.clamp_min(0)]
        scores_BC = torch.einsum("bd,bcd->bc", student_ND[anchors_B], contexts_BCD)
        rank = losses.llp_rank(scores_BC, batch.targets, subtract_floor=True)
        return rank, losses.llp_distribution(scores_BC, batch.targets)

    whole = logitstore.collate([dataset[i] for i in range(len(dataset))])
    before = [term.item() for term in terms(whole)]
    for _ in range(15):
        for batch in logitstore.loader(dataset, batch_size=17):
            optimizer.zero_grad()
            sum(terms(batch)).backward()
            optimizer.step()
    after = [term.item() for term in terms(whole)]
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.2 * before[1]


def test_inspect_shows_candidates_and_no_empty_slot(tmp_path, capsys):
    contexts = push_karate(tmp_path / "s")
    shortest = min(contexts, key=lambda anchor: len(contexts[anchor][0]))
    words = ["inspect", str(tmp_path / "s"), "--sample", str(shortest)]
    assert run([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["sample"]["rows"][0]
    assert row["id"] is row["label"] is None
    assert {entry["id"] for entry in row["kept"]} == set(contexts[shortest][0])
    assert run(words) == 0
    assert "4294967295" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "kind"),
    [
        (([1, 2], [0.5]), TargetsError, "wrong-length"),
        ((list(range(13)), [0.0] * 13), TargetsError, "wrong-length"),
        (([1, NODES], [0.1, 0.2]), TargetsError, "token-out-of-range"),
        (([1, -1], [0.1, 0.2]), TargetsError, "token-out-of-range"),
        (([1.5], [0.1]), TargetsError, "token-out-of-range"),
        (([1, 2], [0.1, float("nan")]), TeacherError, "teacher-nonfinite"),
    ],
)
def test_a_bad_anchor_is_refused_and_the_writer_goes_on(tmp_path, arguments, error, kind):
    with open_writer(tmp_path / "s") as w:
        with pytest.raises(error) as caught:
            w.add_scores(*arguments)
        assert caught.value.kind == kind
        w.add_scores([5], [1.0])
        w.add_scores([], [])
    assert w.num_samples == 2


def test_scores_and_logits_do_not_mix(tmp_path):
    with open_writer(tmp_path / "s") as w:
        with pytest.raises(UsageError, match="add_scores"):
            w.add(None, torch.zeros(NODES))
        with pytest.raises(UsageError, match="no labels"):
            w.add_scores([1], [0.0], label=1)
    with (
        logitstore.writer(tmp_path / "l", signal="topk:4", vocab_size=NODES) as w,
        pytest.raises(UsageError, match=r"add\(tokens, logits\)"),
    ):
        w.add_scores([1], [0.0])
    with pytest.raises(UsageError, match="anchor"):
        logitstore.writer(tmp_path / "q", signal="scores:4", vocab_size=NODES)


def test_an_answer_choice_has_a_label(tmp_path):
    with logitstore.writer(
        tmp_path / "s", signal="scores:4", vocab_size=4, sample_kind="classification"
    ) as w:
        w.add_scores([0, 1, 2, 3], [0.1, 2.0, -1.0, 0.0], label=1)
        with pytest.raises(LogitstoreError, match="label for every sample"):
            w.add_scores([0], [0.1])
    item = logitstore.LogitDataset(tmp_path / "s")[0]
    assert int(item.labels) == 1
    np.testing.assert_allclose(item.targets.dense().sum(-1), 1, rtol=1e-6)
