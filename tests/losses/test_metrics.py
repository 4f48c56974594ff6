"""Metrics: definitions written out, brackets, unbiasedness, sums over batches, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses.metrics import (
    acceptance,
    ece,
    expected_block_tokens,
    perplexity,
    record_kl,
    top1_agreement,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets
from tests.losses.cases import log_softmax64, random_logits, seeds, sizes


def threshold_of(teacher_RV, heads, label_R=None):
    """Exact head (the label last when it is not in it) and the tail's mass on one other id."""
    logp = log_softmax64(teacher_RV)
    order = logp.argsort(-1, descending=True)
    ids, weights, num_heads, log_tail = [], [], [], []
    for row in range(teacher_RV.shape[0]):
        head = order[row, :heads].tolist()
        if label_R is not None and int(label_R[row]) not in head:
            head[-1] = int(label_R[row])
        rest = [i for i in order[row].tolist() if i not in head]
        outside = torch.logsumexp(logp[row, rest], 0)
        ids += [*head, rest[0]]
        weights += [*logp[row, head].exp().tolist(), float(outside.exp())]
        num_heads.append(heads)
        log_tail.append(float(outside))
    return ThresholdTargets(
        vocab_size=teacher_RV.shape[1],
        ids=torch.tensor(ids),
        weights=torch.tensor(weights, dtype=torch.float64),
        num_ids=torch.tensor(num_heads) + 1,
        num_heads=torch.tensor(num_heads),
        log_tail=torch.tensor(log_tail, dtype=torch.float64),
    )


def test_ece_written_out():
    # Confidences 0.5 (2 rows), 0.8 and 1; 10 bins.
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.1, 0.4], [0.1, 0.8, 0.1]], dtype=torch.float64)
    logits = torch.cat([p.log(), torch.tensor([[0.0, -1e4, -1e4]], dtype=torch.float64)])
    labels = torch.tensor([0, 1, 1, 2])
    table = ece(logits, labels, num_bins=10)
    assert table.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 1]
    assert table.correct.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    expected = 2 / 4 * abs(0.5 - 0.5) + 1 / 4 * abs(1 - 0.8) + 1 / 4 * abs(0 - 1)
    assert table.ece == pytest.approx(expected)
    assert table.n == 4
    assert table.accuracy[5] == 0.5
    assert table.confidence[8] == pytest.approx(0.8)
    assert table.edges[[0, 5, 10]].tolist() == [0.0, 0.5, 1.0]


def test_ece_default_bins_masks_and_sums():
    logits = random_logits(0, 4, 30, 8)
    labels = torch.randint(8, (4, 30), generator=torch.Generator().manual_seed(0))
    labels[0, :5] = -100
    mask = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = ece(logits, labels, mask)
    assert whole.count.numel() == 15
    keep = mask & (labels >= 0)
    assert whole.n == int(keep.sum())
    probs = log_softmax64(logits[keep]).exp()
    confidence, best = probs.max(-1)
    total = 0.0
    for m in range(15):
        inside = (confidence >= m / 15) & ((confidence < (m + 1) / 15) | (m == 14))
        if inside.any():
            accuracy = (best == labels[keep])[inside].double().mean()
            total += float(inside.double().mean() * (accuracy - confidence[inside].mean()).abs())
    assert whole.ece == pytest.approx(total)
    parts = ece(logits[:1], labels[:1], mask[:1]) + ece(logits[1:], labels[1:], mask[1:])
    assert parts.count.tolist() == whole.count.tolist()
    assert parts.ece == pytest.approx(whole.ece)
    dirty = logits.masked_fill(~keep[..., None], torch.nan)
    assert ece(dirty, labels, mask).ece == whole.ece
    assert ece(logits.bfloat16(), labels, mask).n == whole.n
    with pytest.raises(TargetsError):
        ece(logits, labels, torch.zeros(4, 30))
    with pytest.raises(TargetsError):
        ece(logits, labels[:, :5])
    with pytest.raises(UsageError):
        ece(logits, labels, num_bins=0)


