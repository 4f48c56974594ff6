"""TopKD: vectors, groups written out, what stored ids can and cannot give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from logitstore.losses import top_scaled_logits, topkd
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

# case: K, first and last rank factor, label factor, delta, alpha, beta
CASES = {"c0": (3, 1.5, 2.0, 0.5, 1.0, 1.0), "c1": (10, 1.2, 1.5, 0.1, 2.0, 0.5)}
NO_CONTRAST = {"contrastive_weight": 0.0}


def options_of(case):
    k, first, label_factor, delta, alpha, beta = CASES[case]
    return {
        "k": k,
        "rank_weights": torch.linspace(first, 1, k, dtype=torch.float64),
        "label_factor": label_factor,
        "delta": delta,
        "alpha": alpha,
        "beta": beta,
    }


def written_scaled(t, y, weights, label_factor, delta):
    """z' and D of one row."""
    order = sorted(range(len(t)), key=lambda i: (-t[i].item(), i))
    top, others = order[: len(weights)], order[len(weights) :]
    lift = delta * (t[top].mean() - t[others].mean())
    scaled = t.clone()
    for rank, i in enumerate(top):
        scaled[i] = t[i] * weights[rank] + lift
    if order[0] != y:
        scaled[y] = t[y] * label_factor + lift
    return scaled, lift


def written_cosines(s, scaled, k):
    order = sorted(range(len(s)), key=lambda i: (-scaled[i].item(), i))
    groups = (order[:k], order[len(s) - k :], order[k : len(s) - k])
    return [
        (s[g] @ scaled[g]) / (s[g].norm() * scaled[g].norm()) if g else s.new_zeros(())
        for g in groups
    ]


@pytest.mark.parametrize("case", CASES)
def test_scaling_vectors(case):
    v = Vectors("topkd_tsm_tdl.npz", case)
    options = options_of(case)
    scaled = top_scaled_logits(
        v("teacher_logits"),
        v("labels"),
        **{name: options[name] for name in ("rank_weights", "label_factor", "delta")},
    )
    assert (scaled.logits - v("tsm_logits")).abs().max() < 1e-10
    assert (scaled.delta - v("tsm_delta")).abs().max() < 1e-10
    assert (options["rank_weights"] - v("w_rank")).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_decoupled_vectors(case):
    v = Vectors("topkd_tsm_tdl.npz", case)
    assert_vector(
        topkd,
        v("student_logits"),
        DenseTargets.from_logits(v("teacher_logits")),
        v("tdl_loss"),
        v("tdl_grad"),
        labels=v("labels"),
        **options_of(case),
        **NO_CONTRAST,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("con_normed_on_tsm", {"contrastive_temperature": 0.5}),
        (
            "con_raw_on_teacher",
            {
                "contrastive": "raw",
                "contrastive_teacher": "plain",
                "contrastive_temperature": 20.0,
            },
        ),
    ],
)
def test_contrastive_vectors(case, name, contrast):
    v = Vectors("topkd_tsm_tdl.npz", case)
    assert_vector(
        topkd,
        v("student_logits"),
        DenseTargets.from_logits(v("teacher_logits")),
        v("tdl_loss") + v(f"{name}_loss"),
        v("tdl_grad") + v(f"{name}_grad"),
        labels=v("labels"),
        **options_of(case),
        **contrast,
    )


