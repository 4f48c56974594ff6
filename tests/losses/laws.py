"""What every loss of a row must obey, whatever it computes.

Letters: B samples, T positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from logitstore.targets import (
    DenseTargets,
    ScoresTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
)
from tests.losses.cases import random_logits, value_and_gradient

B, T, V, K = 3, 4, 12, 5
TEMPERATURES = (2.0, 3.0, 1 / 0.3)


def dense_targets(seed: int = 1, scale: float = 3.0) -> DenseTargets:
    return DenseTargets.from_logits(random_logits(seed, B, T, V, scale=scale))


def some_labels(seed: int = 2) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def topk_targets(labels: Tensor, k: int = K) -> TopKTargets:
    return TopKTargets.from_logits(
        dense_targets().logits, k, labels=labels, temperatures=TEMPERATURES
    )


def threshold_targets(labels: Tensor) -> ThresholdTargets:
    """Heads of 3 to 5 ids in descending order and one tail id each, flat over [B, T]."""
    topk = topk_targets(labels)
    log_p = dense_targets().logprobs.reshape(-1, V)
    num_heads = 3 + torch.arange(B * T) % 3
    ids, weights, log_tail = [], [], []
    for row, h in enumerate(num_heads.tolist()):
        order = log_p[row].argsort(descending=True)
        rest = log_p[row, order[h:]].logsumexp(-1)
        ids += order[: h + 1].tolist()
        weights += [*log_p[row, order[:h]].exp().tolist(), rest.exp().item()]
        log_tail.append(rest)
    flat = {
        name: getattr(topk, name).reshape(-1)
        for name in ("lse", "label_logprob", "label_rank", "entropy", "logit_mean")
    }
    return ThresholdTargets(
        vocab_size=V,
        lengths=torch.full((B,), T),
        ids=torch.tensor(ids),
        weights=torch.tensor(weights, dtype=torch.float64),
        num_ids=num_heads + 1,
        num_heads=num_heads,
        log_tail=torch.stack(log_tail),
        lse_at={t: x.reshape(-1) for t, x in topk.lse_at.items()},
        **flat,
    )


def scores_targets() -> ScoresTargets:
    """V candidates, the last two of every other position missing."""
    ids = torch.arange(V).expand(B, T, V).clone()
    ids[:, ::2, -2:] = -1
    return ScoresTargets(vocab_size=1000, ids=ids, scores=random_logits(5, B, T, V).sigmoid())


def flattened(targets: Targets, lengths: list[int]) -> Targets:
    """The first `lengths` positions of each sample one after another, as a batch arrives."""
    keep_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    flat = targets.map(lambda x: x[keep_BT])
    return dataclasses.replace(flat, lengths=torch.tensor(lengths))


def assert_loss_contract(function, targets: Targets, labels: Tensor, **options) -> None:
    """Reductions, counts, masks and half types, for targets [B, T, ...] or flat threshold ones."""
    student = random_logits(9, B, T, V)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = False
    call = {"labels": labels, "mask": mask, **options}

    total, count = function(student, targets, reduction="sum", with_count=True, **call)
    each = function(student, targets, reduction="none", **call)
    mean = function(student, targets, **call)
    assert count == mask.sum()
    assert each.shape == (B, T)
    assert (each[~mask] == 0).all()
    torch.testing.assert_close(each.sum(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, total / count, rtol=1e-12, atol=0)

    # Masked rows may hold anything, on both sides.
    value, gradient = value_and_gradient(function, student, targets, **call)
    spoilt = student.clone()
    spoilt[0, 1], spoilt[2, 3] = torch.nan, torch.inf
    no_label = labels.masked_fill(~mask, -100)
    spoilt_targets = targets
    if targets.lengths is None:
        spoilt_targets = targets.map(
            lambda x: x.masked_fill(
                ~mask.reshape(B, T, *[1] * (x.ndim - 2)), torch.nan if x.is_floating_point() else -1
            )
        )
    again = value_and_gradient(function, spoilt, spoilt_targets, **{**call, "labels": no_label})
    torch.testing.assert_close(again[0], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(again[1], gradient, rtol=1e-10, atol=1e-14)
    assert (again[1][~mask] == 0).all()
    # Without a mask, -100 says the same.
    unmasked = function(student, targets, labels=no_label, **options)
    torch.testing.assert_close(unmasked, value, rtol=1e-12, atol=0)

    # Half types are computed in float32.
    half = student.bfloat16()
    got, got_gradient = value_and_gradient(function, half, targets, **call)
    exact, exact_gradient = value_and_gradient(function, half.float(), targets, **call)
    assert got.dtype == torch.float32
    assert got_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_gradient.float(), exact_gradient, rtol=1e-2, atol=1e-4)


def assert_flat_is_padded(function, targets: Targets, labels: Tensor, **options) -> None:
    """Flat targets of unequal samples give what padded ones give under a mask; batches add up."""
    lengths = [4, 2, 3]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    student = random_logits(9, B, T, V)
    flat = function(student, flattened(targets, lengths), labels=labels, **options)
    padded = function(student, targets, labels=labels, mask=mask, **options)
    torch.testing.assert_close(flat, padded, rtol=1e-12, atol=0)
    parts = [
        function(
            student[rows],
            targets.map(lambda x, rows=rows: x[rows]),
            labels=labels[rows],
            mask=mask[rows],
            reduction="sum",
            with_count=True,
            **options,
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]
    joined = sum(p.loss for p in parts) / sum(p.count for p in parts)
    torch.testing.assert_close(joined, padded, rtol=1e-12, atol=0)


def assert_permutable(function, labels: Tensor, make_targets, **options) -> None:
    """Renaming ids on both sides changes nothing."""
    student, teacher = random_logits(9, B, T, V), dense_targets().logits
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    renamed = torch.empty_like(order)
    renamed[order] = torch.arange(V)
    before = function(student, make_targets(teacher, labels), labels=labels, **options)
    after = function(
        student[..., order],
        make_targets(teacher[..., order], renamed[labels]),
        labels=renamed[labels],
        **options,
    )
    torch.testing.assert_close(after, before, rtol=1e-11, atol=0)


def assert_gradient_checks(function, targets: Targets, labels: Tensor, **options) -> None:
    student = random_logits(9, B, T, V).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: function(z, targets, labels=labels, **options), (student,), atol=1e-7
    )


def assert_compiles(function, targets: Targets, labels: Tensor, **options) -> None:
    """One graph under torch.compile, and masked rows still may hold anything."""
    student = random_logits(9, B, T, V)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = False
    value, gradient = value_and_gradient(
        function, student, targets, labels=labels, mask=mask, **options
    )
    student[0, 1], student[2, 3] = torch.nan, torch.inf
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, m: function(z, targets, labels=labels, mask=m, **options),
        backend="aot_eager",
        fullgraph=True,
    )
    with warnings.catch_warnings():
        # The compiler instantiates custom autograd functions itself, and warns about that.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        got, got_gradient = value_and_gradient(compiled, student, mask)
    torch.testing.assert_close(got, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-9, atol=1e-14)
