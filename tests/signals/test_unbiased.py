"""E[w] = p, the stated counts and variances: RS-KD and threshold sampling on ordinary and hostile
rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.signals.build import draw, header_of, record_of, repeated

V = 60
DRAWS = 4000


def zipf(vocab: int = V, exponent: float = 1.3) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    z = -exponent * torch.log(torch.arange(1, vocab + 1).float())
    return z[torch.randperm(vocab, generator=g)]


ROWS = {
    "zipf": zipf(),
    "flat": torch.zeros(V),
    "one-hot": torch.nn.functional.one_hot(torch.tensor(11), V).float() * 1e4,
    "ties": torch.arange(V).div(7, rounding_mode="floor").float(),
    "masked": zipf().index_fill(0, torch.arange(20, V), -torch.inf),
    "two": torch.tensor([0.3, -0.8]),
}


def dense_weights(targets) -> torch.Tensor:
    """float64 [N, V], always-ids entered at their exact probability."""
    weights = torch.zeros(targets.num_positions, targets.vocab_size, dtype=torch.float64)
    weights[targets.position_of_entry(), targets.ids] = targets.weights.double()
    if targets.always_ids is not None:
        weights[:, targets.always_ids] = targets.always_logprobs.double().exp()
    return weights


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "signal", ["sampled:12", "sampled:12,power=0.8", "threshold:tau=1/12", "threshold:k=5"]
)
@pytest.mark.parametrize("always", [(), (1, 0)])
def test_weights_are_unbiased(name: str, signal: str, always: tuple[int, ...]) -> None:
    row = ROWS[name]
    vocab = len(row)
    label = int(row.argmax()) if name == "one-hot" else vocab // 2 - 1
    if "k=5" in signal and vocab < 5:
        pytest.skip("k exceeds the vocabulary")
    header = header_of(signal, vocab, always_ids=always)
    targets = draw(header, *repeated(row, DRAWS, label))
    weights = dense_weights(targets)
    p = torch.softmax(row.double(), -1)
    mean = weights.mean(0)
    # E[w^2] <= p * (largest weight) bounds the error of rare ids, whose sample deviation may be 0
    rare = torch.where(p < 0.01, (p * 0.3).sqrt(), 0.0)
    deviation = torch.maximum(weights.std(0), rare)
    error = deviation / DRAWS**0.5
    # float16 log-probs of label and always-ids (and float16 weights) are off by 2^-11 of
    # themselves, and what they are off by moves to the other ids
    rounding = 2**-11 * torch.special.entr(p)
    known = {label, *always}
    slack = 2**-11 * p + rounding + sum(float(rounding[i]) for i in known) * p
    assert torch.all((mean - p).abs() <= 5 * error + slack + 1e-9)
    assert torch.all(weights >= 0)
    if "power" not in signal:
        assert weights.sum(-1) == pytest.approx(np.ones(DRAWS), abs=1e-3)
    ids = targets.ids
    position = targets.position_of_entry()
    pairs = torch.unique(position * vocab + ids)
    assert len(pairs) == len(ids), "an id is stored twice in a position"


@pytest.mark.parametrize("rounds", [2, 12, 50, 150])
def test_unique_ids_follow_the_closed_form(rounds: int) -> None:
    row = zipf(2000, 1.1)
    p = torch.softmax(row.double(), -1)
    record = record_of(header_of(f"sampled:{rounds}", 2000), *repeated(row, 3000, 0), key=3)
    counts = record["counts"].astype(np.int64)
    totals = np.add.reduceat(counts, record.group_offsets("ids")[:-1])
    assert set(totals) == {rounds}
    expected = float((1 - (1 - p) ** rounds).sum())
    assert record["num_ids"].mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("tau", [8, 20, 50])
@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
def test_threshold_variance_and_count_are_the_closed_form(tau: int, exponent: float) -> None:
    vocab, label = 400, 5
    row = zipf(vocab, exponent)
    p = torch.softmax(row.double(), -1)
    rest = p.clone()
    rest[label] = 0
    k = int(np.ceil(float(torch.clamp(rest * tau, max=1).sum()) - 1e-7))
    descending = rest.sort(descending=True).values
    outside = descending.flip(0).cumsum(0).flip(0)
    h = next(i for i in range(k) if descending[i] * (k - i) < outside[i])
    solved = float(outside[h]) / (k - h)
    tail = descending[h:]
    expected = float((tail * (solved - tail)).sum())

    record = record_of(
        header_of(f"threshold:tau=1/{tau}", vocab), *repeated(row, 6000, label), key=1
    )
    assert set(record["num_heads"]) == {h}
    assert set(record["num_tails"]) == {k - h}
    assert solved <= 1 / tau + 1e-12
    targets = draw(header_of(f"threshold:tau=1/{tau}", vocab), *repeated(row, 6000, label), key=1)
    weights = dense_weights(targets)
    tail_ids = rest.argsort(descending=True)[h:]
    measured = float((weights[:, tail_ids] - p[tail_ids]).square().sum(-1).mean())
    assert measured == pytest.approx(expected, rel=0.05)
    # rounding of head log-probs to 1/64 nat adds almost nothing, and no bias
    assert float((weights - p).square().sum(-1).mean()) <= 1.06 * expected + 1e-6
    assert torch.all(targets.head_mask().view(-1) | (targets.weights > 0))


@pytest.mark.parametrize("rounds", [10, 40])
def test_threshold_at_one_over_n_varies_no_more_than_rskd_on_any_id(rounds: int) -> None:
    vocab, label = 300, 2
    row = zipf(vocab, 1.1)
    p = torch.softmax(row.double(), -1)
    targets = draw(header_of(f"threshold:tau=1/{rounds}", vocab), *repeated(row, 8000, label))
    variance = dense_weights(targets).var(0)
    allowed = p * (1 - p) / rounds
    # five standard errors of a variance estimated from n * p * rounds hits, and head rounding
    spread = 5 / (8000 * p * rounds).clamp_min(1).sqrt()
    assert torch.all(variance <= (1 + spread) * allowed + p.square() / 64**2 / 4)


def test_large_vocabulary_loses_no_tail_mass() -> None:
    vocab = 262_144
    row = torch.zeros(vocab)
    row[7] = 9.0
    p = torch.softmax(row.double(), -1)
    for signal in ("sampled:50", "threshold:tau=1/40"):
        targets = draw(header_of(signal, vocab), *repeated(row, 200, 9))
        weights = targets.weights.double()
        hit_rest = weights[(targets.ids != 7) & (targets.ids != 9)].sum() / 200
        expected = float(1 - p[7] - p[9])
        assert float(hit_rest) == pytest.approx(expected, rel=0.02)
        ids = targets.ids[(targets.ids != 7) & (targets.ids != 9)].double()
        # ids of a flat tail are uniform over the whole vocabulary, upper half included
        assert float((ids > vocab / 2).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_a_row_whose_mass_is_all_on_the_label_stores_nothing_else() -> None:
    row = torch.full((V,), -torch.inf)
    row[4] = 0.0
    targets = draw(header_of("threshold:tau=1/20", V), *repeated(row, 3, 4))
    assert targets.ids.tolist() == [4, 4, 4]
    assert targets.weights.tolist() == [1.0, 1.0, 1.0]


def test_the_same_row_draws_differently_under_other_keys_and_seeds_only() -> None:
    row = ROWS["zipf"]
    header = header_of("threshold:tau=1/20", V)
    first = draw(header, *repeated(row, 50, 1), key=5)
    again = draw(header, *repeated(row, 50, 1), key=5)
    other = draw(header, *repeated(row, 50, 1), key=6)
    seeded = draw(header_of("threshold:tau=1/20", V, seed=9), *repeated(row, 50, 1), key=5)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert not torch.equal(first.ids, seeded.ids)


def test_dense_keeps_raw_logits() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    header = header_of("dense:dtype=float32", V, aux=[])
    targets = draw(header, logits, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(targets.logits, logits)
