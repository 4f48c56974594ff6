"""Partial-knowledge distillation: vectors, targets written out, weights by autograd, tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import (
    forward_kl,
    instance_weights,
    kd_partial,
    relation_table,
    similarity_table,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, TopKTargets
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

CASES = [("c0", 1.0, 3, 0.5), ("c1", 4.0, 10, 0.9)]


def written_rho(zt, kind, labels, temperature, k):
    """The target distribution of a kind, one row at a time."""
    p = log_softmax64(zt, temperature).exp()
    rows, vocab = p.shape
    rho = p.clone()
    for r in range(rows):
        if kind == "ls":
            rho[r] = 1 / vocab
        elif kind == "pt":
            rho[r] = (1 - p[r, labels[r]]) / (vocab - 1)
            rho[r, labels[r]] = p[r, labels[r]]
        elif kind == "topk":
            top = p[r].argsort(descending=True)[:k]
            rho[r] = (1 - p[r, top].sum()) / max(vocab - k, 1)
            rho[r, top] = p[r, top]
    return rho


def written_loss(zs, rho, labels, kd_weight, temperature):
    soft = -(rho * log_softmax64(zs, temperature)).sum(-1)
    hard = -log_softmax64(zs).gather(-1, labels[:, None])[:, 0]
    return (1 - kd_weight) * hard + kd_weight * temperature**2 * soft


def stored(zt, k, labels, temperature):
    return TopKTargets.from_logits(zt, k, labels=labels, temperatures=[temperature])


@pytest.mark.parametrize(("case", "temperature", "k", "kd_weight"), CASES)
@pytest.mark.parametrize("kind", ["kd", "ls", "pt", "topk"])
def test_vectors(case, temperature, k, kd_weight, kind):
    v = Vectors("kd_partial.npz", case)
    zt, labels = v("teacher_logits"), v("labels")
    options = {
        "labels": labels,
        "kind": kind,
        "kd_weight": kd_weight,
        "temperature": temperature,
    }
    loss, gradient = v(f"{kind}_loss"), v(f"{kind}_grad")
    dense = DenseTargets.from_logits(zt)
    assert_vector(kd_partial, v("student_logits"), dense, loss, gradient, k=k, **options)
    if kind != "kd":
        topk = stored(zt, k, labels, temperature)
        assert_vector(kd_partial, v("student_logits"), topk, loss, gradient, **options)
    torch.testing.assert_close(written_rho(zt, kind, labels, temperature, k), v(f"{kind}_target"))


@pytest.mark.parametrize(
    ("case", "power", "softness", "kd_weight"), [("c0", 0.3, 0.3, 0.5), ("c1", 0.5, 0.2, 0.9)]
)
def test_similarity_vectors(case, power, softness, kd_weight):
    v = Vectors("kd_sim.npz", case)
    table = similarity_table(v("class_weights"), power=power, softness=softness)
    torch.testing.assert_close(table[v("labels")], v("target"), rtol=0, atol=1e-12)
    student = v("student_logits")
    assert_vector(
        kd_partial,
        student,
        DenseTargets.from_logits(torch.zeros_like(student)),
        v("loss"),
        v("grad"),
        labels=v("labels"),
        kind="sim",
        table=table,
        kd_weight=kd_weight,
        temperature=7.0,  # of no effect: "sim" keeps the student at 1
    )


@given(
    seed=seeds,
    size=sizes,
    kind=st.sampled_from(["kd", "ls", "pt", "topk"]),
    temperature=st.sampled_from([1.0, 2.0]),
)
@settings(max_examples=80)
def test_every_record_gives_the_written_loss(seed, size, kind, temperature):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    rho = written_rho(zt, kind, labels, temperature, k)
    student_temperature = 1.0 if kind == "ls" else temperature
    expected = written_loss(zs, rho, labels, 0.7, student_temperature)
    options = {
        "labels": labels,
        "kind": kind,
        "kd_weight": 0.7,
        "temperature": temperature,
        "reduction": "none",
    }
    dense = DenseTargets.from_logits(zt)
    torch.testing.assert_close(kd_partial(zs, dense, k=k, **options), expected)
    if kind == "kd":
        return
    part = stored(zt, k, labels, temperature)
    torch.testing.assert_close(kd_partial(zs, part, **options), expected)
    if kind == "topk":
        more = stored(zt, vocab, labels, temperature)
        torch.testing.assert_close(kd_partial(zs, more, k=k, **options), expected)
        # k = V is full distillation.
        full = kd_partial(zs, dense, **{**options, "kind": "kd"})
        torch.testing.assert_close(kd_partial(zs, more, **options), full)


def test_topk_is_forward_kl_with_a_uniform_tail_and_a_label_term():
    labels = torch.tensor([0, 4, 7])
    zt, zs = random_logits(1, 3, 9), random_logits(2, 3, 9)
    targets = TopKTargets.from_logits(zt, 4)
    _, ours = value_and_gradient(kd_partial, zs, targets, labels=labels, kd_weight=1.0)
    _, theirs = value_and_gradient(forward_kl, zs, targets, missing="uniform")
    torch.testing.assert_close(ours, theirs)


def test_gradient_is_the_published_mix():
    labels = torch.tensor([0, 4, 7])
    zt, zs = random_logits(1, 3, 9), random_logits(2, 3, 9)
    rho = written_rho(zt, "pt", labels, 2.0, None)
    one_hot = torch.nn.functional.one_hot(labels, 9)
    expected = 0.3 * (log_softmax64(zs).exp() - one_hot)
    expected = expected + 0.7 * 2.0 * (log_softmax64(zs, 2.0).exp() - rho)
    _, gradient = value_and_gradient(
        kd_partial,
        zs,
        DenseTargets.from_logits(zt),
        labels=labels,
        kind="pt",
        kd_weight=0.7,
        temperature=2.0,
        reduction="sum",
    )
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", ["kd", "ls", "pt", "topk", "sim", "rel"])
@pytest.mark.parametrize("signal", ["dense", "topk", "threshold"])
def test_loss_contract(kind, signal):
    if kind == "kd" and signal != "dense":
        return
    labels = laws.some_labels()
    targets = {
        "dense": laws.dense_targets(),
        "topk": laws.topk_targets(labels),
        "threshold": laws.threshold_targets(labels),
    }[signal]
    options = {"kind": kind, "temperature": 2.0}
    if kind == "topk" and signal == "dense":
        options["k"] = 4
    if kind in ("sim", "rel"):
        options["table"] = similarity_table(random_logits(4, laws.V, 6))
    laws.assert_loss_contract(kd_partial, targets, labels, **options)
    laws.assert_gradient_checks(kd_partial, targets, labels, **options)
    if signal != "threshold":
        laws.assert_flat_is_padded(kd_partial, targets, labels, **options)


def test_threshold_head_is_topk_of_each_position_s_own_k():
    labels = laws.some_labels()
    targets = laws.threshold_targets(labels)
    zs = random_logits(3, laws.B, laws.T, laws.V)
    zt = laws.dense_targets().logits.reshape(-1, laws.V)
    got = kd_partial(zs, targets, labels=labels, kind="topk", reduction="none").reshape(-1)
    for row, h in enumerate(targets.num_heads.tolist()):
        y = labels.reshape(-1)[[row]]
        rho = written_rho(zt[[row]], "topk", y, 1.0, h)
        expected = written_loss(zs.reshape(-1, laws.V)[[row]], rho, y, 0.5, 1.0)
        torch.testing.assert_close(got[[row]], expected)


def test_sampled_targets_serve_what_needs_the_label_alone():
    labels = laws.some_labels()
    topk = laws.topk_targets(labels)
    sampled = SampledTargets.from_counts(
        topk.ids, torch.ones_like(topk.ids), rounds=5, vocab_size=laws.V
    )
    sampled = dataclasses.replace(sampled, label_logprob=topk.label_logprob.reshape(-1))
    zs = random_logits(3, laws.B, laws.T, laws.V)
    for kind in ("ls", "pt"):
        options = {"labels": labels, "kind": kind}
        torch.testing.assert_close(
            kd_partial(zs, sampled, **options), kd_partial(zs, topk, **options)
        )
    torch.testing.assert_close(
        instance_weights(zs, sampled, labels=labels), instance_weights(zs, topk, labels=labels)
    )


def test_renaming_ids_and_shifts_change_nothing():
    labels = laws.some_labels()
    for kind in ("ls", "pt", "topk"):
        laws.assert_permutable(
            kd_partial, labels, lambda z, y: TopKTargets.from_logits(z, 4, labels=y), kind=kind
        )
        zs, targets = random_logits(3, laws.B, laws.T, laws.V), laws.topk_targets(labels)
        torch.testing.assert_close(
            kd_partial(zs + 60.0, targets, labels=labels, kind=kind),
            kd_partial(zs, targets, labels=labels, kind=kind),
        )


@pytest.mark.parametrize("kind", ["kd", "ls", "pt", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_stay_finite(kind, dtype):
    zs = torch.tensor([[1e4, -1e4, 0.0, 2.0, -3.0]], dtype=dtype)
    zt = torch.tensor([[0.0, -1e4, 1e4, -torch.inf, -2e4]], dtype=dtype)
    label = torch.tensor([1])
    choices = [(DenseTargets.from_logits(zt), {"k": 2})]
    if kind != "kd":
        choices += [(stored(zt, k, label, 2.0), {}) for k in (2, 5)]
    for targets, options in choices:
        for temperature in (1.0, 2.0):
            value, gradient = value_and_gradient(
                kd_partial,
                zs,
                targets,
                labels=label,
                kind=kind,
                temperature=temperature,
                **options,
            )
            assert value.isfinite()
            assert gradient.isfinite().all()
    assert instance_weights(zs, targets, labels=label).isfinite().all()


@pytest.mark.parametrize(("case", "temperature", "k", "kd_weight"), CASES)
def test_instance_weights_vectors(case, temperature, k, kd_weight):
    v = Vectors("kd_partial.npz", case)
    zt, labels = v("teacher_logits"), v("labels")
    for targets in (DenseTargets.from_logits(zt), stored(zt, k, labels, temperature)):
        for squared, name in ((False, "rescale_noT2"), (True, "rescale_T2")):
            weights = instance_weights(
                v("student_logits"),
                targets,
                labels=labels,
                kd_weight=kd_weight,
                temperature=temperature,
                squared=squared,
            )
            assert (weights - v(name)).abs().max() < 1e-10


def test_instance_weights_are_the_ratio_of_gradients_at_the_label():
    labels = torch.tensor([0, 4, 7, 2])
    zt, zs = random_logits(1, 4, 9), random_logits(2, 4, 9)
    dense = DenseTargets.from_logits(zt)
    options = {"labels": labels, "kd_weight": 0.6, "temperature": 3.0}
    _, mixed = value_and_gradient(kd_partial, zs, dense, kind="kd", reduction="sum", **options)
    _, hard = value_and_gradient(
        kd_partial, zs, dense, kind="kd", reduction="sum", **{**options, "kd_weight": 0.0}
    )
    ratio = (mixed / hard).gather(-1, labels[:, None])[:, 0]
    mask = torch.tensor([True, True, False, True])
    weights = instance_weights(zs.requires_grad_(), dense, mask=mask, **options)
    assert not weights.requires_grad
    torch.testing.assert_close(weights[mask], ratio[mask])
    assert weights[2] == 0
    surer = log_softmax64(zt, 3.0).gather(-1, labels[:, None]) > log_softmax64(zs, 3.0).gather(
        -1, labels[:, None]
    )
    assert ((weights > 0.4) == surer[:, 0])[mask].all()


def test_similarity_table_clips_what_has_no_fractional_power():
    table = similarity_table(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(table.sum(-1), torch.ones(3))
    assert table.isfinite().all()
    assert table[0, 1] == table[0].min()
    assert table[0].argmax() == 0


def test_relation_table_is_the_mean_per_label():
    logits = random_logits(1, 6, 4)
    labels = torch.tensor([0, 2, 0, -100, 2, 2])
    table = relation_table(logits, labels, temperature=2.0)
    p = log_softmax64(logits, 2.0).exp()
    torch.testing.assert_close(table[0], p[[0, 2]].mean(0))
    torch.testing.assert_close(table[2], p[[1, 4, 5]].mean(0))
    torch.testing.assert_close(table[[1, 3]], torch.full((2, 4), 0.25, dtype=torch.float64))
    batches = relation_table([logits[:2], logits[2:]], [labels[:2], labels[2:]], temperature=2.0)
    torch.testing.assert_close(batches, table)


def test_refusals():
    zs, zt = random_logits(1, 3, 6), random_logits(2, 3, 6)
    labels = zt.argmin(-1)
    bare = TopKTargets.from_logits(zt, 2)
    with pytest.raises(TargetsError, match="forward_kl") as refusal:
        kd_partial(zs, bare, labels=labels, kind="kd")
    assert refusal.value.kind == "targets-mismatch"
    with pytest.raises(TargetsError, match="--aux label_logprob"):
        kd_partial(zs, bare, labels=labels, kind="pt")
    kd_partial(zs, bare, labels=zt.argmax(-1), kind="pt")
    with pytest.raises(TargetsError, match=r"--lse-at 2\.0"):
        kd_partial(zs, bare, labels=labels, kind="topk", temperature=2.0)
    for options in (
        {"kind": "nothing"},
        {"kind": "sim"},
        {"kind": "rel", "table": torch.ones(2, 6)},
        {"kind": "topk", "k": 3},
    ):
        with pytest.raises(UsageError):
            kd_partial(zs, bare, labels=labels, **options)
    with pytest.raises(UsageError):
        kd_partial(zs, DenseTargets.from_logits(zt), labels=labels, kind="topk")
    with pytest.raises(TargetsError) as refusal:
        kd_partial(zs, bare, labels=torch.tensor([0, -100, 1]), mask=torch.ones(3).bool())
    assert refusal.value.kind == "label-missing"


def test_compiles_into_one_graph():
    labels = laws.some_labels()
    laws.assert_compiles(kd_partial, laws.topk_targets(labels), labels)
