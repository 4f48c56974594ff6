"""Forward and reverse KL: vectors, independent formulas, identities, bounds, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import MISSING, cross_entropy, forward_kl, reverse_kl
from logitstore.losses.sparse_logprobs import sparse_logprobs
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, TopKTargets
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    sizes,
    value_and_gradient,
)

REVERSE_MISSING = ("ghost", "renormalize_both", "uniform", "uniform_all")
VECTOR_NAMES = {
    "raw": "none",
    "renorm": "renormalize",
    "smooth": "uniform",
    "smooth_all": "uniform_all",
    "ghost": "ghost",
    "label": "label",
}


def written_target(p, k, missing, labels):
    """The [R, V] distribution a treatment stands for, from the whole teacher."""
    vocab = p.shape[-1]
    top = p.topk(k, -1).indices
    inside = torch.zeros_like(p).scatter_(-1, top, 1.0)
    kept = p * inside
    r = (p * (1 - inside)).sum(-1, keepdim=True)
    if missing == "renormalize":
        return kept / (1 - r)
    if missing == "none":
        return kept
    if missing == "uniform":
        return kept + (1 - inside) * r / max(vocab - k, 1)
    if missing == "uniform_all":
        return kept + r / vocab
    return kept + torch.zeros_like(p).scatter_(-1, labels[:, None], 1.0) * r


def written_forward(zt, zs, k, missing, labels, temperature=1.0):
    """float64 rows of T^2 forward KL from the definitions, autograd-differentiable in zs."""
    p = log_softmax64(zt, temperature).exp()
    log_q = log_softmax64(zs, temperature)
    top = p.topk(k, -1).indices
    p_S, log_q_S = p.gather(-1, top), log_q.gather(-1, top)
    if missing == "renormalize_both":
        p_S = p_S / p_S.sum(-1, keepdim=True)
        log_q_S = log_q_S - log_q_S.exp().sum(-1, keepdim=True).log()
        return temperature**2 * (p_S * (p_S.log() - log_q_S)).sum(-1)
    if missing == "ghost":
        rest = torch.ones_like(p).scatter_(-1, top, 0.0)
        r, s = (p * rest).sum(-1), (log_q.exp() * rest).sum(-1)
        tail = torch.where(r > 0, r * (r.log() - s.log()), 0.0) if k < p.shape[-1] else 0.0
        return temperature**2 * ((p_S * (p_S.log() - log_q_S)).sum(-1) + tail)
    target = written_target(p, k, missing, labels)
    return temperature**2 * (torch.special.xlogy(target, target) - target * log_q).sum(-1)


@pytest.mark.parametrize(("case", "temperature"), [("c0", 1.0), ("c1", 4.0)])
def test_forward_kl_reproduces_the_dense_vectors(case, temperature):
    v = Vectors("kd_base.npz", case)
    targets = DenseTargets.from_logits(v("teacher_logits"))
    student = v("student_logits")
    assert_vector(forward_kl, student, targets, v("loss"), v("grad"), temperature=temperature)


@pytest.mark.parametrize("missing", sorted(MISSING))
@pytest.mark.parametrize(("case", "temperature"), [("c0", 1.0), ("c1", 4.0)])
def test_topk_of_the_whole_vocabulary_is_dense(case, temperature, missing):
    v = Vectors("kd_base.npz", case)
    zt, zs = v("teacher_logits"), v("student_logits")
    targets = TopKTargets.from_logits(zt, zt.shape[-1], temperatures=[temperature])
    assert_vector(
        forward_kl,
        zs,
        targets,
        v("loss"),
        v("grad"),
        missing=missing,
        temperature=temperature,
        labels=torch.zeros(len(zs), dtype=torch.long),
    )


@pytest.mark.parametrize("name", sorted(VECTOR_NAMES))
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_forward_kl_reproduces_the_topk_vectors(case, name):
    v = Vectors("topk_baselines.npz", case)
    zs = v("student_logits")
    targets = TopKTargets(
        vocab_size=zs.shape[-1],
        ids=v("topk_ids"),
        logprobs=v("topk_logprobs"),
        log_tail=torch.log1p(-v("kept_mass")),
    )
    assert_vector(
        forward_kl,
        zs,
        targets,
        v(f"{name}_loss"),
        v(f"{name}_grad"),
        labels=v("labels"),
        missing=VECTOR_NAMES[name],
    )


@given(
    seed=seeds,
    size=sizes,
    missing=st.sampled_from(MISSING),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
)
@settings(max_examples=80)
def test_forward_kl_is_the_written_formula(seed, size, missing, temperature):
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    labels = torch.randint(vocab, (num_rows,), generator=torch.Generator().manual_seed(seed))
    targets = TopKTargets.from_logits(zt, k, temperatures=[temperature])
    got, gradient = value_and_gradient(
        forward_kl, zs, targets, labels=labels, missing=missing, temperature=temperature
    )
    want, want_gradient = value_and_gradient(
        lambda z: written_forward(zt, z, k, missing, labels, temperature).mean(), zs
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-10)


@given(seed=seeds, size=sizes)
@settings(max_examples=40)
def test_identities_between_the_treatments(seed, size):
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    targets = TopKTargets.from_logits(zt, k)

    def loss(missing):
        return forward_kl(zs, targets, missing=missing, reduction="none")

    log_p, log_q = log_softmax64(zt), log_softmax64(zs)
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter_(-1, targets.ids, True)
    a, q_S = (log_p.exp() * inside).sum(-1), (log_q.exp() * inside).sum(-1)
    r, s = (log_p.exp() * ~inside).sum(-1), (log_q.exp() * ~inside).sum(-1)
    buckets = a * (a / q_S).log() + r * (r / s).log()
    p_tail, q_tail = log_p.exp() * ~inside / r[:, None], log_q.exp() * ~inside / s[:, None]
    tail = (torch.special.xlogy(p_tail, p_tail) - torch.special.xlogy(p_tail, q_tail)).sum(-1)
    both = loss("renormalize_both")
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(full, buckets + a * both + r * tail, **close)
    torch.testing.assert_close(loss("ghost"), buckets + a * both, **close)
    torch.testing.assert_close(loss("none"), a * both + a * (a / q_S).log(), **close)
    torch.testing.assert_close(loss("renormalize"), both - q_S.log(), **close)
    assert (loss("ghost") <= full + 1e-10).all()


@given(seed=seeds, size=sizes)
@settings(max_examples=40)
def test_gradients_stay_within_their_stated_distance_from_full_kd(seed, size):
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    labels = torch.zeros(num_rows, dtype=torch.long)
    targets = TopKTargets.from_logits(zt, k)
    q, p = log_softmax64(zs).exp(), log_softmax64(zt).exp()
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter_(-1, targets.ids, True)
    r, s = (p * ~inside).sum(-1), (q * ~inside).sum(-1)
    for missing in MISSING:
        _, gradient = value_and_gradient(
            forward_kl, zs, targets, labels=labels, missing=missing, reduction="sum"
        )
        distance = (gradient - (q - p)).abs().sum(-1)
        bound = 2 * (r + s) if missing == "renormalize_both" else 2 * r
        assert (distance <= bound + 1e-10).all(), missing
        if missing == "renormalize":
            torch.testing.assert_close(distance, 2 * r, rtol=1e-8, atol=1e-12)
        if missing == "ghost":
            assert ((gradient - (q - p)) * inside).abs().max() < 1e-12
        if missing not in ("none", "renormalize_both"):
            assert gradient.sum(-1).abs().max() < 1e-10


@given(
    seed=seeds,
    size=sizes,
    missing=st.sampled_from(REVERSE_MISSING),
    temperature=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=60)
def test_reverse_kl_is_the_written_formula(seed, size, missing, temperature):
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    targets = TopKTargets.from_logits(zt, k, temperatures=[temperature])
    log_p = log_softmax64(zt, temperature)
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter_(-1, targets.ids, True)

    def written(z):
        log_q = log_softmax64(z, temperature)
        q = log_q.exp()
        if missing == "renormalize_both":
            q_S = (q * inside).sum(-1, keepdim=True)
            p_S = (log_p.exp() * inside).sum(-1, keepdim=True)
            rows = inside * (q / q_S) * ((log_q - q_S.log()) - (log_p - p_S.log()))
            return temperature**2 * rows.sum(-1).mean()
        r = (log_p.exp() * ~inside).sum(-1)
        if missing == "ghost":
            s = (q * ~inside).sum(-1)
            rows = (inside * q * (log_q - log_p)).sum(-1) + s * (s.log() - r.log())
            return temperature**2 * rows.mean()
        target = written_target(log_p.exp(), k, missing, None)
        return temperature**2 * (q * (log_q - target.log())).sum(-1).mean()

    got, gradient = value_and_gradient(
        reverse_kl, zs, targets, missing=missing, temperature=temperature
    )
    want, want_gradient = value_and_gradient(written, zs)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-9)
    if missing == "ghost":
        full = reverse_kl(zs, DenseTargets.from_logits(zt), temperature=temperature)
        assert got <= full + 1e-9


@pytest.mark.parametrize("missing", REVERSE_MISSING)
def test_reverse_kl_from_the_whole_vocabulary_is_dense(missing):
    zt, zs = random_logits(0, 5, 12), random_logits(1, 5, 12)
    dense = value_and_gradient(reverse_kl, zs, DenseTargets.from_logits(zt))
    sparse = value_and_gradient(reverse_kl, zs, TopKTargets.from_logits(zt, 12), missing=missing)
    torch.testing.assert_close(dense, sparse)


def test_reverse_kl_gradient_is_the_published_one():
    zt, zs, temperature = random_logits(0, 3, 9), random_logits(1, 3, 9), 2.0
    _, gradient = value_and_gradient(
        reverse_kl, zs, DenseTargets.from_logits(zt), temperature=temperature, reduction="sum"
    )
    log_p, log_q = log_softmax64(zt, temperature), log_softmax64(zs, temperature)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, temperature * log_q.exp() * (log_q - log_p - kl))


@pytest.mark.parametrize("missing", MISSING)
def test_gradcheck(missing):
    zt, zs = random_logits(0, 3, 8), random_logits(1, 3, 8)
    labels = torch.tensor([0, 5, 7])
    targets = TopKTargets.from_logits(zt, 3, temperatures=[2.0])

    def forward(z):
        return forward_kl(
            z, targets, missing=missing, labels=labels, temperature=2.0, reduction="none"
        )

    assert torch.autograd.gradcheck(forward, zs.requires_grad_())
    if missing in REVERSE_MISSING:
        assert torch.autograd.gradcheck(
            lambda z: reverse_kl(z, targets, missing=missing, temperature=2.0), zs
        )


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
@pytest.mark.parametrize("missing", ["none", "renormalize", "label"])
def test_infinite_treatments_are_refused_by_name(loss, missing):
    zs = random_logits(0, 2, 6)
    targets = TopKTargets.from_logits(random_logits(1, 2, 6), 3)
    if loss is forward_kl:
        assert forward_kl(zs, targets, missing=missing, labels=torch.tensor([0, 1])).isfinite()
        return
    with pytest.raises(TargetsError, match="ghost, renormalize_both, uniform") as error:
        reverse_kl(zs, targets, missing=missing)
    assert error.value.kind == "missing-not-allowed"


def test_refusals_name_what_to_do():
    zs = random_logits(0, 2, 6)
    zt = random_logits(1, 2, 6)
    topk = TopKTargets.from_logits(zt, 3)
    sampled = SampledTargets.from_counts(
        torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3, 1], [4, 0]]), rounds=4, vocab_size=6
    )
    with pytest.raises(TargetsError, match="--lse-at 2") as error:
        forward_kl(zs, topk, temperature=2.0)
    assert error.value.kind == "aux-missing"
    with pytest.raises(TargetsError, match="captured temperature only") as error:
        forward_kl(zs, sampled, temperature=2.0)
    assert error.value.kind == "not-retemperable"
    with pytest.raises(TargetsError, match="reverse_kl cannot be computed from sampled") as error:
        reverse_kl(zs, sampled)
    assert error.value.kind == "targets-mismatch"
    with pytest.raises(UsageError, match="ghost, renormalize") as usage:
        forward_kl(zs, topk, missing="gost")
    assert usage.value.kind == "bad-argument"
    without_tail = TopKTargets(vocab_size=6, ids=topk.ids, logprobs=topk.logprobs)
    with pytest.raises(TargetsError, match="--aux log_tail") as error:
        forward_kl(zs, without_tail)
    assert error.value.kind == "aux-missing"
    assert forward_kl(zs, without_tail, missing="renormalize").isfinite()
    with pytest.raises(TargetsError, match="needs labels") as error:
        forward_kl(zs, topk, missing="label")
    assert error.value.kind == "label-missing"
    with pytest.raises(TargetsError, match="no label inside the vocabulary") as error:
        forward_kl(
            zs, topk, missing="label", labels=torch.tensor([1, -100]), mask=torch.ones(2).bool()
        )
    assert error.value.kind == "label-missing"


@pytest.mark.parametrize("missing", MISSING)
def test_extreme_rows_stay_finite(missing):
    """Gaps of 1e4, a one-hot teacher, and a student that has all its mass on S or none of it."""
    zt = torch.zeros(4, 8)
    zt[0, 0], zt[1, 1], zt[2, 2], zt[3, :4] = 1e4, 1e4, -1e4, 1e4
    zs = torch.zeros(4, 8)
    zs[0, 0], zs[1, 2], zs[2, 7], zs[3, 6] = 1e4, 1e4, 1e4, -1e4
    targets = TopKTargets.from_logits(zt, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        value, gradient = value_and_gradient(
            forward_kl, zs.to(dtype), targets, missing=missing, labels=torch.tensor([1, 2, 3, 4])
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        if missing in REVERSE_MISSING:
            value, gradient = value_and_gradient(reverse_kl, zs.to(dtype), targets, missing=missing)
            assert value.isfinite()
            assert gradient.isfinite().all()


def test_a_small_tail_is_not_lost_to_cancellation():
    """At s = 8e-13, log(1 - sum exp) in float32 is -inf or noise; the masked logsumexp is right."""
    zs = torch.tensor([[30.0, 2.0, 1.0, 0.0]])
    zt = torch.tensor([[28.0, 1.0, 2.0, 0.0]])
    targets = TopKTargets.from_logits(zt, 1)
    _, gradient = value_and_gradient(forward_kl, zs, targets)
    _, want = value_and_gradient(
        lambda z: written_forward(zt.double(), z, 1, "ghost", None).mean(), zs.double()
    )
    torch.testing.assert_close(gradient[:, 1:].double(), want[:, 1:], rtol=1e-5, atol=0)
    tail = sparse_logprobs(zs, targets.ids, torch.tensor([True]), num_excluded=1).log_tail
    want_tail = torch.logsumexp(zs[0, 1:].double(), 0) - torch.logsumexp(zs[0].double(), 0)
    torch.testing.assert_close(tail[0].double(), want_tail, rtol=1e-6, atol=0)


def test_bfloat16_is_computed_in_float32():
    zt, zs = random_logits(0, 6, 50).float(), random_logits(1, 6, 50).bfloat16()
    targets = TopKTargets.from_logits(zt, 5)
    value, gradient = value_and_gradient(forward_kl, zs, targets)
    want, want_gradient = value_and_gradient(forward_kl, zs.double(), targets)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    # Rounded once, at the end.
    torch.testing.assert_close(gradient, want_gradient.bfloat16(), rtol=2**-7, atol=1e-8)


def test_always_ids_replace_or_join_the_list_and_leave_the_tail():
    zt, zs = random_logits(0, 4, 10), random_logits(1, 4, 10)
    log_p = log_softmax64(zt)
    always = torch.tensor([3, 8])
    plain = TopKTargets.from_logits(zt, 4)
    targets = TopKTargets(
        vocab_size=10,
        ids=plain.ids,
        logprobs=plain.logprobs,
        log_tail=plain.log_tail,
        always_ids=always,
        always_logprobs=log_p[:, always],
    )
    p, log_q = log_p.exp(), log_softmax64(zs)
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter_(-1, plain.ids, True)
    inside[:, always] = True
    r, s = (p * ~inside).sum(-1), (log_q.exp() * ~inside).sum(-1)
    want = (inside * p * (log_p - log_q)).sum(-1) + r * (r / s).log()
    torch.testing.assert_close(forward_kl(zs, targets, reduction="none"), want)
    assert (inside.sum(-1) > 4).any()


def test_extended_student_vocabularies():
    """A student with padded head rows: its extra ids are tail for forward KL, left out for reverse
    KL."""
    zt, zs = random_logits(0, 3, 7), random_logits(1, 3, 9)
    dense, topk = DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, 7)
    log_p, log_q = log_softmax64(zt), log_softmax64(zs)
    want = (log_p.exp() * (log_p - log_q[:, :7])).sum(-1).mean()
    torch.testing.assert_close(forward_kl(zs, dense), want)
    torch.testing.assert_close(forward_kl(zs, topk), want)
    torch.testing.assert_close(reverse_kl(zs, dense), reverse_kl(zs[:, :7], dense))
    with pytest.raises(TargetsError, match="smaller than the teacher's"):
        forward_kl(zs[:, :5], dense)


def test_cross_entropy_is_torch_cross_entropy():
    zs = random_logits(0, 2, 5, 11)
    labels = torch.tensor([[0, 10, -100, 3, 4], [1, 1, 2, -100, -100]])
    targets = DenseTargets.from_logits(random_logits(1, 2, 5, 11))
    got = value_and_gradient(cross_entropy, zs, targets, labels=labels)
    want = value_and_gradient(
        lambda z: torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten()), zs
    )
    torch.testing.assert_close(got, want)
    with pytest.raises(TargetsError, match="needs labels"):
        cross_entropy(zs, targets)
    with pytest.raises(TargetsError, match="first label 11"):
        cross_entropy(zs, targets, labels=labels.clamp_min(0) + 1)
