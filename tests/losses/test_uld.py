"""ULD: vectors, the sorted formula written out, brackets, slices, masks, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import sequences
from logitstore.losses.uld import uld
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

WEIGHTS = {"case0": (1.0, False), "case1": (1.5, True)}


def rows_of(labels):
    """Rows that predict a counted label, from labels that stand at their own position."""
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def sorted_probs(logits, temperature=1.0):
    return log_softmax64(logits, temperature).exp().sort(-1, descending=True).values


def written(student_PV, teacher_PV, student_temperature=1.0, teacher_temperature=1.0):
    """[P] sum of absolute differences of sorted, zero-padded probabilities."""
    q = sorted_probs(student_PV, student_temperature)
    p = sorted_probs(teacher_PV, teacher_temperature)
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("complete_record", [False, True])
def test_vectors(name, complete_record):
    case = Vectors("uld.npz", name)
    weight, skip = WEIGHTS[name]
    teacher = case("teacher_logits")
    targets = DenseTargets.from_logits(teacher)
    if complete_record:
        targets = TopKTargets.from_logits(teacher, teacher.shape[-1])
    assert_vector(
        lambda s, t, **options: weight * uld(s, t, **options),
        case("student_logits"),
        targets,
        case("distill_loss"),
        case("grad_distill_student_logits"),
        mask=rows_of(case("student_labels")),
        target_mask=rows_of(case("teacher_labels")),
        skip_student_end=skip,
    )


def test_slices_vocabularies_and_reductions():
    student, teacher = random_logits(0, 3, 6, 7), random_logits(1, 3, 8, 10)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 1:5] = mask[1, 0:2] = True
    mask[2, [0, 2, 5]] = True
    target_mask = torch.zeros(3, 8, dtype=torch.bool)
    target_mask[0, 5:8] = target_mask[1, 1:7] = True
    target_mask[2, [1, 4, 6]] = True
    # The longer side is cut; rows in holes are skipped, the others pair up in order.
    pairs = [
        (student[0, 1:4], teacher[0, 5:8]),
        (student[1, 0:2], teacher[1, 1:3]),
        (student[2, [0, 2, 5]], teacher[2, [1, 4, 6]]),
    ]
    expected = torch.stack([written(s, t, 2.0, 0.7).mean() for s, t in pairs])
    options = {
        "mask": mask,
        "target_mask": target_mask,
        "student_temperature": 2.0,
        "teacher_temperature": 0.7,
    }
    targets = DenseTargets.from_logits(teacher)
    assert torch.allclose(uld(student, targets, reduction="none", **options), expected)
    assert torch.allclose(uld(student, targets, **options), expected.mean())
    total, count = uld(student, targets, reduction="sum", with_count=True, **options)
    assert torch.allclose(total, expected.sum())
    assert count == 3
    complete = TopKTargets.from_logits(teacher, 10, temperatures=(0.7,))
    assert torch.allclose(uld(student, complete, reduction="none", **options), expected)


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    data=st.data(),
)
@settings(max_examples=60)
def test_bucket_is_a_lower_bound_within_its_distance(seed, sizes, scale, data):
    student_vocab, vocab = sizes
    k = data.draw(st.integers(1, vocab))
    student = random_logits(seed, 1, 3, student_vocab, scale=scale)
    teacher = random_logits(seed + 1, 1, 3, vocab, scale=scale)
    targets = TopKTargets.from_logits(teacher, k)
    exact = written(student[0], teacher[0])
    q, p = sorted_probs(student[0]), sorted_probs(teacher[0])
    s, r = q[:, k:].sum(-1), p[:, k:].sum(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for row in range(3):
        one = {
            "mask": mask & (torch.arange(3) == row),
            "target_mask": mask & (torch.arange(3) == row),
        }
        bucket = uld(student, targets, **one)
        head = bucket - (s[row] - r[row]).abs()
        assert bucket <= exact[row] + 1e-12
        assert exact[row] <= bucket + 2 * torch.minimum(s[row], r[row]) + 1e-12
        zero = uld(student, targets, missing="zero", **one)
        assert abs(zero - head - s[row]) <= 1e-12


def test_rows_that_store_fewer_ids_keep_the_bound():
    student, teacher = random_logits(2, 1, 2, 9), random_logits(3, 1, 2, 9)
    full = TopKTargets.from_logits(teacher, 4)
    ids, logprobs = full.ids.clone(), full.logprobs.clone()
    ids[0, 1, 2:], logprobs[0, 1, 2:] = -1, -torch.inf
    log_tail = full.log_tail.clone()
    log_tail[0, 1] = full.truncated(2).log_tail[0, 1]
    ragged = dataclasses.replace(full, ids=ids, logprobs=logprobs, log_tail=log_tail)
    mask = torch.tensor([[False, True]])
    options = {"mask": mask, "target_mask": mask}
    expected = uld(student, TopKTargets.from_logits(teacher, 2), **options)
    assert torch.allclose(uld(student, ragged, **options), expected)
    no_tail = dataclasses.replace(ragged, log_tail=None)
    assert torch.allclose(uld(student, no_tail, **options), expected)


def test_temperature_from_a_record_needs_its_normaliser():
    student, teacher = random_logits(4, 1, 3, 8), random_logits(5, 1, 3, 8)
    options = {"teacher_temperature": 2.0, "student_temperature": 2.0}
    stored = TopKTargets.from_logits(teacher, 8, temperatures=(2.0,))
    dense = uld(student, DenseTargets.from_logits(teacher), **options)
    assert torch.allclose(uld(student, stored, **options), dense)
    with pytest.raises(TargetsError, match="--lse-at"):
        uld(student, TopKTargets.from_logits(teacher, 8), **options)


def test_flat_targets_share_the_student_mask():
    student, teacher = random_logits(6, 2, 5, 8), random_logits(7, 2, 5, 8)
    flat = TopKTargets.from_logits(torch.cat([teacher[0, :5], teacher[1, :3]]), 3)
    flat = dataclasses.replace(flat, lengths=torch.tensor([5, 3]))
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    padded = TopKTargets.from_logits(teacher, 3)
    assert torch.allclose(uld(student, flat), uld(student, padded, mask=present))
    labels = torch.where(present, 1, -100)
    labels[0, 0] = -100
    mask = labels != -100
    assert torch.allclose(uld(student, flat, labels=labels), uld(student, padded, mask=mask))


def test_segments_pair_apart():
    student, teacher = random_logits(8, 1, 6, 7), random_logits(9, 1, 7, 9)
    mask = torch.ones(1, 6, dtype=torch.bool)
    target_mask = torch.ones(1, 7, dtype=torch.bool)
    got = uld(
        student,
        DenseTargets.from_logits(teacher),
        mask=mask,
        target_mask=target_mask,
        segment_ids=torch.tensor([[0, 0, 1, 1, 1, 2]]),
        target_segment_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1]]),
        reduction="none",
    )
    expected = [
        written(student[0, 0:2], teacher[0, 0:2]).mean(),
        written(student[0, 2:5], teacher[0, 4:7]).mean(),
    ]
    # Segment 2 has no counterpart.
    assert torch.allclose(got, torch.stack(expected))


@pytest.mark.parametrize("signal", ["dense", "topk"])
def test_masked_rows_do_not_matter(signal):
    student, teacher = random_logits(10, 2, 5, 9), random_logits(11, 2, 5, 9)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()

    def targets(junk):
        if signal == "dense":
            return DenseTargets.from_logits(teacher.masked_fill(~mask[..., None], junk))
        return TopKTargets.from_logits(teacher.masked_fill(~mask[..., None], 0.0), 3)

    expected = value_and_gradient(uld, student, targets(0.0), mask=mask)
    for junk in (torch.nan, torch.inf, 1e30):
        dirty = student.masked_fill(~mask[..., None], junk)
        got = value_and_gradient(uld, dirty, targets(junk), mask=mask)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert (got[1][~mask] == 0).all()


@pytest.mark.parametrize("signal", ["dense", "topk", "topk_zero"])
def test_gradcheck_and_invariances(signal):
    student = random_logits(12, 2, 3, 6).requires_grad_()
    teacher = random_logits(13, 2, 3, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    options = {"mask": mask, "target_mask": mask}
    if signal == "topk_zero":
        options["missing"] = "zero"

    def targets(logits):
        return (
            DenseTargets.from_logits(logits)
            if signal == "dense"
            else TopKTargets.from_logits(logits, 3)
        )

    assert torch.autograd.gradcheck(lambda s: uld(s, targets(teacher), **options), student)
    base = uld(student, targets(teacher), **options)
    g = torch.Generator().manual_seed(1)
    renamed = targets(teacher[..., torch.randperm(8, generator=g)] + 7)
    moved = student[..., torch.randperm(6, generator=g)] - 3
    assert torch.allclose(uld(moved, renamed, **options), base)
    _, gradient = value_and_gradient(uld, student, targets(teacher), **options)
    assert gradient.sum(-1).abs().max() <= 1e-12
    assert uld(teacher, targets(teacher), **options) <= 1e-12 or signal == "topk_zero"


def test_chunks_change_nothing(monkeypatch):
    student, teacher = random_logits(14, 2, 6, 9), random_logits(15, 2, 6, 12)
    mask = torch.ones(2, 6, dtype=torch.bool)
    options = {"mask": mask, "target_mask": mask}
    records = [DenseTargets.from_logits(teacher), TopKTargets.from_logits(teacher, 4)]
    whole = [value_and_gradient(uld, student, t, **options) for t in records]
    monkeypatch.setattr(sequences, "_CHUNK_ELEMENTS", 40)
    for targets, (value, gradient) in zip(records, whole, strict=True):
        got, got_gradient = value_and_gradient(uld, student, targets, **options)
        assert torch.allclose(got, value, rtol=0, atol=1e-14)
        assert torch.allclose(got_gradient, gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_gaps_one_hot_and_half_precision(dtype):
    student = torch.zeros(1, 3, 20)
    student[..., 0] = 1e4
    student[0, 1] = -student[0, 1]
    teacher = torch.full((1, 3, 30), -torch.inf)
    teacher[..., 3] = 0.0
    for targets in (DenseTargets.from_logits(teacher), TopKTargets.from_logits(teacher, 4)):
        value, gradient = value_and_gradient(
            uld,
            student.to(dtype),
            targets,
            mask=torch.ones(1, 3, dtype=torch.bool),
            target_mask=torch.ones(1, 3, dtype=torch.bool),
        )
        assert value.dtype == torch.float32
        assert 0 <= value <= 2
        assert torch.isfinite(gradient).all()
    noisy = random_logits(16, 2, 8, 40).to(dtype)
    targets = TopKTargets.from_logits(random_logits(17, 2, 8, 40), 8)
    assert abs(uld(noisy, targets) - uld(noisy.double(), targets)) <= 1e-5


def test_empty_answers():
    student, teacher = random_logits(18, 2, 3, 5), random_logits(19, 2, 3, 5)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    targets = DenseTargets.from_logits(teacher)
    # One token, which is the end token: no pair is left in the first sample.
    value, count = uld(student, targets, mask=mask, skip_student_end=True, with_count=True)
    assert count == 1
    assert torch.allclose(value, written(student[1, :1], teacher[1, :1]).mean())
    none_left = torch.tensor([[1, 0, 0], [1, 0, 0]]).bool()
    value, gradient = value_and_gradient(
        uld, student, targets, mask=none_left, skip_student_end=True, skip_teacher_end=True
    )
    assert value == 0
    assert (gradient == 0).all()
    with pytest.raises(TargetsError) as caught:
        uld(student, targets, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert caught.value.kind == "empty-mask"


def test_refusals():
    student, teacher = random_logits(20, 2, 3, 5), random_logits(21, 2, 4, 5)
    targets = TopKTargets.from_logits(teacher, 2)
    with pytest.raises(TargetsError, match="target_mask") as caught:
        uld(student, targets)
    assert caught.value.kind == "shape-mismatch"
    with pytest.raises(TargetsError, match="padded shape"):
        uld(student, targets, target_mask=torch.ones(2, 3))
    with pytest.raises(TargetsError, match="segment_ids"):
        uld(student, targets, target_mask=torch.ones(2, 4), segment_ids=torch.zeros(2, 4))
    with pytest.raises((TargetsError, UsageError), match="bucket"):
        uld(student, targets, target_mask=torch.ones(2, 4), missing="ghost")
    with pytest.raises(UsageError, match="reduction"):
        uld(student, targets, target_mask=torch.ones(2, 4), reduction="batchmean")
    sampled = SampledTargets.from_counts(
        torch.zeros(2, 3, 1, dtype=torch.int64),
        torch.ones(2, 3, 1, dtype=torch.int64),
        rounds=1,
        vocab_size=5,
    )
    with pytest.raises(TargetsError, match="sampled"):
        uld(student, sampled)
