"""Linkless link prediction: vectors of the released code, pairs written out, language reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import forward_kl, llp_distribution, llp_rank
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ScoresTargets, TopKTargets
from tests.losses import laws
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    value_and_gradient,
)

shapes = st.tuples(st.integers(1, 4), st.integers(2, 9))


def scores(teacher):
    ids = torch.arange(teacher.shape[-1]).expand(teacher.shape)
    return ScoresTargets(vocab_size=teacher.shape[-1], ids=ids, scores=teacher)


def written_rank(t, s, margin):
    """One anchor, pair by pair; also the share of tied pairs."""
    values, ties = [], 0
    for i in range(len(t)):
        for j in range(i + 1, len(t)):
            sign = (t[i] > t[j] + margin).double() - (t[i] < t[j] - margin).double()
            ties += int(sign == 0)
            values.append((margin - sign * (s[i] - s[j])).clamp_min(0))
    return torch.stack(values).mean(), ties / len(values)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_rank_vectors(case):
    v = Vectors("llp_rank.npz", case)
    targets = scores(v("teacher_scores"))
    student = v("student_scores")
    assert_vector(
        llp_rank, student, targets, v("loss"), v("grad_student_scores"), margin=v("margin").item()
    )
    leaf = v("student_presigmoid").requires_grad_()
    llp_rank(leaf.sigmoid(), targets).backward()
    assert (leaf.grad - v("grad_student_presigmoid")).abs().max() < 1e-9
    ties = (v("teacher_sign") == 0).double().mean()
    floor = llp_rank(student, targets) - llp_rank(student, targets, subtract_floor=True)
    torch.testing.assert_close(floor, 0.1 * ties)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_distribution_vectors(case):
    v = Vectors("llp_dist.npz", case)
    targets = scores(v("teacher_scores"))
    assert_vector(
        llp_distribution,
        v("student_scores"),
        targets,
        v("loss"),
        v("grad_student_scores"),
        temperature=v("tau").item(),
    )
    leaf = v("student_presigmoid").requires_grad_()
    llp_distribution(leaf.sigmoid(), targets).backward()
    assert (leaf.grad - v("grad_student_presigmoid")).abs().max() < 1e-9


@given(seed=seeds, shape=shapes, margin=st.sampled_from([0.0, 0.1, 1.5]))
@settings(max_examples=40)
def test_rank_is_the_written_pair_loop(seed, shape, margin):
    t, s = random_logits(seed, *shape), random_logits(seed + 1, *shape)
    written = [written_rank(a, b, margin) for a, b in zip(t, s, strict=True)]
    expected = torch.stack([value for value, _ in written])
    got = llp_rank(s, scores(t), margin=margin, reduction="none")
    torch.testing.assert_close(got, expected)
    floor = margin * torch.tensor([ties for _, ties in written], dtype=torch.float64)
    above = llp_rank(s, scores(t), margin=margin, subtract_floor=True, reduction="none")
    torch.testing.assert_close(above, expected - floor)


@given(seed=seeds, shape=shapes, temperature=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=40)
def test_distribution_is_the_definition(seed, shape, temperature):
    t, s = random_logits(seed, *shape), random_logits(seed + 1, *shape)
    log_p, log_q = log_softmax64(t, temperature), log_softmax64(s, temperature)
    expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    options = {"temperature": temperature}
    got = llp_distribution(s, scores(t), reduction="none", **options)
    torch.testing.assert_close(got, expected)
    _, gradient = value_and_gradient(llp_distribution, s, scores(t), **options)
    torch.testing.assert_close(gradient, temperature * (log_q.exp() - log_p.exp()) / shape[0])


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
@given(seed=seeds, shape=shapes, absent=st.integers(1, 3))
@settings(max_examples=20)
def test_masked_contexts_change_nothing(loss, seed, shape, absent):
    width = shape[1]
    t, s = random_logits(seed, *shape), random_logits(seed + 1, *shape)
    value, gradient = value_and_gradient(loss, s, scores(t))
    targets = ScoresTargets(
        vocab_size=1000,
        ids=torch.nn.functional.pad(torch.arange(width).expand(shape), (0, absent), value=-1),
        scores=torch.nn.functional.pad(t, (0, absent), value=torch.nan),
    )
    wide = torch.nn.functional.pad(s, (0, absent), value=torch.inf)
    got, got_gradient = value_and_gradient(loss, wide, targets)
    torch.testing.assert_close(got, value)
    torch.testing.assert_close(got_gradient[:, :width], gradient)
    assert (got_gradient[:, width:] == 0).all()


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
def test_one_context_none_and_one_anchor(loss):
    one = ScoresTargets(
        vocab_size=9,
        ids=torch.tensor([[3, -1], [-1, -1], [1, 2]]),
        scores=torch.tensor([[0.4, 0.0], [0.0, 0.0], [0.9, 0.1]]),
    )
    student = torch.tensor([[0.1, 9.0], [0.5, -3.0], [0.2, 0.3]])
    value, gradient = value_and_gradient(loss, student, one, reduction="sum")
    alone = loss(student[2:], scores(one.scores[2:]), reduction="sum")
    torch.testing.assert_close(value, alone)
    assert (gradient[:2] == 0).all()


def test_language_reading_of_stored_ids():
    labels = laws.some_labels()
    zs = random_logits(3, laws.B, laws.T, laws.V)
    topk = laws.topk_targets(labels)
    both = {"missing": "renormalize_both"}
    torch.testing.assert_close(llp_distribution(zs, topk), forward_kl(zs, topk, **both))
    # Dense scores at the same ids say the same, with log-probs or logits.
    contexts = ScoresTargets(vocab_size=laws.V, ids=topk.ids, scores=topk.logprobs)
    for loss in (llp_rank, llp_distribution):
        torch.testing.assert_close(loss(zs, topk), loss(zs.gather(-1, topk.ids), contexts))
        torch.testing.assert_close(loss(zs + 30.0, topk), loss(zs, topk))
    head = laws.threshold_targets(labels)
    first = head.num_heads[0].item()
    cut = TopKTargets.from_logits(laws.dense_targets().logits, first)
    for loss in (llp_rank, llp_distribution):
        got = loss(zs, head, reduction="none")[0, 0]
        torch.testing.assert_close(got, loss(zs, cut, reduction="none")[0, 0])


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
@pytest.mark.parametrize("signal", ["scores", "topk", "threshold"])
def test_loss_contract(loss, signal):
    labels = laws.some_labels()
    targets = {
        "scores": laws.scores_targets(),
        "topk": laws.topk_targets(labels),
        "threshold": laws.threshold_targets(labels),
    }[signal]
    laws.assert_loss_contract(loss, targets, labels)
    laws.assert_gradient_checks(loss, targets, labels)
    if signal != "threshold":
        laws.assert_flat_is_padded(loss, targets, labels)


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_stay_finite(loss, dtype):
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    t = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    value, gradient = value_and_gradient(loss, s, scores(t))
    assert value > 5e3
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_refusals():
    t = random_logits(1, 2, 5)
    with pytest.raises(TargetsError) as refusal:
        llp_rank(random_logits(2, 2, 6), scores(t))
    assert refusal.value.kind == "shape-mismatch"
    with pytest.raises(UsageError):
        llp_rank(t, scores(t), margin=-0.1)
    with pytest.raises(UsageError):
        llp_distribution(t, scores(t), temperature=0.0)
    sampled = SampledTargets.from_counts(
        torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.int64), rounds=1, vocab_size=5
    )
    with pytest.raises(TargetsError) as refusal:
        llp_rank(t, sampled)
    assert refusal.value.kind == "targets-mismatch"


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
def test_all_ids_of_dense_targets_are_the_contexts(loss):
    """What a record of K = V gives; an id that cannot occur is no context."""
    student, teacher = random_logits(1, 2, 5), random_logits(2, 2, 5)
    everything = TopKTargets.from_logits(teacher, 5)
    dense, dense_gradient = value_and_gradient(loss, student, DenseTargets.from_logits(teacher))
    value, gradient = value_and_gradient(loss, student, everything)
    torch.testing.assert_close(dense, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(dense_gradient, gradient, rtol=1e-12, atol=1e-15)
    padded = torch.nn.functional.pad(teacher, (0, 2), value=-torch.inf)
    wider = torch.nn.functional.pad(student, (0, 2), value=7.0)
    for targets in (DenseTargets.from_logits(padded), TopKTargets.from_logits(padded, 7)):
        again, gradient = value_and_gradient(loss, wider, targets)
        torch.testing.assert_close(again, dense, rtol=1e-12, atol=0)
        assert (gradient[:, 5:] == 0).all()


@pytest.mark.parametrize("loss", [llp_rank, llp_distribution])
def test_compiles_into_one_graph(loss):
    laws.assert_compiles(loss, laws.scores_targets(), laws.some_labels())
