"""TTM and WTTM: vectors of the released code, tail treatments and their bounds, stable form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import forward_kl, ttm, wttm
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, TopKTargets
from tests.losses import laws
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    sizes,
    value_and_gradient,
)

TREATMENTS = {
    "renorm": "renormalize",
    "uniform_tail": "uniform_estimate",
    "exactU_uniform_tail": "uniform",
    "ghost": "ghost",
}
gammas = st.sampled_from([0.1, 0.3, 0.8, 1.0, 1.5])
temper = st.sampled_from(list(TREATMENTS.values()))


def written_terms(zt, gamma):
    """ph and U of the definition, from probabilities."""
    powers = log_softmax64(zt).exp() ** gamma
    u = powers.sum(-1)
    return powers / u[:, None], u


def kl(ph, log_q):
    return (torch.xlogy(ph, ph) - ph * log_q).sum(-1)


@pytest.mark.parametrize(("case", "gamma"), [("c0", 0.3), ("c1", 0.1), ("edge", 0.01)])
@pytest.mark.parametrize("loss", [ttm, wttm])
def test_dense_vectors(loss, case, gamma):
    v = Vectors(f"{loss.__name__}.npz", case)
    targets = DenseTargets.from_logits(v("teacher_logits"))
    student = v("student_logits")
    assert_vector(loss, student, targets, v("loss"), v("grad"), gamma=gamma)
    assert_vector(loss, student, targets, v("loss"), v("grad"), temperature=1 / gamma)
    if case != "edge":
        each = ttm(student, targets, gamma=gamma, reduction="none")
        torch.testing.assert_close(each, v("kl_per_sample"), rtol=0, atol=1e-10)
        weighted = wttm(student, targets, gamma=gamma, reduction="none")
        torch.testing.assert_close(weighted / each, v("U"), rtol=1e-10, atol=0)
    else:
        # The released pow(softmax) form loses the classes that underflow.
        assert abs(v("loss_official_underflowed") - v("loss")) > 1e-3


@pytest.mark.parametrize("name", TREATMENTS)
@pytest.mark.parametrize(("case", "gamma"), [("c0", 0.3), ("c1", 0.1)])
@pytest.mark.parametrize("loss", [ttm, wttm])
def test_sparse_vectors(loss, case, gamma, name):
    v = Vectors("ttm_sparse.npz", case)
    lse = v("lse")
    targets = TopKTargets(
        vocab_size=v("student_logits").shape[-1],
        ids=v("topk_ids"),
        logprobs=v("topk_logits") - lse[:, None],
        log_tail=v("residual_mass").log(),
        lse=lse,
        # Captured as a rounded decimal: still the same temperature.
        lse_at={round(1 / gamma, 8): v("logU_exact") + gamma * lse},
    )
    prefix = f"{loss.__name__}_{name}"
    assert_vector(
        loss,
        v("student_logits"),
        targets,
        v(f"{prefix}_loss"),
        v(f"{prefix}_grad"),
        gamma=gamma,
        missing=TREATMENTS[name],
    )


@given(seed=seeds, size=sizes, gamma=gammas)
@settings(max_examples=40)
def test_dense_and_whole_list_are_the_definition(seed, size, gamma):
    rows, vocab, _ = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    ph, u = written_terms(zt, gamma)
    expected = kl(ph, log_softmax64(zs))
    dense = DenseTargets.from_logits(zt)
    whole = TopKTargets.from_logits(zt, vocab, temperatures=[1 / gamma])
    options = {"gamma": gamma, "reduction": "none"}
    torch.testing.assert_close(ttm(zs, dense, **options), expected)
    torch.testing.assert_close(wttm(zs, dense, **options), u * expected)
    for missing in TREATMENTS.values():
        torch.testing.assert_close(ttm(zs, whole, missing=missing, **options), expected)
        torch.testing.assert_close(wttm(zs, whole, missing=missing, **options), u * expected)


@given(seed=seeds, size=sizes, gamma=gammas, missing=temper)
@settings(max_examples=100)
def test_gradients_stay_within_their_stated_distance(seed, size, gamma, missing):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    targets = TopKTargets.from_logits(zt, k, temperatures=[1 / gamma])
    options = {"gamma": gamma, "reduction": "sum"}
    full_value, full = value_and_gradient(ttm, zs, DenseTargets.from_logits(zt), **options)
    value, part = value_and_gradient(ttm, zs, targets, missing=missing, **options)
    error = (full - part).abs()
    ph, u = written_terms(zt, gamma)
    mt = 1 - ph.gather(-1, targets.ids).sum(-1)
    if missing == "renormalize":
        torch.testing.assert_close(error.sum(-1), 2 * mt, rtol=1e-9, atol=1e-12)
    elif missing == "uniform_estimate":
        head = (gamma * targets.logprobs).exp().sum(-1)
        r = targets.log_tail.exp()
        estimate = head + (vocab - k) ** (1 - gamma) * r**gamma
        if gamma <= 1:
            assert (estimate >= u * (1 - 1e-12)).all()
            assert (error.sum(-1) <= 2 * (1 - head / estimate) + 1e-12).all()
    else:
        assert (error.sum(-1) <= 2 * mt + 1e-12).all()
        assert error.gather(-1, targets.ids).max() < 1e-12
    if missing == "ghost":
        assert value <= full_value + 1e-12

    # WTTM: every error is multiplied by U.
    _, full = value_and_gradient(wttm, zs, DenseTargets.from_logits(zt), **options)
    _, part = value_and_gradient(wttm, zs, targets, missing=missing, **options)
    if missing in ("uniform", "ghost"):
        torch.testing.assert_close((full - part).abs(), u[:, None] * error, rtol=1e-8, atol=1e-11)


def test_identity_with_tempered_distillation_and_a_renyi_bonus():
    zt, zs = random_logits(1, 5, 20), random_logits(2, 5, 20)
    temperature = 4.0
    ph = log_softmax64(zt, temperature).exp()
    renyi = temperature / (temperature - 1) * (log_softmax64(zs) / temperature).logsumexp(-1)
    entropy = -torch.xlogy(ph, ph).sum(-1)
    softened = kl(ph, log_softmax64(zs, temperature))
    expected = temperature * softened - (temperature - 1) * (renyi - entropy)
    got = ttm(zs, DenseTargets.from_logits(zt), temperature=temperature, reduction="none")
    torch.testing.assert_close(got, expected)


def test_gamma_one_is_plain_kl_and_needs_no_extra_scalar():
    zt, zs = random_logits(1, 5, 20), random_logits(2, 5, 20)
    bare = TopKTargets.from_logits(zt, 6)
    torch.testing.assert_close(ttm(zs, bare, gamma=1.0), forward_kl(zs, bare, missing="ghost"))
    torch.testing.assert_close(wttm(zs, bare, gamma=1.0), ttm(zs, bare, gamma=1.0))


def test_default_treatment_follows_gamma():
    zt, zs = random_logits(1, 5, 20), random_logits(2, 5, 20)
    targets = TopKTargets.from_logits(zt, 6, temperatures=[5.0, 1.25])
    for gamma, missing in ((0.2, "uniform"), (0.8, "ghost")):
        assert ttm(zs, targets, gamma=gamma) == ttm(zs, targets, gamma=gamma, missing=missing)


def test_rounded_log_probs_cannot_leave_a_negative_tail():
    # Almost everything is stored and half precision rounds it to more than 1.
    zt = torch.tensor([[9.0, 8.9, 8.7, -9.0, -9.5, -10.0]])
    zs = random_logits(2, 1, 6)
    exact = TopKTargets.from_logits(zt.double(), 3, temperatures=[1.25])
    stored = dataclasses.replace(exact, logprobs=exact.logprobs + 3e-4)
    assert stored.logprobs.exp().sum() > 1
    value, gradient = value_and_gradient(ttm, zs, stored, gamma=0.8)
    assert value.isfinite()
    assert gradient.isfinite().all()
    full = ttm(zs, DenseTargets.from_logits(zt), gamma=0.8)
    assert abs(value - full) < 5e-3


@pytest.mark.parametrize("loss", [ttm, wttm])
@pytest.mark.parametrize("missing", [None, *TREATMENTS.values()])
def test_loss_contract(loss, missing):
    labels = laws.some_labels()
    targets = laws.dense_targets() if missing is None else laws.topk_targets(labels)
    options = {"gamma": 0.3} if missing is None else {"gamma": 0.3, "missing": missing}
    laws.assert_loss_contract(loss, targets, labels, **options)
    laws.assert_flat_is_padded(loss, targets, labels, **options)
    laws.assert_gradient_checks(loss, targets, labels, **options)


def test_invariant_to_renaming_ids_and_to_shifts():
    labels = laws.some_labels()
    laws.assert_permutable(wttm, labels, lambda z, y: DenseTargets.from_logits(z), gamma=0.5)
    laws.assert_permutable(
        wttm,
        labels,
        lambda z, y: TopKTargets.from_logits(z, 5, temperatures=[2.0]),
        gamma=0.5,
    )
    student, teacher = random_logits(3, 4, 9), random_logits(4, 4, 9)
    before = wttm(student, DenseTargets.from_logits(teacher), gamma=0.5)
    after = wttm(student - 50, DenseTargets.from_logits(teacher + 70), gamma=0.5)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("loss", [ttm, wttm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_stay_finite(loss, dtype):
    zs = torch.tensor([[1e4, -1e4, 0.0, 3.0, -2.0]], dtype=dtype)
    zt = torch.tensor([[-1e4, -2e4, 0.0, -torch.inf, -3e4]], dtype=dtype)
    choices = [(DenseTargets.from_logits(zt), None)]
    for k in (1, 2, 5):
        targets = TopKTargets.from_logits(zt, k, temperatures=[2.0])
        choices += [(targets, missing) for missing in TREATMENTS.values()]
    for targets, missing in choices:
        options = {} if missing is None else {"missing": missing}
        value, gradient = value_and_gradient(loss, zs, targets, gamma=0.5, **options)
        assert value.isfinite()
        assert gradient.isfinite().all()
        torch.testing.assert_close(value.double(), torch.tensor(1e4).double())


def test_refusals():
    zs = random_logits(1, 2, 6)
    topk = TopKTargets.from_logits(random_logits(2, 2, 6), 3)
    for options in ({}, {"gamma": 0.5, "temperature": 2.0}, {"gamma": 0.0}, {"temperature": -1.0}):
        with pytest.raises(UsageError) as refusal:
            ttm(zs, topk, **options)
        assert refusal.value.kind == "bad-argument"
    with pytest.raises(TargetsError, match=r"--lse-at 2\.0") as refusal:
        wttm(zs, topk, gamma=0.5)
    assert refusal.value.kind == "aux-missing"
    assert math.isfinite(wttm(zs, topk, gamma=0.5, missing="uniform_estimate"))
    with pytest.raises(TargetsError) as refusal:
        ttm(zs, topk, gamma=0.5, missing="none")
    assert refusal.value.kind == "missing-not-allowed"
    with pytest.raises(TargetsError) as refusal:
        ttm(zs, laws.threshold_targets(laws.some_labels()), gamma=0.5)
    assert refusal.value.kind == "targets-mismatch"


def test_compiles_into_one_graph():
    labels = laws.some_labels()
    laws.assert_compiles(wttm, laws.topk_targets(labels), labels, gamma=0.5)
