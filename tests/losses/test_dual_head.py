"""Dual-head distillation: vectors, both forms written out, one-sided tail, head and alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import AuxiliaryHead, dual_head, gradient_alignment
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, TopKTargets
from tests.losses import laws
from tests.losses.cases import (
    Vectors,
    assert_vector,
    random_logits,
    seeds,
    sizes,
    value_and_gradient,
)

FORMS = ("norm", "plain")


def written(zt, zs, form, temperature):
    """Binary KL per class as the paper writes it, from probabilities."""
    half = torch.full_like(zt, 0.5)
    a, b = (
        (half, torch.sigmoid((zs - zt) / temperature))
        if form == "norm"
        else (torch.sigmoid(zt / temperature), torch.sigmoid(zs / temperature))
    )
    return temperature**2 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize("form", FORMS)
def test_vectors(case, form):
    v = Vectors("dhkd.npz", case)
    targets = DenseTargets.from_logits(v("teacher_logits"))
    student = v("student_logits")
    assert_vector(dual_head, student, targets, v(f"{form}_loss"), v(f"{form}_grad"), form=form)


def test_differences_beyond_the_released_clamp():
    v = Vectors("dhkd.npz", "edge")
    targets = DenseTargets.from_logits(v("teacher_logits"))
    assert_vector(dual_head, v("student_logits"), targets, v("norm_loss"), v("norm_grad"))
    assert (v("official_clamped_grad")[0, :3] == 0).all()


@given(
    seed=seeds, size=sizes, form=st.sampled_from(FORMS), temperature=st.sampled_from([1.0, 2.0, 5])
)
@settings(max_examples=60)
def test_dense_and_stored_are_the_written_forms(seed, size, form, temperature):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    expected = written(zt, zs, form, temperature)
    options = {"form": form, "temperature": temperature, "reduction": "none"}
    dense = dual_head(zs, DenseTargets.from_logits(zt), **options)
    torch.testing.assert_close(dense, expected.sum(-1))
    whole = TopKTargets.from_logits(zt, vocab)
    for missing in ("none", "one_sided"):
        torch.testing.assert_close(dual_head(zs, whole, missing=missing, **options), dense)
    part = TopKTargets.from_logits(zt, k)
    torch.testing.assert_close(
        dual_head(zs, part, **options), expected.gather(-1, part.ids).sum(-1)
    )


@given(seed=seeds, size=sizes, form=st.sampled_from(FORMS))
@settings(max_examples=60)
def test_one_sided_tail_lies_between_none_and_dense(seed, size, form):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    part = TopKTargets.from_logits(zt, k)
    options = {"form": form, "reduction": "sum"}
    none, none_grad = value_and_gradient(dual_head, zs, part, **options)
    tail, tail_grad = value_and_gradient(dual_head, zs, part, missing="one_sided", **options)
    full, full_grad = value_and_gradient(dual_head, zs, DenseTargets.from_logits(zt), **options)
    assert none <= tail + 1e-12
    assert tail <= full + 1e-12
    assert (tail_grad.abs() <= full_grad.abs() + 1e-12).all()
    assert (tail_grad * full_grad >= -1e-20).all()
    torch.testing.assert_close(none_grad.gather(-1, part.ids), full_grad.gather(-1, part.ids))
    # Nothing outside the stored ids, or a pull only where the student exceeds the last of them.
    outside = torch.ones_like(zs).scatter(-1, part.ids, 0.0).bool()
    assert (none_grad[outside] == 0).all()
    last = zt.gather(-1, part.ids)[:, -1:]
    assert (tail_grad[outside & (zs <= last)] == 0).all()
    # Each omitted class carries at most T / 2.
    assert full_grad.abs().max() <= 2.0


def test_small_differences_are_squares_with_exact_slopes_in_float32():
    zt = torch.zeros(1, 3)
    zs = torch.tensor([[1e-2, -3e-3, 0.0]])
    value, gradient = value_and_gradient(dual_head, zs, DenseTargets.from_logits(zt))
    torch.testing.assert_close(value, zs.square().sum() / 8, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient, zs / 4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signal", ["dense", "topk", "one_sided", "threshold"])
def test_loss_contract(form, signal):
    labels = laws.some_labels()
    targets = {
        "dense": laws.dense_targets(),
        "topk": laws.topk_targets(labels),
        "one_sided": laws.topk_targets(labels),
        "threshold": laws.threshold_targets(labels),
    }[signal]
    options = {"form": form, "missing": "one_sided" if signal == "one_sided" else "none"}
    laws.assert_loss_contract(dual_head, targets, labels, **options)
    laws.assert_gradient_checks(dual_head, targets, labels, **options)
    if signal != "threshold":
        laws.assert_flat_is_padded(dual_head, targets, labels, **options)


def test_threshold_head_is_the_stored_part():
    labels = laws.some_labels()
    targets = laws.threshold_targets(labels)
    zs = random_logits(3, laws.B, laws.T, laws.V)
    zt = laws.dense_targets().logits
    each = written(zt, zs, "norm", 2.0).reshape(-1, laws.V)
    order = zt.reshape(-1, laws.V).argsort(-1, descending=True)
    expected = [each[row, order[row, :h]].sum() for row, h in enumerate(targets.num_heads.tolist())]
    got = dual_head(zs, targets, reduction="none").reshape(-1)
    torch.testing.assert_close(got, torch.stack(expected))


def test_permutable_but_not_shift_invariant():
    labels = laws.some_labels()
    laws.assert_permutable(dual_head, labels, lambda z, y: DenseTargets.from_logits(z))
    laws.assert_permutable(
        dual_head, labels, lambda z, y: TopKTargets.from_logits(z, 4), missing="one_sided"
    )
    zt = random_logits(1, 2, 5)
    targets = DenseTargets.from_logits(zt)
    assert dual_head(zt, targets) == 0
    assert dual_head(zt + 1, targets) > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_stay_finite(form, dtype):
    zs = torch.tensor([[1e4, -1e4, 5e3, -7.0, 2.0]], dtype=dtype)
    zt = torch.tensor([[-1e4, 1e4, 0.0, -torch.inf, 3.0]], dtype=dtype)
    for targets in (DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, 5)):
        value, gradient = value_and_gradient(dual_head, zs, targets, form=form)
        assert value.isfinite()
        assert gradient.isfinite().all()
        # Both far classes pull with slope T/2 or more: nothing is clamped away.
        assert gradient[0, 0] > 0.9
        assert gradient[0, 1] < -0.9
        assert gradient[0, 3] == 0  # an id that cannot occur is not matched


def test_student_with_extra_ids_is_matched_on_the_shared_ones():
    zt, zs = random_logits(1, 3, 8), random_logits(2, 3, 11)
    for targets in (DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, 8)):
        torch.testing.assert_close(
            dual_head(zs, targets), written(zt, zs[:, :8], "norm", 2.0).sum(-1).mean()
        )


def test_refusals():
    zs = random_logits(1, 2, 6)
    topk = TopKTargets.from_logits(random_logits(2, 2, 6), 3)
    bare = TopKTargets(vocab_size=6, ids=topk.ids, logprobs=topk.logprobs)
    with pytest.raises(TargetsError, match="--aux lse"):
        dual_head(zs, bare)
    with pytest.raises(UsageError):
        dual_head(zs, topk, form="cosh")
    with pytest.raises(UsageError):
        dual_head(zs, topk, temperature=0.0)
    with pytest.raises(UsageError):
        dual_head(zs, topk, missing="two_sided")
    labels = laws.some_labels()
    with pytest.raises(TargetsError) as refusal:
        dual_head(
            random_logits(1, laws.B, laws.T, laws.V),
            laws.threshold_targets(labels),
            missing="one_sided",
        )
    assert refusal.value.kind == "missing-not-allowed"


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_auxiliary_head_takes_any_leading_shape(kind):
    torch.manual_seed(0)
    head = AuxiliaryHead(7, 11, kind=kind, hidden_features=13)
    features = torch.randn(2, 3, 7, requires_grad=True)
    logits = head(features)
    assert logits.shape == (2, 3, 11)
    dual_head(logits, DenseTargets.from_logits(torch.randn(2, 3, 11))).backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None for p in head.parameters())
    names = [type(m).__name__ for m in head.layers] if kind == "nonlinear" else []
    assert names in ([], ["Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear"])
    head.eval()
    torch.testing.assert_close(head(features)[1], head(features[1]))
    with pytest.raises(UsageError):
        AuxiliaryHead(7, 11, kind="deep")


def test_alignment_reproduces_the_vector():
    v = Vectors("dhkd.npz", "ga0")
    # Two parameters, so that the projection must run over both together.
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 2)]
    losses = [
        sum((p * g).sum() for p, g in zip(parameters, v(name).split([4, 2]), strict=True))
        for name in ("grad_ce", "grad_kd")
    ]
    cosine = gradient_alignment(*losses, parameters)
    merged = torch.cat([p.grad for p in parameters])
    assert (merged - v("merged")).abs().max() < 1e-12
    g0, g1 = v("grad_ce"), v("grad_kd")
    torch.testing.assert_close(cosine.double(), g0 @ g1 / g0.norm() / g1.norm())
    assert cosine < 0


def test_alignment_adds_agreeing_gradients_and_accumulates():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    agree = [(p * torch.tensor(g)).sum() for g in ([1.0, 0.0], [1.0, 3.0])]
    assert gradient_alignment(*agree, [p]) > 0
    torch.testing.assert_close(p.grad, torch.tensor([2.0, 3.0]))
    agree = [(p * torch.tensor(g)).sum() for g in ([1.0, 0.0], [1.0, 3.0])]
    gradient_alignment(*agree, [p])
    torch.testing.assert_close(p.grad, torch.tensor([4.0, 6.0]))


def test_alignment_guards():
    shared, only_kd, frozen, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen.requires_grad_(False)
    parameters = [shared, only_kd, frozen, unused]
    # g0 = 0: nothing conflicts, the distillation gradient is used whole.
    cosine = gradient_alignment(
        (shared * 0.0).sum(), -(shared * only_kd * frozen).sum(), parameters
    )
    assert cosine == 0
    torch.testing.assert_close(shared.grad, -torch.ones(2))
    torch.testing.assert_close(only_kd.grad, -torch.ones(2))
    assert frozen.grad is None
    assert unused.grad is None
    # A parameter only one loss reaches counts as 0 in the other.
    shared.grad = only_kd.grad = None
    gradient_alignment(shared.sum(), -2 * shared.sum() + only_kd.sum(), parameters)
    torch.testing.assert_close(shared.grad, torch.ones(2))  # g1 lost all of its part along g0
    torch.testing.assert_close(only_kd.grad, torch.ones(2))
    with pytest.raises(UsageError):
        gradient_alignment(shared.sum(), shared.sum(), [frozen])


def test_compiles_into_one_graph():
    labels = laws.some_labels()
    laws.assert_compiles(dual_head, laws.topk_targets(labels), labels)
