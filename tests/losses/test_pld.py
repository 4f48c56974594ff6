"""Plackett-Luce distillation: vectors, a written double loop, the truncation bound, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import pld
from logitstore.spec.errors import TargetsError
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


def written_pld(zt, zs, labels, temperature=1.0, ranks=None):
    """The definition: one logsumexp over the ids not yet picked per rank."""
    values = []
    for t, s, y in zip(zt, zs, labels.tolist(), strict=True):
        alpha = log_softmax64(t, temperature).exp()
        order = sorted(range(len(t)), key=lambda i: (i != y, -t[i].item(), i))
        value = torch.zeros((), dtype=torch.float64)
        for rank, i in enumerate(order[:ranks]):
            unpicked = s[order[rank:]]
            value = value + alpha[i] * (unpicked.exp().sum().log() - s[i])
        values.append(value)
    return torch.stack(values)


def mass_outside(zt, targets, labels):
    p = log_softmax64(zt).exp()
    p = p.scatter(-1, targets.ids, 0.0).scatter(-1, labels[:, None], 0.0)
    return p.sum(-1)


@pytest.mark.parametrize(("case", "temperature"), [("c0", 1.0), ("c1", 4.0)])
def test_dense_vectors(case, temperature):
    v = Vectors("pld.npz", case)
    targets = DenseTargets.from_logits(v("teacher_logits"))
    options = {"labels": v("labels"), "teacher_temperature": temperature}
    student = v("student_logits")
    assert_vector(pld, student, targets, v("loss"), v("grad"), **options)
    each = pld(student, targets, reduction="none", **options)
    torch.testing.assert_close(each, v("loss_per_sample"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize(("name", "renormalize"), [("trunc", False), ("trunc_renorm", True)])
def test_sparse_vectors(case, name, renormalize):
    v = Vectors("pld_sparse.npz", case)
    targets = TopKTargets(
        vocab_size=v("student_logits").shape[-1],
        ids=v("topk_ids"),
        logprobs=v("topk_logits") - v("lse")[:, None],
        label_logprob=v("label_teacher_logit") - v("lse"),
    )
    assert_vector(
        pld,
        v("student_logits"),
        targets,
        v(f"{name}_loss"),
        v(f"{name}_grad"),
        labels=v("labels"),
        renormalize=renormalize,
    )


@given(seed=seeds, size=sizes, temperature=st.sampled_from([1.0, 0.5, 4.0]))
@settings(max_examples=40)
def test_dense_and_stored_are_the_written_loop(seed, size, temperature):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    options = {"labels": labels, "teacher_temperature": temperature, "reduction": "none"}
    expected = written_pld(zt, zs, labels, temperature)
    torch.testing.assert_close(pld(zs, DenseTargets.from_logits(zt), **options), expected)
    temperatures = (0.5, 4.0)
    whole = TopKTargets.from_logits(zt, vocab, labels=labels, temperatures=temperatures)
    torch.testing.assert_close(pld(zs, whole, **options), expected)

    part = TopKTargets.from_logits(zt, k, labels=labels, temperatures=temperatures)
    stored = (part.ids == labels[:, None]).any(-1)
    ranks = torch.where(stored, k, k + 1).tolist()
    written = torch.cat(
        [written_pld(zt[[r]], zs[[r]], labels[[r]], temperature, ranks[r]) for r in range(rows)]
    )
    torch.testing.assert_close(pld(zs, part, **options), written)


@given(seed=seeds, size=sizes)
@settings(max_examples=60)
def test_truncation_misses_at_most_twice_the_mass_outside(seed, size):
    rows, vocab, k = size
    zt, zs = random_logits(seed, rows, vocab), random_logits(seed + 1, rows, vocab)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    targets = TopKTargets.from_logits(zt, k, labels=labels)
    _, full = value_and_gradient(
        pld, zs, DenseTargets.from_logits(zt), labels=labels, reduction="sum"
    )
    _, part = value_and_gradient(pld, zs, targets, labels=labels, reduction="sum")
    missed = (full - part).abs().sum(-1)
    assert (missed <= 2 * mass_outside(zt, targets, labels) + 1e-12).all()
    # Softmax steps: each row's gradient sums to zero.
    assert part.sum(-1).abs().max() < 1e-12


def test_extremes_of_alpha_are_cross_entropy_and_list_mle():
    zs = random_logits(1, 4, 9)
    labels = torch.tensor([0, 3, 8, 2])
    one_hot = torch.full((4, 9), -1e4, dtype=torch.float64).scatter(-1, labels[:, None], 0.0)
    torch.testing.assert_close(
        pld(zs, DenseTargets.from_logits(one_hot), labels=labels),
        torch.nn.functional.cross_entropy(zs, labels),
    )
    flat = torch.zeros(4, 9, dtype=torch.float64)
    # All teacher logits tie: the label, then ids in ascending order.
    expected = written_pld(flat, zs, labels).mean()
    torch.testing.assert_close(pld(zs, DenseTargets.from_logits(flat), labels=labels), expected)
    one_class = torch.ones(2, 1, dtype=torch.float64)
    only = torch.zeros(2, dtype=torch.long)
    assert pld(one_class, DenseTargets.from_logits(one_class), labels=only) == 0


@pytest.mark.parametrize("signal", ["dense", "topk", "threshold"])
def test_loss_contract(signal):
    labels = laws.some_labels()
    targets = {
        "dense": laws.dense_targets(),
        "topk": laws.topk_targets(labels),
        "threshold": laws.threshold_targets(labels),
    }[signal]
    laws.assert_loss_contract(pld, targets, labels)
    laws.assert_gradient_checks(pld, targets, labels)
    if signal != "threshold":
        laws.assert_flat_is_padded(pld, targets, labels, teacher_temperature=1.0)


def test_invariant_to_renaming_ids_and_to_a_shift():
    labels = laws.some_labels()
    laws.assert_permutable(pld, labels, lambda z, y: DenseTargets.from_logits(z))
    laws.assert_permutable(pld, labels, lambda z, y: TopKTargets.from_logits(z, 5, labels=y))
    student, targets = random_logits(3, laws.B, laws.T, laws.V), laws.topk_targets(labels)
    torch.testing.assert_close(
        pld(student + 77.0, targets, labels=labels), pld(student, targets, labels=labels)
    )


def test_the_exact_head_of_threshold_targets_serves():
    labels = laws.some_labels()
    targets = laws.threshold_targets(labels)
    student = random_logits(3, laws.B, laws.T, laws.V)
    teacher = laws.dense_targets().logits.reshape(-1, laws.V)
    each = pld(student, targets, labels=labels, reduction="none").reshape(-1)
    for row, h in enumerate(targets.num_heads.tolist()):
        y = labels.reshape(-1)[row]
        head = teacher[row].argsort(descending=True)[:h]
        ranks = h if (head == y).any() else h + 1
        expected = written_pld(
            teacher[[row]], student.reshape(-1, laws.V)[[row]], y[None], ranks=ranks
        )
        torch.testing.assert_close(each[[row]], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_ten_thousand_stay_finite(dtype):
    zs = torch.tensor([[2e3, -2e3, 1e4, 0.0, -1e4]], dtype=dtype)
    one_hot = torch.tensor([[0.0, -1e4, -2e4, -torch.inf, 3.0]], dtype=dtype)
    label = torch.tensor([1])
    for targets in (
        DenseTargets.from_logits(one_hot),
        TopKTargets.from_logits(one_hot, 2, labels=label),
        TopKTargets.from_logits(one_hot, 5, labels=label),
    ):
        value, gradient = value_and_gradient(pld, zs, targets, labels=label)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_student_with_extra_ids():
    zt, zs = random_logits(1, 3, 8), random_logits(2, 3, 11)
    labels = torch.tensor([0, 5, 7])
    extended = torch.nn.functional.pad(zt, (0, 3), value=-torch.inf)
    torch.testing.assert_close(
        pld(zs, DenseTargets.from_logits(zt), labels=labels),
        pld(zs, DenseTargets.from_logits(extended), labels=labels),
    )


def test_refusals():
    zt, zs = random_logits(1, 3, 8), random_logits(2, 3, 8)
    last = zt.argmin(-1)
    bare = TopKTargets.from_logits(zt, 2)
    with pytest.raises(TargetsError, match="--aux label_logprob") as refusal:
        pld(zs, bare, labels=last)
    assert refusal.value.kind == "aux-missing"
    pld(zs, bare, labels=zt.argmax(-1))  # a stored label needs nothing more
    with pytest.raises(TargetsError, match=r"--lse-at 2\.0"):
        pld(zs, bare, labels=zt.argmax(-1), teacher_temperature=2.0)
    with pytest.raises(TargetsError) as refusal:
        pld(zs, bare)
    assert refusal.value.kind == "label-missing"
    with pytest.raises(TargetsError) as refusal:
        pld(zs, bare, labels=torch.full((3,), -100))
    assert refusal.value.kind == "empty-mask"


def test_compiles_into_one_graph():
    labels = laws.some_labels()
    laws.assert_compiles(pld, laws.topk_targets(labels), labels)
