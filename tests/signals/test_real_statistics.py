"""Statistics on rows of a real language model: a bias of one percent fails these tests.

Letters: R rows, V vocabulary, D draws of a row, G groups of ids.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstore.signals.encoder import Encoder
from tests.signals.build import draw, header_of, record_of

# Rows from confident to uncertain, and the label of each: by rank, so that it is head or tail.
RANKS_OF_LABELS = (0, 1, 5, 60, 1000, 20_000)
# Control tokens (0 to 2), a frequent word, and one that no row expects.
ALWAYS = (0, 2, 260, 48_900)


@pytest.fixture(scope="module")
def rows_RV(real_rows_PV: torch.Tensor) -> torch.Tensor:
    p_PV = torch.softmax(real_rows_PV, -1)
    by_entropy = torch.special.entr(p_PV).sum(-1).argsort()
    count = len(RANKS_OF_LABELS)
    return real_rows_PV[by_entropy[torch.linspace(5, len(by_entropy) - 5, count).long()]]


@pytest.fixture(scope="module")
def labels_R(rows_RV: torch.Tensor) -> torch.Tensor:
    order = rows_RV.argsort(-1, descending=True)
    return order[torch.arange(len(rows_RV)), torch.tensor(RANKS_OF_LABELS)]


def groups_of(p_V: torch.Tensor) -> torch.Tensor:
    """int64 [2, V]: ids by rank (each of the eight largest, then in doubling steps), and ids by
    where their running sum stands, in tenths."""
    rank = torch.empty_like(p_V, dtype=torch.int64)
    rank[p_V.argsort(descending=True)] = torch.arange(len(p_V))
    by_rank = torch.where(rank < 8, rank, 5 + (rank + 1).double().log2().floor().long())
    by_place = (p_V.cumsum(0) / p_V.sum() * 10).floor().clamp(0, 9).long()
    return torch.stack([by_rank, by_place])


def sums(values_V: torch.Tensor, group_V: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int(group_V.max()) + 1, dtype=torch.float64).index_add_(
        0, group_V, values_V.double()
    )


@pytest.mark.parametrize(("always", "power"), [((), ""), (ALWAYS, ""), (ALWAYS, ",power=0.8")])
def test_draws_follow_the_teacher(rows_RV, labels_R, always, power) -> None:
    """Weights of groups of ids against their mass: 120,000 draws of each row."""
    vocab, rounds, repeats = rows_RV.shape[1], 3000, 40
    header = header_of(f"sampled:{rounds}{power}", vocab, always_ids=always)
    scores = []
    for row_V, label in zip(rows_RV, labels_R, strict=True):
        targets = draw(header, row_V.expand(repeats, -1), label.expand(repeats))
        p_V = torch.softmax(row_V.double(), -1)
        rest_V = p_V.index_fill(0, torch.tensor(always, dtype=torch.int64), 0)
        proposal_V = rest_V.pow(0.8 if power else 1)
        proposal_V /= proposal_V.sum()
        # Every draw of an id is worth this much; float16 log-probs of the others move it a little.
        worth_V = torch.where(rest_V > 0, rest_V / proposal_V, 0)
        got_V = torch.zeros(vocab, dtype=torch.float64).index_add_(
            0, targets.ids, targets.weights.double() / repeats
        )
        assert torch.equal(got_V > 0, (got_V > 0) & (rest_V > 0))
        for group_V in groups_of(rest_V):
            mass_G = sums(rest_V, group_V)
            variance_G = sums(proposal_V * worth_V.square(), group_V) - mass_G.square()
            spread_G = (variance_G.clamp_min(0) / (rounds * repeats)).sqrt() + 5e-4 * mass_G
            often_G = sums(proposal_V, group_V) * rounds * repeats > 20
            z_G = (sums(got_V, group_V) - mass_G)[often_G] / spread_G[often_G]
            scores += z_G.tolist()
    z = np.array(scores)
    assert np.abs(z).max() <= 5
    # Small biases everywhere show in the sum where they hide in each.
    assert (z**2).sum() <= len(z) + 5 * np.sqrt(2 * len(z))


def test_unique_ids_follow_the_closed_form(rows_RV, labels_R) -> None:
    vocab, repeats = rows_RV.shape[1], 150
    record = record_of(
        header_of("sampled:50", vocab),
        rows_RV.repeat_interleave(repeats, 0),
        labels_R.repeat_interleave(repeats),
        key=3,
    )
    p_RV = torch.softmax(rows_RV.double(), -1)
    expected = float((1 - (1 - p_RV) ** 50).sum(-1).mean())
    assert record["num_ids"].mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("always", [(), ALWAYS])
def test_threshold_sampling_is_its_closed_form(rows_RV, labels_R, always) -> None:
    vocab, repeats, tau0 = rows_RV.shape[1], 100, 1 / 40
    header = header_of("threshold:tau=1/40", vocab, always_ids=always)
    error = expected_error = 0.0
    for row_V, label in zip(rows_RV, labels_R, strict=True):
        targets = draw(header, row_V.expand(repeats, -1), label.expand(repeats))
        p_V = torch.softmax(row_V.double(), -1)
        known = torch.tensor([*always, int(label)]).unique()
        rest_V = p_V.index_fill(0, known, 0)
        descending = rest_V.sort(descending=True)
        k = int(np.ceil(float((rest_V / tau0).clamp_max(1).sum()) - 1e-6))
        outside = rest_V.sum() - descending.values.cumsum(0) + descending.values
        h = next(h for h in range(k) if descending.values[h] * (k - h) < outside[h])
        tau = float(outside[h]) / (k - h)

        labelled = int(label) not in always
        assert set(targets.num_heads.tolist()) == {h + labelled}
        assert set(targets.num_ids.tolist()) == {k + labelled}
        weights_DV = torch.zeros(repeats, vocab, dtype=torch.float64)
        weights_DV[targets.position_of_entry(), targets.ids] = targets.weights.double()
        assert torch.all(targets.weights > 0)
        total = weights_DV.sum(-1) + p_V[list(always)].sum()
        assert total == pytest.approx(np.ones(repeats), abs=1e-3)

        tail = descending.indices[h:]
        tail = tail[rest_V[tail] > 0]
        included = (weights_DV[:, tail] > 0).double().sum(0) / repeats
        tail_p = rest_V[tail]
        order = tail.argsort()
        # Systematic sampling takes of any run of ids the whole number above or below what is due.
        due = (tail_p[order] / tau).cumsum(0)
        taken = included[order].cumsum(0)
        assert float((taken - due).abs().max()) <= 5 * 0.5 / repeats**0.5
        error += float((weights_DV[:, tail] - tail_p).square().sum())
        expected_error += repeats * float((tail_p * (tau - tail_p)).sum())
        heads = descending.indices[:h]
        if h:
            spread = weights_DV[:, heads].std(0) / repeats**0.5
            off = (weights_DV[:, heads].mean(0) - rest_V[heads]).abs()
            assert torch.all(off <= 5 * spread + 2e-3 * rest_V[heads])
    assert error == pytest.approx(expected_error, rel=0.05)


def test_draws_depend_neither_on_threads_nor_on_how_rows_are_chunked(
    rows_RV, labels_R, monkeypatch
) -> None:
    vocab = rows_RV.shape[1]
    for signal in ("sampled:50", "sampled:50,power=0.8", "threshold:tau=1/40", "topk:64"):
        header = header_of(signal, vocab, aux=["lse", "label_logprob"])
        found = []
        for rows, threads in ((6, 1), (6, 2), (4, 2), (1, 2)):
            monkeypatch.setattr(Encoder, "_CHUNK_BYTES", {"cpu": rows * 4 * vocab})
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found.append(record_of(header, rows_RV, labels_R, key=1))
            finally:
                torch.set_num_threads(before)
        for other in found[1:]:
            for name in header.schema_.columns:
                got, want = other[name.name], found[0][name.name]
                assert got.shape == want.shape
                if np.issubdtype(got.dtype, np.integer):
                    assert np.array_equal(got, want), (signal, name.name)
                else:
                    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=2e-3)
