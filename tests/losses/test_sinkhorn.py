"""SinKD: vectors, the released iteration written out, sparse costs and their bounds, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import sequences
from logitstore.losses.sinkhorn import _cost_to_stored, sinkhorn
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, TopKTargets
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    value_and_gradient,
)


def written(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    """Multiplicative iteration, as released."""
    q = log_softmax64(student, temperature).exp()
    p = log_softmax64(teacher, temperature).exp()
    cost = (q[:, None] - p[None]).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return cost, plan


@pytest.mark.parametrize("name", ["case0", "case1"])
@pytest.mark.parametrize("detach_plan", [False, True])
@pytest.mark.parametrize("complete_record", [False, True])
def test_vectors(name, detach_plan, complete_record):
    case = Vectors("sinkd.npz", name)
    teacher = case("teacher_logits")
    targets = DenseTargets.from_logits(teacher)
    if complete_record:
        targets = TopKTargets.from_logits(teacher, teacher.shape[-1], temperatures=(2.0,))
    assert_vector(
        sinkhorn,
        case("student_logits"),
        targets,
        case("sinkhorn_raw"),
        case("grad_raw_plan_detached" if detach_plan else "grad_raw_student_logits"),
        detach_plan=detach_plan,
    )


def test_sequences_are_not_normalised_over_positions():
    """The released generative scripts are; rows of a sequence are rows like any other here."""
    case = Vectors("sinkd.npz", "quirk3d")
    student, teacher = case("student_logits"), case("teacher_logits")
    got = sinkhorn(student, DenseTargets.from_logits(teacher))
    cost, plan = written(student.flatten(0, 1), teacher.flatten(0, 1))
    assert torch.allclose(got, (cost * plan).sum())
    assert abs(0.0008 * got - case("loss")) > 1e-4


@given(
    seed=seeds,
    rows=st.integers(1, 6),
    vocab=st.integers(2, 12),
    settings_=st.sampled_from([(2.0, 0.1, 20), (1.0, 0.5, 3), (0.5, 0.02, 7)]),
)
@settings(max_examples=30)
def test_matches_the_written_iteration(seed, rows, vocab, settings_):
    temperature, epsilon, iterations = settings_
    student, teacher = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    cost, plan = written(student, teacher, *settings_)
    options = {"temperature": temperature, "epsilon": epsilon, "num_iterations": iterations}
    targets = DenseTargets.from_logits(teacher)
    each, count = sinkhorn(student, targets, reduction="none", with_count=True, **options)
    assert torch.allclose(each, (cost * plan).sum(1), rtol=1e-9)
    assert count == rows
    mean = sinkhorn(student, targets, reduction="mean", **options)
    assert torch.allclose(mean, (cost * plan).sum() / rows)


@given(seed=seeds, rows=st.integers(1, 5), vocab=st.integers(2, 14), data=st.data())
@settings(max_examples=40)
def test_each_cost_is_bounded(seed, rows, vocab, data):
    k = data.draw(st.integers(1, vocab))
    temperature = data.draw(st.sampled_from([1.0, 2.0]))
    student, teacher = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    targets = TopKTargets.from_logits(teacher, k, temperatures=(2.0,))
    exact, _ = written(student, teacher, temperature)
    q = log_softmax64(student, temperature).exp()
    p = log_softmax64(teacher, temperature).exp()
    inside = torch.zeros_like(p).scatter_(-1, targets.ids, 1.0)
    s = q @ (1 - inside).T
    r = (p * (1 - inside)).sum(-1)
    head = ((q[:, None] - p[None]).abs() * inside[None]).sum(-1)
    bucket = _cost_to_stored(student, targets, temperature, "bucket")
    assert torch.allclose(bucket, head + (s - r[None]).abs(), atol=1e-12)
    assert (bucket <= exact + 1e-12).all()
    assert (exact <= bucket + 2 * torch.minimum(s, r[None].expand_as(s)) + 1e-12).all()
    zero = _cost_to_stored(student, targets, temperature, "zero")
    assert torch.allclose(zero, head + s, atol=1e-12)


def test_sparse_value_follows_its_cost_and_chunks_change_nothing(monkeypatch):
    student, teacher = random_logits(0, 7, 20), random_logits(1, 7, 20)
    targets = TopKTargets.from_logits(teacher, 4, temperatures=(2.0,))
    for missing in ("bucket", "zero"):
        cost = _cost_to_stored(student, targets, 2.0, missing)
        plan = (-cost / 0.1).exp()
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        whole = value_and_gradient(sinkhorn, student, targets, missing=missing)
        assert torch.allclose(whole[0], (cost * plan).sum())
        with monkeypatch.context() as patch:
            patch.setattr(sequences, "_CHUNK_ELEMENTS", 60)
            parts = value_and_gradient(sinkhorn, student, targets, missing=missing)
        assert torch.allclose(parts[0], whole[0], rtol=0, atol=1e-13)
        assert torch.allclose(parts[1], whole[1], rtol=0, atol=1e-13)


def test_rows_that_store_fewer_ids():
    student, teacher = random_logits(2, 3, 8), random_logits(3, 3, 8)
    full = TopKTargets.from_logits(teacher, 4, temperatures=(2.0,))
    ids, logprobs = full.ids.clone(), full.logprobs.clone()
    ids[1, 2:], logprobs[1, 2:] = -1, -torch.inf
    ragged = dataclasses.replace(full, ids=ids, logprobs=logprobs)
    got = _cost_to_stored(student, ragged, 2.0, "bucket")
    two = TopKTargets.from_logits(teacher, 2, temperatures=(2.0,))
    assert torch.allclose(got[:, 1], _cost_to_stored(student, two, 2.0, "bucket")[:, 1])
    assert torch.allclose(got[:, 0], _cost_to_stored(student, full, 2.0, "bucket")[:, 0])


def test_one_row_identical_rows_and_permutations():
    student, teacher = random_logits(4, 5, 6), random_logits(5, 5, 6)
    one = sinkhorn(student[:1], DenseTargets.from_logits(teacher[:1]))
    p, q = (log_softmax64(x[0], 2.0).exp() for x in (teacher, student))
    assert torch.allclose(one, (p - q).abs().sum())
    same = sinkhorn(student[:1].expand(4, -1), DenseTargets.from_logits(teacher[:1].expand(4, -1)))
    assert torch.allclose(same, 4 * one)
    targets = DenseTargets.from_logits(teacher)
    base = sinkhorn(student, targets)
    g = torch.Generator().manual_seed(0)
    classes, rows = torch.randperm(6, generator=g), torch.randperm(5, generator=g)
    renamed = sinkhorn(student[:, classes], DenseTargets.from_logits(teacher[:, classes]))
    assert torch.allclose(renamed, base)
    reordered = sinkhorn(student[rows], DenseTargets.from_logits(teacher[rows]))
    assert torch.allclose(reordered, base)
    assert torch.allclose(sinkhorn(student + 9, targets), base)
    # A student vocabulary that extends the teacher's.
    wide = torch.cat([student, torch.full((5, 2), -torch.inf)], -1)
    assert torch.allclose(sinkhorn(wide, targets), base)


@pytest.mark.parametrize("signal", ["dense", "topk"])
def test_gradcheck_and_masked_rows(signal):
    student, teacher = random_logits(6, 2, 4, 6), random_logits(7, 2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()
    targets = (
        DenseTargets.from_logits(teacher)
        if signal == "dense"
        else TopKTargets.from_logits(teacher, 3, temperatures=(2.0,))
    )
    leaf = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, targets, mask=mask), leaf)
    expected = value_and_gradient(sinkhorn, student, targets, mask=mask)
    for junk in (torch.nan, torch.inf):
        dirty = student.masked_fill(~mask[..., None], junk)
        got = value_and_gradient(sinkhorn, dirty, targets, mask=mask)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert torch.allclose(expected[0], sinkhorn(student[mask], targets.map(lambda t: t[mask])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_gaps_one_hot_and_half_precision(dtype):
    student = torch.zeros(3, 10)
    student[:, 0] = 1e4
    teacher = torch.full((3, 10), -torch.inf)
    teacher[:, 3] = 0.0
    for targets in (
        DenseTargets.from_logits(teacher),
        TopKTargets.from_logits(teacher, 2, temperatures=(2.0,)),
    ):
        value, gradient = value_and_gradient(sinkhorn, student.to(dtype), targets)
        assert value.dtype == torch.float32
        assert abs(value - 6) <= 1e-4
        assert torch.isfinite(gradient).all()


def test_refusals():
    student, teacher = random_logits(8, 3, 6), random_logits(9, 3, 6)
    with pytest.raises(TargetsError, match="--lse-at 2"):
        sinkhorn(student, TopKTargets.from_logits(teacher, 3))
    dense = DenseTargets.from_logits(teacher)
    for bad in ({"epsilon": 0.0}, {"temperature": -1.0}, {"num_iterations": 0}):
        with pytest.raises(UsageError):
            sinkhorn(student, dense, **bad)
    with pytest.raises(TargetsError) as caught:
        sinkhorn(student, dense, mask=torch.zeros(3))
    assert caught.value.kind == "empty-mask"
    stored = TopKTargets.from_logits(teacher, 3, temperatures=(2.0,))
    with pytest.raises(TargetsError, match="bucket"):
        sinkhorn(student, stored, missing="ghost")
    one = torch.ones(3, 1, dtype=torch.int64)
    with pytest.raises(TargetsError, match="sampled"):
        sinkhorn(student, SampledTargets.from_counts(one, one, rounds=1, vocab_size=6))