def test_perplexity_from_the_record():
    logits = random_logits(1, 2, 5, 9)
    labels = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()
    nll = -log_softmax64(logits).gather(-1, labels[..., None])[..., 0]
    padded = TopKTargets.from_logits(logits, 2, labels=labels)
    got = perplexity(padded, mask)
    assert got.count == 6
    assert got.nll_sum == pytest.approx(float(nll[mask].sum()))
    assert got.value == pytest.approx(float(nll[mask].mean().exp()))
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    flat = padded.map(lambda t: t[present])
    flat = dataclasses.replace(flat, lengths=torch.tensor([5, 3]))
    assert perplexity(flat, mask) == got
    assert perplexity(flat, mask[present]) == got
    with pytest.raises(TargetsError, match="label_logprob"):
        perplexity(TopKTargets.from_logits(logits, 2), mask)
    with pytest.raises(TargetsError) as caught:
        perplexity(padded, torch.zeros(2, 5))
    assert caught.value.kind == "empty-mask"
    with pytest.raises(TargetsError) as caught:
        perplexity(padded, mask[:, :3])
    assert caught.value.kind == "shape-mismatch"


@given(seed=seeds, sizes=sizes)
@settings(max_examples=40)
def test_acceptance_brackets(seed, sizes):
    rows, vocab, k = sizes
    student, teacher = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    p, q = log_softmax64(teacher).exp(), log_softmax64(student).exp()
    exact = float(torch.minimum(p, q).sum(-1).mean())
    dense = acceptance(student, DenseTargets.from_logits(teacher))
    assert dense.lower == dense.upper == pytest.approx(exact)
    assert dense.count == rows
    ids = p.topk(k).indices
    for targets in (TopKTargets.from_logits(teacher, k), threshold_of(teacher, k)):
        bracket = acceptance(student, targets)
        assert bracket.lower <= exact + 1e-12
        assert exact <= bracket.upper + 1e-12
        s = 1 - q.gather(-1, ids).sum(-1)
        r = 1 - p.gather(-1, ids).sum(-1)
        width = float(torch.minimum(s, r).mean())
        assert bracket.upper - bracket.lower == pytest.approx(width, abs=1e-9)
    complete = acceptance(student, TopKTargets.from_logits(teacher, vocab))
    assert complete.lower == complete.upper == pytest.approx(exact)


def test_block_tokens():
    assert expected_block_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_block_tokens(1.0, 4) == 5
    assert expected_block_tokens(0.0, 4) == 1
    with pytest.raises(UsageError):
        expected_block_tokens(1.1, 4)


def test_top1_agreement():
    student, teacher = random_logits(2, 40, 6), random_logits(3, 40, 6)
    mask = torch.arange(40) % 3 != 0
    same = student.argmax(-1) == teacher.argmax(-1)
    expected = float(same[mask].double().mean())
    for targets in (DenseTargets.from_logits(teacher), TopKTargets.from_logits(teacher, 2)):
        got = top1_agreement(student, targets, mask=mask)
        assert got.value == pytest.approx(expected)
        assert got.count == int(mask.sum())
    # One head id, and it is the label: the best id is only known where it cannot be beaten.
    labels = torch.randint(6, (40,), generator=torch.Generator().manual_seed(3))
    sparse = threshold_of(teacher, 1, labels)
    p = log_softmax64(teacher).exp().gather(-1, labels[:, None])[:, 0]
    known = p >= 0.5
    assert 0 < int(known.sum()) < 40
    got = top1_agreement(student, sparse)
    assert got.count == int(known.sum())
    assert got.value == pytest.approx(float(same[known].double().mean()))
    # Ties go to the lowest id on both sides.
    flat = torch.zeros(1, 5)
    assert top1_agreement(flat, TopKTargets.from_logits(flat, 2)).value == 1


@given(seed=seeds, sizes=sizes)
@settings(max_examples=40)
def test_record_kl_bounds(seed, sizes):
    rows, vocab, k = sizes
    student, teacher = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    logp, logq = log_softmax64(teacher), log_softmax64(student)
    exact = float((logp.exp() * (logp - logq)).sum(-1).mean())
    dense = record_kl(student, DenseTargets.from_logits(teacher))
    assert (dense.kind, dense.count) == ("exact", rows)
    assert dense.value == pytest.approx(exact)
    stored = record_kl(student, TopKTargets.from_logits(teacher, k))
    assert stored.kind == "lower"
    assert stored.value <= exact + 1e-12
    top = logp.topk(k)
    p_s, q_s = top.values.exp(), logq.gather(-1, top.indices).exp()
    r, s = 1 - p_s.sum(-1), 1 - q_s.sum(-1)
    ghost = (p_s * (p_s / q_s).log()).sum(-1) + torch.xlogy(r, r / s)
    if float(r.min()) > 1e-6 and float(s.min()) > 1e-6:
        assert stored.value == pytest.approx(float(ghost.mean()), abs=1e-8)
    complete = record_kl(student, TopKTargets.from_logits(teacher, vocab))
    assert complete.kind == "exact"
    assert complete.value == pytest.approx(exact)


