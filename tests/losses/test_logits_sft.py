"""Logits-based finetuning: both rules' vectors, the printed example, records, edges, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings

from logitstore.losses.logits_sft import logits_sft
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    value_and_gradient,
)


def vector_case(name):
    """Row t predicts token t + 1; the last answer token has no stored row."""
    case = Vectors("lbf.npz", name)
    labels_at_token = case("labels")
    labels = torch.full_like(labels_at_token, -100)
    labels[:, :-1] = labels_at_token[:, 1:]
    stored_ids, stored_logprobs = case("teacher_topk_ids"), case("teacher_topk_logprobs")
    batch, length, vocab = case("student_logits").shape
    k = stored_ids.shape[-1]
    ids = torch.full((batch, length, k), -1)
    logprobs = torch.full((batch, length, k), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        rows = (labels[b] != -100).nonzero()[:-1, 0]
        ids[b, rows] = stored_ids[b, : len(rows)]
        logprobs[b, rows] = stored_logprobs[b, : len(rows)]
    return case, labels, TopKTargets(vocab_size=vocab, ids=ids, logprobs=logprobs), k


def written_target(p, labels, k):
    """[R, V] figure rule: the k largest keep their probability, the label weighs 1."""
    top = p.topk(k, -1).indices
    kept = p * torch.zeros_like(p).scatter_(-1, top, 1.0)
    kept = kept.scatter(-1, labels[:, None], 1.0)
    return kept / kept.sum(-1, keepdim=True)


def written_kl(target, log_q):
    return (torch.xlogy(target, target) - target * log_q).sum(-1)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_vectors(name):
    case, labels, targets, k = vector_case(name)
    student = case("student_logits")
    assert_vector(
        logits_sft,
        student,
        targets,
        case("official_total"),
        case("official_grad_student_logits"),
        labels=labels,
        rule="released",
        k=k,
    )
    for alpha, part in ((0.0, "official_kl"), (1.0, "official_ce")):
        got = logits_sft(student, targets, labels=labels, rule="released", k=k, alpha=alpha)
        assert abs(got - case(part)) <= 1e-10
    assert_vector(
        logits_sft,
        student,
        targets,
        case("enriched_kl"),
        case("enriched_grad_student_logits"),
        labels=labels,
        mask=(targets.ids >= 0).any(-1),
        k=k,
    )


@pytest.mark.parametrize(
    ("stored", "label", "expected"),
    [
        ((0.51, 0.24, 0.13, 0.08, 0.04), 0, (0.67, 0.16, 0.09, 0.05)),
        ((1.00, 0.0, 0.0, 0.0, 0.0), 7, (0.50,)),
        ((0.93, 0.03, 0.02, 0.01, 0.01), 0, (0.94,)),
        ((0.86, 0.05, 0.04, 0.03, 0.01), 0, (0.89,)),
    ],
)
def test_figure_rule_reproduces_the_printed_rows(stored, label, expected):
    """The target is read off the gradient: softmax(student) - target."""
    probs = torch.tensor([stored], dtype=torch.float64)
    targets = TopKTargets(vocab_size=9, ids=torch.arange(5)[None], logprobs=probs.log())
    _, gradient = value_and_gradient(
        logits_sft, torch.zeros(1, 9, dtype=torch.float64), targets, labels=torch.tensor([label])
    )
    target = 1 / 9 - gradient[0]
    for index, share in enumerate(expected):
        assert abs(target[index] - share) <= 0.01
    assert target[label] >= 0.5 - 1e-12
    assert abs(target.sum() - 1) <= 1e-12


@given(seed=seeds)
@settings(max_examples=30)
def test_figure_rule_matches_the_written_target(seed):
    student, teacher = random_logits(seed, 6, 12), random_logits(seed + 1, 6, 12)
    labels = torch.randint(12, (6,), generator=torch.Generator().manual_seed(seed))
    log_q, p = log_softmax64(student), log_softmax64(teacher).exp()
    target = written_target(p, labels, 5)
    assert (target.gather(-1, labels[:, None]) >= 0.5 - 1e-12).all()
    expected = written_kl(target, log_q)
    for targets in (DenseTargets.from_logits(teacher), TopKTargets.from_logits(teacher, 8)):
        got = logits_sft(student, targets, labels=labels, reduction="none")
        assert torch.allclose(got, expected)
    # gamma, a common factor of the candidates, would cancel: so does a constant in log-probs
    # under the released rule.
    stored = TopKTargets.from_logits(teacher, 5)
    scaled = dataclasses.replace(stored, logprobs=stored.logprobs + math.log(0.3))
    options = {"labels": labels, "rule": "released"}
    assert torch.allclose(
        logits_sft(student, stored, **options), logits_sft(student, scaled, **options)
    )


@pytest.mark.parametrize("delta", [0.0, 0.3, 0.9])
def test_progressive_targets(delta):
    student, teacher = random_logits(0, 5, 9), random_logits(1, 5, 9)
    labels = torch.tensor([0, 3, 5, 7, 8])
    stored = TopKTargets.from_logits(teacher, 4)
    target = written_target(log_softmax64(teacher).exp(), labels, 4)

    def written(zs):
        log_q = log_softmax64(zs)
        mixed = delta * target + (1 - delta) * log_q.exp()
        return written_kl(mixed, log_q).mean()

    leaf = student.clone().requires_grad_()
    expected = written(leaf)
    gradient = torch.autograd.grad(expected, leaf)[0]
    got, got_gradient = value_and_gradient(
        logits_sft, student, stored, labels=labels, k=4, delta=delta
    )
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert torch.allclose(got_gradient, gradient, rtol=0, atol=1e-12)


def test_released_rule_written_out():
    student, teacher = random_logits(2, 3, 6, 10), random_logits(3, 3, 6, 10)
    labels = torch.randint(10, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    stored = TopKTargets.from_logits(teacher, 6)
    p = log_softmax64(teacher).exp()
    top = p.topk(5, -1)
    target = torch.zeros_like(p).scatter_(-1, top.indices, top.values)
    target = target / target.sum(-1, keepdim=True)
    kl = written_kl(target, log_softmax64(student))
    ce = -log_softmax64(student).gather(-1, labels[..., None])[..., 0]
    # The first row has no KL; the third sample, of one token, has none at all.
    kl_mean = (kl[0, 2:4].sum() / 2 + kl[1, 1:2].sum() / 1) / 2
    expected = 0.9 * ce[mask].mean() + 0.1 * kl_mean
    options = {"labels": labels, "mask": mask, "rule": "released"}
    assert torch.allclose(logits_sft(student, stored, **options), expected)
    each, count = logits_sft(student, stored, reduction="none", with_count=True, **options)
    assert count == 6
    assert torch.allclose(each.sum() / count, expected)
    assert (each[~mask] == 0).all()
    # Flat rows know their samples from the targets' lengths.
    flat = TopKTargets.from_logits(teacher[:2, :3].reshape(6, 10), 6)
    flat = dataclasses.replace(flat, lengths=torch.tensor([3, 3]))
    options = {"rule": "released", "alpha": 0.0}
    two = logits_sft(student[:2, :3], flat, labels=labels[:2, :3], **options)
    one = logits_sft(
        student[:2, :3].reshape(6, 10), flat, labels=labels[:2, :3].reshape(6), **options
    )
    assert torch.allclose(one, two)


def test_fewer_candidates_and_always_ids():
    student, teacher = random_logits(4, 3, 8), random_logits(5, 3, 8)
    labels = torch.tensor([1, 2, 3])
    p = log_softmax64(teacher).exp()
    three = TopKTargets.from_logits(teacher, 3)
    expected = written_kl(written_target(p, labels, 3), log_softmax64(student)).mean()
    assert torch.allclose(logits_sft(student, three, labels=labels), expected)
    # An always-id that belongs to the five best takes its place.
    order = p.argsort(-1, descending=True)
    fourth = order[0, 3:4]
    with_always = dataclasses.replace(
        TopKTargets.from_logits(teacher[:1], 3),
        always_ids=fourth,
        always_logprobs=p[:1, fourth].log(),
    )
    expected = written_kl(written_target(p[:1], labels[:1], 4), log_softmax64(student[:1])).mean()
    assert torch.allclose(logits_sft(student[:1], with_always, labels=labels[:1]), expected)


def test_threshold_heads_are_candidates():
    teacher = random_logits(6, 2, 9)
    student, labels = random_logits(7, 2, 9), torch.tensor([2, 4])
    p = log_softmax64(teacher).exp()
    order = p.argsort(-1, descending=True)
    heads = 5
    ids = torch.cat([order[:, :heads], order[:, heads : heads + 1]], -1)
    weights = torch.cat(
        [p.gather(-1, order[:, :heads]), 1 - p.gather(-1, order[:, :heads]).sum(-1, True)], -1
    )
    targets = ThresholdTargets(
        vocab_size=9,
        ids=ids.reshape(-1),
        weights=weights.reshape(-1),
        num_ids=torch.tensor([6, 6]),
        num_heads=torch.tensor([5, 5]),
        log_tail=weights[:, -1].log(),
    )
    expected = written_kl(written_target(p, labels, 5), log_softmax64(student)).mean()
    assert torch.allclose(logits_sft(student, targets, labels=labels), expected)


@pytest.mark.parametrize("rule", ["figure", "released"])
def test_gradcheck_shift_and_masked_rows(rule):
    student, teacher = random_logits(8, 2, 4, 7), random_logits(9, 2, 4, 7)
    labels = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()
    targets = TopKTargets.from_logits(teacher, 5)
    options = {"labels": labels, "mask": mask, "rule": rule}
    leaf = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: logits_sft(s, targets, **options), leaf)
    assert torch.autograd.gradcheck(lambda s: logits_sft(s, targets, delta=0.4, **options), leaf)
    expected = value_and_gradient(logits_sft, student, targets, **options)
    moved = value_and_gradient(logits_sft, student + 5, targets, **options)
    assert torch.allclose(moved[0], expected[0])
    assert expected[1].sum(-1).abs().max() <= 1e-12
    for junk in (torch.nan, torch.inf):
        dirty = student.masked_fill(~mask[..., None], junk)
        got = value_and_gradient(logits_sft, dirty, targets, **options)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("rule", ["figure", "released"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_gaps_one_hot_and_half_precision(rule, dtype):
    student = torch.zeros(1, 3, 10)
    student[..., 0] = 1e4
    teacher = torch.full((1, 3, 10), -torch.inf)
    teacher[..., 3] = 0.0
    labels = torch.tensor([[1, 2, 3]])
    for targets in (DenseTargets.from_logits(teacher), TopKTargets.from_logits(teacher, 5)):
        value, gradient = value_and_gradient(
            logits_sft, student.to(dtype), targets, labels=labels, rule=rule
        )
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_refusals():
    student, teacher = random_logits(10, 2, 7), random_logits(11, 2, 7)
    targets = TopKTargets.from_logits(teacher, 5)
    labels = torch.tensor([1, 2])
    with pytest.raises(TargetsError) as caught:
        logits_sft(student, targets)
    assert caught.value.kind == "label-missing"
    with pytest.raises(TargetsError) as caught:
        logits_sft(student, targets, labels=-labels, mask=torch.ones(2))
    assert caught.value.kind == "label-missing"
    with pytest.raises(UsageError, match="rule"):
        logits_sft(student, targets, labels=labels, rule="paper")
    with pytest.raises(UsageError, match="delta"):
        logits_sft(student, targets, labels=labels, delta=1.5)
    with pytest.raises(TargetsError) as caught:
        logits_sft(student, targets, labels=torch.tensor([-100, -100]))
    assert caught.value.kind == "empty-mask"
    one = torch.ones(2, 1, dtype=torch.int64)
    sampled = SampledTargets.from_counts(one, one, rounds=1, vocab_size=7)
    with pytest.raises(TargetsError, match="sampled"):
        logits_sft(student, sampled, labels=labels)
