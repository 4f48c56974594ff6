"""T. stddev and CutMixPick: vectors of the released code, bounds, brackets, selection rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import (
    cutmix_pick,
    cutmix_scores,
    entropy_bracket,
    pool_mean,
    t_stddev,
    t_stddev_bound,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, TopKTargets
from tests.losses import laws
from tests.losses.cases import Vectors, log_softmax64, random_logits, seeds, sizes


def pools_of(v, make):
    """The released grouping: 5 steps a pool, originals and, if present, mixed batches."""
    names = ["teacher_logits_original"]
    if "teacher_logits_mixed" in v._arrays:
        names.append("teacher_logits_mixed")
    steps = v(names[0]).shape[0]
    return [
        [make(v(name)[step]) for step in range(start, start + 5) for name in names]
        for start in range(0, steps, 5)
    ]


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_stddev_vectors(case):
    v = Vectors("tstddev.npz", case)
    pools = pools_of(v, DenseTargets.from_logits)
    means = torch.stack([pool_mean(pool) for pool in pools])
    assert (means - v("pool_mean_prob")).abs().max() < 1e-12
    assert abs(t_stddev(means) - v("t_stddev")) < 1e-12
    assert (means.std(0) - v("per_class_std")).abs().max() < 1e-12
    assert t_stddev(means[:1]).isnan()
    for n, expected in enumerate(v("t_stddev_after_each_pool")[1:], start=2):
        assert abs(t_stddev(means[:n]) - expected) < 1e-12


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("missing", ["zero", "uniform"])
def test_stddev_from_topk_vectors(case, missing):
    v = Vectors("tstddev.npz", case)
    k = int(v("topk_K"))
    pools = pools_of(v, lambda z: TopKTargets.from_logits(z, k))
    means = torch.stack([pool_mean(pool, missing=missing) for pool in pools])
    got = t_stddev(means)
    assert abs(got - v(f"t_stddev_topk_{missing}")) < 1e-12
    residuals = torch.stack([pool_mean(pool, residual=True) for pool in pools])
    bound = t_stddev_bound(residuals, means.shape[-1], missing=missing)
    assert abs(got - v("t_stddev")) <= bound


@given(
    seed=seeds, size=sizes, pools=st.integers(2, 5), missing=st.sampled_from(["zero", "uniform"])
)
@settings(max_examples=60)
def test_topk_error_is_within_both_bounds(seed, size, pools, missing):
    rows, classes, k = size
    logits = random_logits(seed, pools, rows, classes)
    exact = torch.stack([pool_mean([DenseTargets.from_logits(z)]) for z in logits])
    topk = [TopKTargets.from_logits(z, k) for z in logits]
    cut = torch.stack([pool_mean([t], missing=missing) for t in topk])
    error = (t_stddev(cut) - t_stddev(exact)).abs()
    assert error <= (exact - cut).std(0).mean() + 1e-12
    residuals = torch.stack([pool_mean([t], residual=True) for t in topk])
    torch.testing.assert_close(residuals, torch.stack([t.log_tail.exp().mean() for t in topk]))
    assert error <= t_stddev_bound(residuals, classes, missing=missing) + 1e-12


def test_pools_of_other_records():
    logits = random_logits(1, 6, 9)
    exact = pool_mean([DenseTargets.from_logits(logits)])
    whole = TopKTargets.from_logits(logits, 9)
    for missing in ("zero", "uniform"):
        torch.testing.assert_close(pool_mean([whole], missing=missing), exact)
    counts = torch.tensor([[3, 1], [2, 2]])
    sampled = SampledTargets.from_counts(
        torch.tensor([[0, 2], [2, 1]]), counts, rounds=4, vocab_size=4
    )
    expected = torch.tensor([0.375, 0.25, 0.375, 0.0], dtype=torch.float64)
    torch.testing.assert_close(pool_mean([sampled]), expected)
    # A nucleus record pads short rows; each row spreads its own residual.
    ragged = TopKTargets(
        vocab_size=4,
        ids=torch.tensor([[2, 0], [1, -1]]),
        logprobs=torch.tensor([[0.5, 0.3], [0.7, 0.0]]).log(),
        log_tail=torch.tensor([0.2, 0.3]).log(),
    )
    expected = torch.tensor([[0.3, 0.1, 0.5, 0.1], [0.1, 0.7, 0.1, 0.1]]).mean(0).double()
    torch.testing.assert_close(pool_mean([ragged]), expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(UsageError):
        pool_mean([])
    with pytest.raises(UsageError):
        pool_mean([whole], missing="ghost")


@given(seed=seeds, size=sizes, scale=st.sampled_from([0.1, 1.0, 4.0, 30.0]))
@settings(max_examples=80)
def test_entropy_lies_in_the_bracket(seed, size, scale):
    rows, vocab, k = size
    logits = random_logits(seed, rows, vocab, scale=scale)
    p = log_softmax64(logits).exp()
    entropy = -torch.xlogy(p, p).sum(-1)
    lower, upper = entropy_bracket(TopKTargets.from_logits(logits, k))
    assert (lower <= entropy + 1e-12).all()
    assert (entropy <= upper + 1e-12).all()
    lower, upper = entropy_bracket(TopKTargets.from_logits(logits, vocab))
    torch.testing.assert_close(lower, entropy)
    torch.testing.assert_close(upper, entropy)


def test_bracket_is_the_written_one():
    p = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    lower, upper = entropy_bracket(TopKTargets.from_logits(p.log(), 2))
    head = -(0.4 * np.log(0.4) + 0.2 * np.log(0.2))
    assert abs(upper - (head - 0.4 * np.log(0.4 / 5))) < 1e-12
    assert abs(lower - (head - 2 * 0.2 * np.log(0.2))) < 1e-9
    flat = torch.zeros(8, dtype=torch.float64)
    lower, upper = entropy_bracket(TopKTargets.from_logits(flat, 3))
    assert abs(lower - np.log(8)) < 1e-9
    assert abs(upper - np.log(8)) < 1e-9


class Mixed:
    """The released experiment: linear networks on images cut and mixed as the vector file says."""

    def __init__(self, case):
        v = Vectors("cutmixpick.npz", case)
        self.v, images = v, v("images")
        mixed, self.lam = [], []
        for (x1, y1, x2, y2), partner in zip(
            v("bbox_x1y1x2y2").tolist(), v("rand_index"), strict=True
        ):
            mask = torch.ones(images.shape[-2:], dtype=torch.float64)
            mask[y1:y2, x1:x2] = 0
            mixed.append(images * mask + images[partner] * (1 - mask))
            self.lam.append(1 - (x2 - x1) * (y2 - y1) / mask.numel())
        self.images = torch.cat(mixed)
        self.teacher = self.images.flatten(1) @ v("W_teacher")
        self.student = self.images.flatten(1) @ v("W_student")


@pytest.mark.parametrize(
    ("case", "kind"), [("case0", "teacher_entropy"), ("case1", "student_entropy")]
)
def test_pick_vectors(case, kind):
    mixed = Mixed(case)
    v = mixed.v
    torch.testing.assert_close(torch.tensor(mixed.lam).double(), v("lam_adjusted"))
    scores = cutmix_scores(
        kind, teacher=DenseTargets.from_logits(mixed.teacher), student_logits=mixed.student
    )
    assert (scores - v("criterion_values")).abs().max() < 1e-10
    picked = cutmix_pick(scores, v("picked_pool_index").shape[0])
    assert picked.tolist() == v("picked_pool_index").tolist()
    assert (mixed.teacher[picked] - v("picked_teacher_logits")).abs().max() < 1e-10
    assert (mixed.images[picked] - v("picked_images")).abs().max() < 1e-12


def test_stored_entropy_picks_like_dense_logits():
    logits = random_logits(1, 12, 30)
    dense = cutmix_scores("teacher_entropy", teacher=DenseTargets.from_logits(logits))
    stored = cutmix_scores("teacher_entropy", teacher=TopKTargets.from_logits(logits, 4))
    torch.testing.assert_close(stored, dense)
    assert cutmix_pick(stored, 5).tolist() == cutmix_pick(dense, 5).tolist()


def test_other_scores_are_their_definitions():
    zt, zs, plain = (random_logits(seed, 5, 7) for seed in (1, 2, 3))
    teacher, original = DenseTargets.from_logits(zt), DenseTargets.from_logits(plain)
    log_p, log_q = log_softmax64(zt, 4.0), log_softmax64(zs, 4.0)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(cutmix_scores("kld", teacher=teacher, student_logits=zs), expected)
    p, q = log_softmax64(zt).exp(), log_softmax64(plain).exp()
    expected = (p[:, None] - q[None]).square().sum(-1).amin(-1)
    torch.testing.assert_close(
        cutmix_scores("dissimilarity", teacher=teacher, original=original), expected
    )
    one_hot = torch.tensor([[0.0, -1e4, -torch.inf]])
    for kind in ("teacher_entropy", "student_entropy", "kld"):
        score = cutmix_scores(
            kind, teacher=DenseTargets.from_logits(one_hot), student_logits=torch.zeros(1, 3)
        )
        assert score.isfinite().all()


def test_pick_rules():
    scores = torch.tensor([0.5, 0.1, 0.5, 0.9, 0.1])
    assert cutmix_pick(scores, 3).tolist() == [0, 2, 3]  # ties keep their order
    assert cutmix_pick(scores, 2).tolist() == [2, 3]
    assert cutmix_pick(scores, 99).tolist() == [1, 4, 0, 2, 3]
    for bad, n in ((scores, 0), (torch.tensor([0.1, torch.nan]), 1)):
        with pytest.raises(UsageError):
            cutmix_pick(bad, n)
    with pytest.raises(TargetsError):
        cutmix_pick(scores[None], 1)


def test_score_refusals():
    topk = TopKTargets.from_logits(random_logits(1, 4, 6), 2)
    bare = TopKTargets(vocab_size=6, ids=topk.ids, logprobs=topk.logprobs)
    with pytest.raises(TargetsError, match="--aux entropy"):
        cutmix_scores("teacher_entropy", teacher=bare)
    with pytest.raises(TargetsError) as refusal:
        cutmix_scores("kld", teacher=topk, student_logits=random_logits(2, 4, 6))
    assert refusal.value.kind == "targets-mismatch"
    for kind in ("teacher_entropy", "student_entropy", "kld", "dissimilarity", "loudness"):
        with pytest.raises(UsageError):
            cutmix_scores(kind, teacher=laws.dense_targets() if kind == "loudness" else None)
