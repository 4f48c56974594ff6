"""Jensen-Shannon and total variation: formulas, limits, brackets, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import forward_kl, jsd, jsd_bracket, reverse_kl, tvd, tvd_bracket
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets
from tests.losses.cases import log_softmax64, random_logits, seeds, sizes, value_and_gradient

MISSING = ("ghost", "renormalize", "renormalize_both", "uniform", "uniform_all", "label")


def written_jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    terms = beta * p * torch.where(p > 0, p / m, 1).log() + (1 - beta) * q * (q / m).log()
    return terms.sum(-1)


def written_tvd(p, q, beta=None):
    return 0.5 * (p - q).abs().sum(-1)


def written_pair(zt, zs, k, missing, labels):
    """Both distributions a treatment compares, from whole ones."""
    p, q = log_softmax64(zt).exp(), log_softmax64(zs).exp()
    top = p.topk(k, -1).indices
    inside = torch.zeros_like(p).scatter_(-1, top, 1.0)
    p_S, q_S = p.gather(-1, top), q.gather(-1, top)
    r, s = (p * (1 - inside)).sum(-1, keepdim=True), (q * (1 - inside)).sum(-1, keepdim=True)
    vocab = p.shape[-1]
    if missing == "ghost":
        return torch.cat([p_S, r], -1), torch.cat([q_S, s], -1)
    if missing == "renormalize_both":
        return p_S / p_S.sum(-1, keepdim=True), q_S / q_S.sum(-1, keepdim=True)
    if missing == "renormalize":
        return p * inside / (1 - r), q
    if missing == "uniform":
        return p * inside + (1 - inside) * r / max(vocab - k, 1), q
    if missing == "uniform_all":
        return p * inside + r / vocab, q
    return p * inside + torch.zeros_like(p).scatter_(-1, labels[:, None], 1.0) * r, q


@given(
    seed=seeds,
    size=sizes,
    missing=st.sampled_from(MISSING),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    loss=st.sampled_from([(jsd, written_jsd), (tvd, written_tvd)]),
)
@settings(max_examples=80)
def test_the_written_formula(seed, size, missing, beta, loss):
    function, written = loss
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    labels = torch.zeros(num_rows, dtype=torch.long)
    options = {"beta": beta} if function is jsd else {}
    got, gradient = value_and_gradient(
        function, zs, TopKTargets.from_logits(zt, k), missing=missing, labels=labels, **options
    )
    want, want_gradient = value_and_gradient(
        lambda z: written(*written_pair(zt, z, k, missing, labels), beta).mean(), zs
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-10)


@given(seed=seeds, size=sizes, beta=st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=60)
def test_brackets_hold_the_dense_value(seed, size, beta):
    num_rows, vocab, k = size
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    dense, topk = DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, k)
    for bracket, exact in (
        (jsd_bracket(zs, topk, beta=beta), jsd(zs, dense, beta=beta)),
        (tvd_bracket(zs, topk), tvd(zs, dense)),
    ):
        assert bracket.lower - 1e-12 <= exact <= bracket.upper + 1e-12
    assert jsd_bracket(zs, topk, beta=beta).lower == pytest.approx(
        float(jsd(zs, topk, beta=beta)), abs=1e-12
    )


@pytest.mark.parametrize("missing", MISSING)
def test_the_whole_vocabulary_is_dense_and_closes_the_brackets(missing):
    zt, zs = random_logits(0, 4, 9), random_logits(1, 4, 9)
    dense, topk = DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, 9)
    labels = torch.zeros(4, dtype=torch.long)
    for function in (jsd, tvd):
        torch.testing.assert_close(
            value_and_gradient(function, zs, topk, missing=missing, labels=labels),
            value_and_gradient(function, zs, dense),
        )
    for low, high in (jsd_bracket(zs, topk), tvd_bracket(zs, topk)):
        torch.testing.assert_close(low, high)


def test_jsd_tends_to_the_kl_divergences():
    zt, zs = random_logits(0, 4, 9, scale=1.0), random_logits(1, 4, 9, scale=1.0)
    dense = DenseTargets.from_logits(zt)
    beta = 1e-6
    torch.testing.assert_close(
        jsd(zs, dense, beta=beta) / beta, forward_kl(zs, dense), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        jsd(zs, dense, beta=1 - beta) / beta, reverse_kl(zs, dense), rtol=1e-4, atol=0
    )
    for beta in (0.0, 1.0, 2.0):
        with pytest.raises(UsageError, match="strictly between 0 and 1"):
            jsd(zs, dense, beta=beta)


def test_published_gradients():
    zt, zs = random_logits(0, 3, 7), random_logits(1, 3, 7)
    dense = DenseTargets.from_logits(zt)
    p, q = log_softmax64(zt).exp(), log_softmax64(zs).exp()
    beta = 0.3
    for function, g, options in (
        (jsd, (1 - beta) * (q / (beta * p + (1 - beta) * q)).log(), {"beta": beta}),
        (tvd, (q - p).sign() / 2, {}),
    ):
        _, gradient = value_and_gradient(function, zs, dense, reduction="sum", **options)
        torch.testing.assert_close(gradient, q * (g - (q * g).sum(-1, keepdim=True)))


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("function", [jsd, tvd])
def test_gradcheck(function, missing):
    zt, zs = random_logits(0, 3, 8), random_logits(1, 3, 8).requires_grad_()
    targets = TopKTargets.from_logits(zt, 3)
    labels = torch.tensor([0, 5, 7])
    assert torch.autograd.gradcheck(
        lambda z: function(z, targets, missing=missing, labels=labels), zs
    )


@pytest.mark.parametrize("function", [jsd, tvd])
def test_extreme_rows_stay_finite_and_bounded(function):
    zt, zs = torch.zeros(3, 6), torch.zeros(3, 6)
    zt[0, 0], zt[1, 1], zt[2, 2] = 1e4, 1e4, -1e4
    zs[0, 0], zs[1, 2], zs[2, 4] = 1e4, 1e4, 1e4
    zt[2, 5] = zs[1, 5] = -torch.inf
    for targets in (DenseTargets.from_logits(zt), TopKTargets.from_logits(zt, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            value, gradient = value_and_gradient(function, zs.to(dtype), targets, reduction="sum")
            assert 0.9 * 0.69 < value < 3.0
            assert gradient.isfinite().all()


def test_a_threshold_row_without_a_head_is_all_tail():
    """Nothing is known exactly: one bucket of mass 1 on either side."""
    zs = random_logits(1, 2, 8)
    targets = ThresholdTargets(
        vocab_size=8,
        ids=torch.tensor([0, 3, 5, 6, 1, 2]),
        weights=torch.tensor([0.25] * 4 + [0.6, 0.4], dtype=torch.float64),
        num_ids=torch.tensor([4, 2]),
        num_heads=torch.tensor([0, 1]),
        log_tail=torch.tensor([1.0, 0.4], dtype=torch.float64).log(),
    )
    for function in (jsd, tvd):
        assert function(zs, targets, reduction="none")[0].abs() < 1e-12


def test_threshold_targets_use_their_exact_head():
    zt, zs = random_logits(0, 2, 8), random_logits(1, 2, 8)
    log_p = log_softmax64(zt)
    order = log_p.argsort(-1, descending=True)
    heads = [3, 1]
    ids = [order[0, :3], order[0, 5:7], order[1, :1], order[1, 4:5]]
    tails = [log_p[i, order[i, h:]].logsumexp(0) for i, h in enumerate(heads)]
    weights = [
        log_p[0, order[0, :3]].exp(),
        tails[0].exp().expand(2) / 2,
        log_p[1, order[1, :1]].exp(),
        tails[1].exp().expand(1),
    ]
    targets = ThresholdTargets(
        vocab_size=8,
        ids=torch.cat(ids),
        weights=torch.cat(weights),
        num_ids=torch.tensor([5, 2]),
        num_heads=torch.tensor(heads),
        log_tail=torch.stack(tails),
    )
    for function in (jsd, tvd):
        got = function(zs, targets, reduction="none")
        for row, head in enumerate(heads):
            topk = TopKTargets.from_logits(zt[row : row + 1], head)
            want = function(zs[row : row + 1], topk, reduction="none")
            torch.testing.assert_close(got[row : row + 1], want)


def test_always_ids_beside_a_threshold_head_are_not_part_of_its_tail():
    zt, zs = random_logits(0, 1, 8), random_logits(1, 1, 8)
    p, q = log_softmax64(zt).exp()[0], log_softmax64(zs).exp()[0]
    always = torch.tensor([2, 5])
    head = [int(i) for i in p.argsort(descending=True) if i not in (2, 5)][:2]
    known = torch.tensor([*head, 2, 5])
    r, s = 1 - p[known].sum(), 1 - q[known].sum()
    tail_id = next(i for i in range(8) if i not in known)
    targets = ThresholdTargets(
        vocab_size=8,
        ids=torch.tensor([*head, tail_id]),
        weights=torch.stack([p[head[0]], p[head[1]], r]),
        num_ids=torch.tensor([3]),
        num_heads=torch.tensor([2]),
        log_tail=r.log()[None],
        always_ids=always,
        always_logprobs=p[always].log()[None],
    )
    want = 0.5 * ((p[known] - q[known]).abs().sum() + (r - s).abs())
    torch.testing.assert_close(tvd(zs, targets), want)


def test_refusals():
    zs = random_logits(0, 2, 6)
    sampled = SampledTargets.from_counts(
        torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3, 1], [4, 0]]), rounds=4, vocab_size=6
    )
    topk = TopKTargets.from_logits(random_logits(1, 2, 6), 2)
    for function in (jsd, tvd):
        with pytest.raises(TargetsError, match="cannot be computed from sampled"):
            function(zs, sampled)
        with pytest.raises(TargetsError, match="ghost, renormalize") as error:
            function(zs, topk, missing="none")
        assert error.value.kind == "missing-not-allowed"