@given(seed=seeds, size=sizes)
@settings(max_examples=60)
def test_dense_groups_are_the_written_ones(seed, size):
    rows, vocab, k = size
    k = max(1, min(k, vocab // 2))
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    weights = torch.linspace(1.5, 1.0, k, dtype=torch.float64)
    expected = []
    for t, s, y in zip(zt, zs, labels.tolist(), strict=True):
        scaled, _ = written_scaled(t, y, weights, 2.0, 0.5)
        pos, neg, non = written_cosines(s, scaled, k)
        expected.append(1 - (1.25 * pos + 0.75 * neg + non))
    got = topkd(
        zs,
        DenseTargets.from_logits(zt),
        labels=labels,
        k=k,
        alpha=1.25,
        beta=0.75,
        reduction="none",
        **NO_CONTRAST,
    )
    torch.testing.assert_close(got, torch.stack(expected))


@given(seed=seeds, size=sizes)
@settings(max_examples=80)
def test_first_group_is_exact_from_stored_ids(seed, size):
    rows, vocab, stored = size
    stored = max(2, stored)
    k = max(1, min(stored - 1, vocab // 2))
    # Top logits above 0 stay on top when they are scaled up.
    zt, zs = random_logits(seed, rows, vocab) + 20, random_logits(seed + 1, rows, vocab)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    options = {"labels": labels, "k": k, "alpha": 1.25, "reduction": "sum"}
    part = TopKTargets.from_logits(zt, stored, labels=labels)
    value, gradient = value_and_gradient(topkd, zs, part, **options)
    weights = torch.linspace(1.5, 1.0, k, dtype=torch.float64)
    leaf = zs.clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for t, s, y in zip(zt, leaf, labels.tolist(), strict=True):
        scaled, _ = written_scaled(t, y, weights, 2.0, 0.5)
        expected = expected + 1 - 1.25 * written_cosines(s, scaled, k)[0]
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_gradient_of_a_group_is_orthogonal_to_the_student_and_bounded():
    zt, zs = random_logits(1, 4, 12), random_logits(2, 4, 12)
    labels = zt.argmax(-1)
    targets = DenseTargets.from_logits(zt)
    options = {"labels": labels, "k": 3, "reduction": "sum", **NO_CONTRAST}
    _, gradient = value_and_gradient(topkd, zs, targets, **options)
    scaled = top_scaled_logits(
        zt,
        labels,
        rank_weights=torch.linspace(1.5, 1, 3, dtype=torch.float64),
        label_factor=2.0,
        delta=0.5,
    ).logits
    order = scaled.argsort(-1, descending=True)
    for group in (slice(None, 3), slice(3, 9), slice(9, None)):
        g, u = gradient.gather(-1, order[:, group]), zs.gather(-1, order[:, group])
        assert (g * u).sum(-1).abs().max() < 1e-12
        assert (g.norm(dim=-1) <= 1 / u.norm(dim=-1) + 1e-12).all()


def test_perfect_match_and_empty_middle_group():
    zt = random_logits(1, 4, 6)
    labels = zt.argmax(-1)
    options = {"labels": labels, "delta": 0.0, "rank_weights": torch.ones(3), "k": 3}
    # 2 K = V: no middle group, so 1 - alpha - beta.
    value = topkd(zt, DenseTargets.from_logits(zt), alpha=2.0, beta=0.5, **options, **NO_CONTRAST)
    torch.testing.assert_close(value.item(), -1.5)
    options = {"labels": labels, "delta": 0.0, "rank_weights": torch.ones(2), "k": 2}
    value = topkd(zt, DenseTargets.from_logits(zt), alpha=2.0, beta=0.5, **options, **NO_CONTRAST)
    torch.testing.assert_close(value.item(), -2.5)


@pytest.mark.parametrize("signal", ["dense", "topk"])
@pytest.mark.parametrize("contrast", [True, False])
def test_loss_contract(signal, contrast):
    if contrast and signal == "topk":
        return
    labels = laws.some_labels()
    targets = laws.dense_targets() if signal == "dense" else laws.topk_targets(labels)
    options = {"k": 3} if contrast else {"k": 3, **NO_CONTRAST}
    laws.assert_loss_contract(topkd, targets, labels, **options)
    laws.assert_gradient_checks(topkd, targets, labels, **options)
    if not contrast:
        laws.assert_flat_is_padded(topkd, targets, labels, **options)


def test_renaming_ids_changes_nothing_but_a_shift_does():
    labels = laws.some_labels()
    laws.assert_permutable(topkd, labels, lambda z, y: DenseTargets.from_logits(z), k=3)
    laws.assert_permutable(topkd, labels, lambda z, y: TopKTargets.from_logits(z, 5, labels=y), k=3)
    zt, zs = random_logits(1, 4, 9), random_logits(2, 4, 9)
    targets = DenseTargets.from_logits(zt)
    shifted = topkd(zs + 5, targets, labels=labels[0, :4] % 9, k=2)
    assert abs(shifted - topkd(zs, targets, labels=labels[0, :4] % 9, k=2)) > 1e-3


@pytest.mark.parametrize("contrastive", ["normalized", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_and_zero_rows_stay_finite(contrastive, dtype):
    zs = torch.tensor([[1e4, -1e4, 0.0, 2.0, -3.0, 1.0], [0.0] * 6], dtype=dtype)
    zt = torch.tensor([[1e4, -1e4, 5e3, 0.0, 0.0, 0.0], [0.0] * 6], dtype=dtype)
    labels = torch.tensor([1, 5])
    for targets, options in (
        (DenseTargets.from_logits(zt), {"contrastive": contrastive}),
        (TopKTargets.from_logits(zt, 3, labels=labels), {}),
    ):
        value, gradient = value_and_gradient(topkd, zs, targets, labels=labels, k=2, **options)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_refusals():
    zt, zs = random_logits(1, 3, 8), random_logits(2, 3, 8)
    labels = zt.argmin(-1)
    topk = TopKTargets.from_logits(zt, 4, labels=labels)
    dense = DenseTargets.from_logits(zt)
    for targets, options in (
        (dense, {"k": 5}),  # 2 K > V
        (topk.truncated(2), {"k": 3}),
        (dense, {"k": 2, "rank_weights": torch.ones(3)}),
        (topk, {"k": 2, "contrastive_weight": 1.0}),
    ):
        with pytest.raises(UsageError) as refusal:
            topkd(zs, targets, labels=labels, **options)
        assert refusal.value.kind == "bad-argument"
    for name, hint in (
        ("lse", "--aux lse"),
        ("logit_mean", "--aux logit_mean"),
        ("label_logprob", "--aux label_logprob"),
    ):
        without = dataclasses.replace(topk, **{name: None})
        with pytest.raises(TargetsError, match=hint):
            topkd(zs, without, labels=labels, k=2)
    # Where the teacher is right, the label needs nothing more; without delta, nor does the mean.
    bare = dataclasses.replace(topk, label_logprob=None, logit_mean=None)
    topkd(zs, bare, labels=zt.argmax(-1), k=2, delta=0.0)
    with pytest.raises(TargetsError) as refusal:
        topkd(zs, dense)
    assert refusal.value.kind == "label-missing"


def test_compiles_into_one_graph():
    labels = laws.some_labels()
    laws.assert_compiles(topkd, laws.topk_targets(labels), labels, k=3)
