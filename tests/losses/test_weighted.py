"""RS-KD and threshold KD: vectors, unbiasedness, values, ragged rows, always-ids, CE merged in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import (
    cross_entropy,
    forward_kl,
    random_sampling_kd,
    sparse_kd_with_ce,
    threshold_kd,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets
from tests.losses.cases import (
    Vectors,
    assert_vector,
    generator,
    log_softmax64,
    random_logits,
    seeds,
    value_and_gradient,
)


def sampled_targets(p_NV, rounds, seed, **scalars):
    """RS-KD targets by torch.multinomial, flat; `lengths` and the like pass through."""
    draws = torch.multinomial(p_NV, rounds, replacement=True, generator=generator(seed))
    counts_NV = torch.zeros_like(p_NV, dtype=torch.long)
    counts_NV.scatter_add_(-1, draws, torch.ones_like(draws))
    position, ids = counts_NV.nonzero(as_tuple=True)
    counts = counts_NV[position, ids]
    return SampledTargets(
        vocab_size=p_NV.shape[-1],
        ids=ids,
        counts=counts,
        weights=counts.double() / rounds,
        num_ids=(counts_NV > 0).sum(-1),
        rounds=rounds,
        **scalars,
    )


def threshold_targets(p_NV, budget, seed):
    """Threshold targets written from the definition: solve for tau, then systematic selection."""
    u_N = torch.rand(len(p_NV), generator=generator(seed), dtype=torch.float64)
    ids, weights, num_ids, num_heads, log_tail = [], [], [], [], []
    for p, u in zip(p_NV, u_N, strict=True):
        sorted_p, order = p.sort(descending=True)
        for h in range(budget):
            rest = sorted_p[h:].sum()
            if sorted_p[h] * (budget - h) < rest:
                break
        tau = rest / (budget - h)
        steps = torch.cumsum(sorted_p[h:] / tau, 0)
        ticks = u + torch.arange(budget - h)
        tail = order[h:][torch.searchsorted(steps, ticks).clamp_max(len(steps) - 1)]
        ids += [order[:h], tail]
        weights += [sorted_p[:h], tau.expand(len(tail))]
        num_ids.append(h + len(tail))
        num_heads.append(h)
        log_tail.append(rest.log())
    return ThresholdTargets(
        vocab_size=p_NV.shape[-1],
        ids=torch.cat(ids),
        weights=torch.cat(weights),
        num_ids=torch.tensor(num_ids),
        num_heads=torch.tensor(num_heads),
        log_tail=torch.stack(log_tail),
    )


@pytest.mark.parametrize("loss", [random_sampling_kd, forward_kl])
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_vectors(case, loss):
    v = Vectors("rskd.npz", case)
    zs = v("student_logits")
    targets = SampledTargets.from_counts(
        v("ids"), v("counts"), rounds=v("draws").shape[-1], vocab_size=zs.shape[-1]
    )
    assert_vector(loss, zs, targets, v("loss"), v("grad"))
    part = random_sampling_kd(zs, targets, value="cross_entropy")
    assert abs(part - v("cross_entropy_part")) < 1e-10


def test_the_gradient_and_the_unbiased_value_average_to_full_kd():
    zt, zs = random_logits(0, 1, 12), random_logits(1, 1, 12)
    log_p, log_q = log_softmax64(zt), log_softmax64(zs)
    p, repeats, rounds = log_p.exp(), 4000, 5
    entropy = -(p * log_p).sum(-1)
    student = zs.expand(repeats, -1)
    for targets, loss in (
        (
            sampled_targets(p.expand(repeats, -1), rounds, 3, entropy=entropy.expand(repeats)),
            random_sampling_kd,
        ),
        (threshold_targets(p.expand(repeats, -1), 5, 4), threshold_kd),
    ):
        _, gradient = value_and_gradient(loss, student, targets, reduction="sum")
        # Five standard errors of the weights, whose variance is at most p (1 - p) / rounds.
        margin = 5 * (p * (1 - p) / rounds / repeats).sqrt() + 1e-12
        assert ((gradient.mean(0) - (log_q.exp() - p)[0]).abs() <= margin).all()
    full = (p * (log_p - log_q)).sum()
    targets = sampled_targets(p.expand(repeats, -1), rounds, 3, entropy=entropy.expand(repeats))
    rows = random_sampling_kd(student, targets, value="unbiased", reduction="none")
    assert abs(rows.mean() - full) < 5 * rows.std() / repeats**0.5
    # KL(w || q) lies above: Jensen.
    assert random_sampling_kd(student, targets) > full + 5 * rows.std() / repeats**0.5
    with pytest.raises(TargetsError, match="--aux entropy"):
        random_sampling_kd(student, sampled_targets(p.expand(repeats, -1), 5, 1), value="unbiased")
    with pytest.raises(UsageError, match="kl, unbiased, cross_entropy"):
        random_sampling_kd(student, targets, value="mean")


def test_ragged_batches_meet_their_rows():
    """Two samples of 2 and 4 positions against a [2, 5] student: same as each sample alone."""
    p = log_softmax64(random_logits(0, 6, 9)).exp()
    zs = random_logits(1, 2, 5, 9)
    entropy = torch.arange(6.0)
    flat = sampled_targets(p, 7, 2, lengths=torch.tensor([2, 4]), entropy=entropy)
    alone = sampled_targets(p, 7, 2, entropy=entropy)
    rows = torch.cat([zs[0, :2], zs[1, :4]])
    for value in ("kl", "unbiased"):
        want = random_sampling_kd(rows, alone, reduction="none", value=value)
        got = random_sampling_kd(zs, flat, reduction="none", value=value)
        torch.testing.assert_close(torch.cat([got[0, :2], got[1, :4]]), want)
        assert (got[0, 2:] == 0).all()
        assert (got[1, 4:] == 0).all()
    mean, count = random_sampling_kd(zs, flat, with_count=True)
    assert count == 6
    torch.testing.assert_close(mean, random_sampling_kd(rows, alone))


@pytest.mark.parametrize("kind", ["sampled", "threshold"])
def test_always_ids_keep_the_weights_unbiased(kind):
    """Samples are drawn from the other ids and scaled by their mass, so that E[w] = p with them."""
    zt, zs = random_logits(0, 1, 10, scale=1.0), random_logits(1, 1, 10)
    p = log_softmax64(zt).exp()
    always = torch.tensor([2, 7])
    others = p.clone()
    others[:, always] = 0
    mass = others.sum()
    repeats = 4000
    make = {"sampled": sampled_targets, "threshold": threshold_targets}[kind]
    targets = make((others / mass).expand(repeats, -1), 5, 5)
    fields = dict(vars(targets))
    fields.update(
        weights=targets.weights * mass,
        always_ids=always,
        always_logprobs=p[:, always].log().expand(repeats, -1),
    )
    targets = type(targets)(**fields)
    _, gradient = value_and_gradient(forward_kl, zs.expand(repeats, -1), targets, reduction="sum")
    want = log_softmax64(zs).exp() - p
    margin = 5 * (p / 5 / repeats).sqrt()
    assert ((gradient.mean(0) - want[0]).abs() <= margin[0]).all()
    assert (gradient[:, always] - want[:, always]).abs().max() < 1e-2


def test_an_always_id_among_the_entries_is_replaced():
    targets = SampledTargets(
        vocab_size=6,
        ids=torch.tensor([1, 4]),
        counts=torch.tensor([3, 1]),
        weights=torch.tensor([0.75, 0.25], dtype=torch.float64),
        num_ids=torch.tensor([2]),
        rounds=4,
        always_ids=torch.tensor([4, 0]),
        always_logprobs=torch.tensor([[0.2, 0.05]], dtype=torch.float64).log(),
    )
    zs = random_logits(0, 1, 6)
    w = torch.tensor([0.05, 0.75, 0.0, 0.0, 0.2, 0.0], dtype=torch.float64)
    want = (torch.special.xlogy(w, w) - w * log_softmax64(zs)[0]).sum()
    torch.testing.assert_close(forward_kl(zs, targets), want)


def all_targets(seed, num_rows, vocab, k):
    zt = random_logits(seed, num_rows, vocab)
    p = log_softmax64(zt).exp()
    return {
        "topk": TopKTargets.from_logits(zt, k, temperatures=[2.0]),
        "sampled": sampled_targets(p, 6, seed),
        "threshold": threshold_targets(p, min(k, vocab - 1), seed),
        "dense": DenseTargets.from_logits(zt),
    }


@given(
    seed=seeds,
    signal=st.sampled_from(["topk", "sampled", "threshold", "dense"]),
    missing=st.sampled_from(["ghost", "renormalize", "none", "uniform", "uniform_all", "label"]),
    temperature=st.sampled_from([1.0, 2.0]),
    ce_weight=st.floats(0, 2),
)
@settings(max_examples=80)
def test_ce_and_kd_in_one_pass_are_the_two_losses(seed, signal, missing, temperature, ce_weight):
    num_rows, vocab, k = 4, 13, 5
    targets = all_targets(seed, num_rows, vocab, k)[signal]
    zs = random_logits(seed + 1, num_rows, vocab)
    labels = torch.randint(vocab, (num_rows,), generator=generator(seed))
    if signal in ("sampled", "threshold"):
        temperature = 1.0
    shared = {"missing": missing, "temperature": temperature}

    def two_losses(z):
        ce = cross_entropy(z, targets, labels=labels)
        return ce_weight * ce + 0.7 * forward_kl(z, targets, labels=labels, **shared)

    got = value_and_gradient(
        sparse_kd_with_ce,
        zs,
        targets,
        labels=labels,
        ce_weight=ce_weight,
        kd_weight=0.7,
        **shared,
    )
    torch.testing.assert_close(got, value_and_gradient(two_losses, zs), rtol=1e-9, atol=1e-11)


def test_ce_and_kd_refusals():
    targets = all_targets(0, 3, 7, 2)
    zs, labels = random_logits(1, 3, 7), torch.tensor([0, 1, 2])
    with pytest.raises(TargetsError, match="needs labels"):
        sparse_kd_with_ce(zs, targets["topk"])
    with pytest.raises(UsageError, match="must not be negative"):
        sparse_kd_with_ce(zs, targets["topk"], labels=labels, ce_weight=-0.1)
    with pytest.raises(TargetsError, match="ghost, renormalize, none"):
        sparse_kd_with_ce(zs, targets["topk"], labels=labels, missing="renormalize_both")
    with pytest.raises(TargetsError, match="captured temperature only"):
        sparse_kd_with_ce(zs, targets["sampled"], labels=labels, temperature=2.0)


def test_gradcheck_of_every_weighted_form():
    zs = random_logits(1, 3, 7).requires_grad_()
    labels = torch.tensor([0, 1, 2])
    for targets in all_targets(0, 3, 7, 2).values():
        assert torch.autograd.gradcheck(
            lambda z, t=targets: sparse_kd_with_ce(z, t, labels=labels), zs
        )