@pytest.mark.parametrize("masked", [False, True])
def test_record_kl_from_samples_is_unbiased_with_entropy(masked):
    student, teacher = random_logits(4, 1, 3, 5, scale=1.0), random_logits(5, 1, 3, 5, scale=1.0)
    logp, logq = log_softmax64(teacher), log_softmax64(student)
    mask = torch.tensor([[True, True, not masked]])
    exact = float((logp.exp() * (logp - logq)).sum(-1)[mask].mean())
    entropy = -(logp.exp() * logp).sum(-1)
    # Every id once, weighted by its own probability: the expectation over samples itself.
    rounds = 10_000
    counts = (logp.exp() * rounds).round().long()
    ids = torch.arange(5).expand(1, 3, 5)
    many = SampledTargets.from_counts(ids, counts, rounds=rounds, vocab_size=5)
    plain = record_kl(student, many, mask=mask)
    assert plain.kind == "to_sample"
    many = dataclasses.replace(many, entropy=entropy[0])
    got = record_kl(student, many, mask=mask)
    assert (got.kind, got.count) == ("unbiased", int(mask.sum()))
    assert got.value == pytest.approx(exact, abs=1e-3)
    # Over draws the mean is the truth with entropy, and above it without.
    g = torch.Generator().manual_seed(6)
    unbiased, biased = [], []
    for _ in range(400):
        drawn = torch.multinomial(logp[0].exp(), 4, replacement=True, generator=g)
        table = torch.zeros(3, 5, dtype=torch.int64).scatter_add_(-1, drawn, torch.ones_like(drawn))
        few = SampledTargets.from_counts(ids, table[None], rounds=4, vocab_size=5)
        biased.append(record_kl(student, few, mask=mask).value)
        unbiased.append(
            record_kl(student, dataclasses.replace(few, entropy=entropy[0]), mask=mask).value
        )
    spread = torch.tensor(unbiased).std() / 20
    assert abs(sum(unbiased) / 400 - exact) <= 4 * float(spread)
    assert sum(biased) / 400 > exact + 4 * float(spread)


def test_masks_flat_targets_and_refusals():
    student, teacher = random_logits(7, 2, 4, 9), random_logits(8, 2, 4, 9)
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    stored = TopKTargets.from_logits(teacher, 3)
    flat = dataclasses.replace(stored.map(lambda t: t[present]), lengths=torch.tensor([4, 2]))
    dirty = student.masked_fill(~present[..., None], torch.nan)
    for metric in (acceptance, record_kl, top1_agreement):
        assert metric(dirty, flat) == metric(student, stored, mask=present)
        dense = DenseTargets.from_logits(teacher.masked_fill(~present[..., None], torch.nan))
        assert metric(dirty, dense, mask=present).count == 6
        half = metric(student.bfloat16(), stored, mask=present)
        assert half.count == 6
    one = torch.ones(2, 4, 1, dtype=torch.int64)
    sampled = SampledTargets.from_counts(one, one, rounds=1, vocab_size=9)
    for metric in (acceptance, top1_agreement):
        with pytest.raises(TargetsError, match="sampled"):
            metric(student, sampled)
    with pytest.raises(TargetsError, match="--aux log_tail"):
        acceptance(student, dataclasses.replace(stored, log_tail=None))


@given(seed=seeds, k=st.integers(2, 6))
@settings(max_examples=20)
def test_threshold_record_kl(seed, k):
    student, teacher = random_logits(seed, 3, 8), random_logits(seed + 1, 3, 8)
    targets = threshold_of(teacher, k)
    logp, logq = log_softmax64(teacher), log_softmax64(student)
    entropy = -(logp.exp() * logp).sum(-1)
    w = targets.dense()
    got = record_kl(student, dataclasses.replace(targets, entropy=entropy))
    assert got.kind == "unbiased"
    assert got.value == pytest.approx(float((-(w * logq).sum(-1) - entropy).mean()))
