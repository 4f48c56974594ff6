"""The primitive below every sparse loss, and what all losses on it inherit."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import (
    MISSING,
    cross_entropy,
    forward_kl,
    jsd,
    random_sampling_kd,
    reverse_kl,
    sparse_kd_with_ce,
    sparse_logprobs,
    tvd,
)
from logitstore.losses.sparse_logprobs import _from_plain_operators
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, TopKTargets
from tests.losses.cases import generator, log_softmax64, random_logits, seeds, value_and_gradient

LOSSES = (cross_entropy, forward_kl, reverse_kl, jsd, tvd, sparse_kd_with_ce)


def random_ids(seed, num_rows, vocab, width):
    """Distinct ids per row with padding anywhere; a row may be padding alone."""
    ids = torch.stack(
        [torch.randperm(vocab, generator=generator(seed + i))[:width] for i in range(num_rows)]
    )
    return torch.where(torch.rand(num_rows, width, generator=generator(seed)) < 0.6, ids, -1)


@given(
    seed=seeds,
    vocab=st.integers(4, 30),
    num_excluded=st.integers(0, 3),
    sum_vocab=st.booleans(),
    temperature=st.sampled_from([1.0, 2.5]),
    rows_at_a_time=st.sampled_from([1, 2, 100]),
)
@settings(max_examples=60)
def test_values_and_gradients_are_those_of_plain_operators(
    seed, vocab, num_excluded, sum_vocab, temperature, rows_at_a_time
):
    num_rows = 5
    student = random_logits(seed, num_rows, vocab).requires_grad_()
    ids = random_ids(seed, num_rows, vocab, 3)
    mask = torch.rand(num_rows, generator=generator(seed)) > 0.3
    settings_ = (num_excluded, (vocab - 1) * sum_vocab, temperature)
    with pytest.MonkeyPatch.context() as patch:
        # Chunks that do not divide the rows.
        module = inspect.getmodule(_from_plain_operators)
        patch.setattr(module, "chunk_rows", lambda *_: rows_at_a_time)
        got = sparse_logprobs(
            student,
            ids,
            mask,
            num_excluded=settings_[0],
            sum_vocab=settings_[1],
            temperature=temperature,
        )
        weights = [random_logits(seed + i, *x.shape) for i, x in enumerate(got)]
        total = sum((w * x).sum() for w, x in zip(weights, got, strict=True))
        (gradient,) = torch.autograd.grad(total, student)
    want = _from_plain_operators(student, ids, mask, *settings_)
    want_total = sum((w * x).sum() for w, x in zip(weights, want, strict=True))
    for got_x, want_x in zip(got, want, strict=True):
        torch.testing.assert_close(got_x, want_x)
    torch.testing.assert_close(gradient, torch.autograd.grad(want_total, student)[0])
    probs = torch.softmax(student.detach() / temperature, -1)
    for row in mask.nonzero()[:, 0] if num_excluded else ():
        inside = {int(i) for i in ids[row, :num_excluded] if i >= 0}
        outside = torch.tensor([v for v in range(vocab) if v not in inside])
        torch.testing.assert_close(got.log_tail[row].exp(), probs[row, outside].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_can_be_kept_and_a_second_derivative_is_refused(dtype):
    student = random_logits(0, 4, 9).to(dtype).requires_grad_()
    targets = TopKTargets.from_logits(random_logits(1, 4, 9).float(), 3)
    loss = forward_kl(student, targets)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(3)]
    gradients.append(torch.autograd.grad(2 * loss, student)[0] / 2)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(forward_kl(student, targets), student, create_graph=True)


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_do_not_count_do_not_matter(function, bad):
    zt, zs = random_logits(0, 2, 4, 9), random_logits(1, 2, 4, 9)
    labels = torch.randint(9, (2, 4), generator=generator(2))
    mask = torch.tensor([[True, True, False, False], [True, False, False, True]])
    topk = TopKTargets.from_logits(zt, 3, labels=labels)
    spoiled = TopKTargets(
        vocab_size=9,
        ids=topk.ids.masked_fill(~mask[..., None], -1),
        logprobs=topk.logprobs.masked_fill(~mask[..., None], bad),
        log_tail=topk.log_tail.masked_fill(~mask, bad),
    )
    spoiled_student = zs.masked_fill(~mask[..., None], bad)
    pairs = [(topk, spoiled)]
    if function is not cross_entropy:
        dense_bad = zt.masked_fill(~mask[..., None], bad)
        pairs.append((DenseTargets.from_logits(zt), DenseTargets.from_logits(dense_bad)))
    for good, spoiled_targets in pairs:
        want, want_gradient = value_and_gradient(function, zs, good, labels=labels, mask=mask)
        for reduction in ("mean", "sum", "none"):
            options = {"mask": mask, "reduction": reduction}
            leaf = spoiled_student.clone().requires_grad_()
            value = function(
                leaf, spoiled_targets, labels=labels.masked_fill(~mask, -100), **options
            )
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            assert (gradient[~mask] == 0).all()
            scale = 1 if reduction == "mean" else int(mask.sum())
            torch.testing.assert_close(gradient, want_gradient * scale)
            torch.testing.assert_close(value.sum(), want * scale)


def test_weighted_rows_that_do_not_count_do_not_matter():
    zs = random_logits(1, 3, 6)
    targets = SampledTargets(
        vocab_size=6,
        ids=torch.tensor([0, 2, 5, 1]),
        counts=torch.tensor([1, 3, 4, 4]),
        weights=torch.tensor([0.25, 0.75, torch.nan, 1.0], dtype=torch.float64),
        num_ids=torch.tensor([2, 1, 1]),
        rounds=4,
    )
    mask = torch.tensor([True, False, True])
    value, gradient = value_and_gradient(
        random_sampling_kd, zs.index_fill(0, torch.tensor([1]), torch.nan), targets, mask=mask
    )
    assert value.isfinite()
    assert (gradient[1] == 0).all()
    assert gradient[[0, 2]].isfinite().all()


@given(seed=seeds, function=st.sampled_from(LOSSES), missing=st.sampled_from(MISSING))
@settings(max_examples=60)
def test_invariances(seed, function, missing):
    """Shift of either side's logits, permuted vocabulary, padding, split batches."""
    num_rows, vocab, k = 4, 11, 3
    zt, zs = random_logits(seed, num_rows, vocab), random_logits(seed + 1, num_rows, vocab)
    labels = torch.randint(vocab, (num_rows,), generator=generator(seed))
    info = function.info
    options = {"labels": labels, "reduction": "sum"}
    if info.missing:
        options["missing"] = missing if missing in info.missing["topk"] else "ghost"
    want, want_gradient = value_and_gradient(
        function, zs, TopKTargets.from_logits(zt, k), **options
    )

    shifts = random_logits(seed + 2, num_rows, 1, scale=50.0)
    shifted = value_and_gradient(
        function, zs + shifts, TopKTargets.from_logits(zt - shifts, k), **options
    )
    torch.testing.assert_close(shifted[0], want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(shifted[1], want_gradient, rtol=1e-7, atol=1e-10)

    order = torch.randperm(vocab, generator=generator(seed))
    place = order.argsort()
    permuted = value_and_gradient(
        function,
        zs[:, order],
        TopKTargets.from_logits(zt[:, order], k),
        **{**options, "labels": place[labels]},
    )
    torch.testing.assert_close(permuted[0], want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(permuted[1][:, place], want_gradient, rtol=1e-8, atol=1e-11)

    split = sum(
        function(
            zs[half], TopKTargets.from_logits(zt[half], k), **{**options, "labels": labels[half]}
        )
        for half in (slice(0, 1), slice(1, None))
    )
    torch.testing.assert_close(split, want, rtol=1e-9, atol=1e-10)

    padded_student = torch.cat([zs, random_logits(seed + 3, 2, vocab)])
    padded = TopKTargets.from_logits(torch.cat([zt, random_logits(seed + 4, 2, vocab)]), k)
    padded_labels = torch.cat([labels, torch.tensor([-100, -100])])
    value, count = function(
        padded_student, padded, **{**options, "labels": padded_labels}, with_count=True
    )
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10)
    assert count == num_rows


def test_sum_and_count_make_accumulation_exact():
    zt, zs = random_logits(0, 6, 9), random_logits(1, 6, 9)
    mask = torch.tensor([True, False, False, True, True, True])
    whole = forward_kl(zs, TopKTargets.from_logits(zt, 3), mask=mask)
    parts = [
        forward_kl(
            zs[part],
            TopKTargets.from_logits(zt[part], 3),
            mask=mask[part],
            reduction="sum",
            with_count=True,
        )
        for part in (slice(0, 3), slice(3, 6))
    ]
    total = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    torch.testing.assert_close(total, whole)
    assert [int(count) for _, count in parts] == [1, 3]


def test_shapes_and_masks_are_checked():
    zs = random_logits(0, 2, 5, 9)
    targets = TopKTargets.from_logits(random_logits(1, 2, 5, 9), 3)
    cases = {
        "targets": (zs.transpose(0, 1), targets, {}),
        "mask": (zs, targets, {"mask": torch.ones(2, 4).bool()}),
        "labels": (zs, targets, {"labels": torch.zeros(10).long()}),
    }
    for name, (student, these, options) in cases.items():
        with pytest.raises(TargetsError, match=name) as error:
            forward_kl(student, these, **options)
        assert error.value.kind == "shape-mismatch"
    with pytest.raises(TargetsError, match="no position counts") as error:
        forward_kl(zs, targets, mask=torch.zeros(2, 5).bool())
    assert error.value.kind == "empty-mask"
    with pytest.raises(UsageError, match="mean, sum or none"):
        forward_kl(zs, targets, reduction="batchmean")


@pytest.mark.parametrize("missing", ["ghost", "uniform"])
def test_torch_compile_keeps_one_graph(missing):
    zt, zs = random_logits(0, 2, 3, 20), random_logits(1, 2, 3, 20)
    labels = torch.randint(20, (2, 3), generator=generator(0))
    targets = TopKTargets.from_logits(zt, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def train_loss(z):
        return sparse_kd_with_ce(z, targets, labels=labels, mask=mask, missing=missing)

    compiled = torch.compile(train_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, zs), value_and_gradient(train_loss, zs))


# The compiler looks at .grad of what it carries over a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile_accepts_ragged_targets():
    p = log_softmax64(random_logits(0, 4, 9)).exp()
    ids = p.topk(3, -1).indices
    targets = SampledTargets.from_counts(
        ids.reshape(2, 2, 3), torch.ones(2, 2, 3).long(), rounds=3, vocab_size=9
    )
    zs = random_logits(1, 2, 2, 9)
    compiled = torch.compile(lambda z: random_sampling_kd(z, targets), backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, zs), value_and_gradient(random_sampling_kd, zs, targets)
    )


def test_extra_memory_is_one_copy_of_the_logits(monkeypatch):
    """Counts the [R, V] tensors that forward and backward allocate."""
    num_rows, vocab = 64, 4096
    student = random_logits(0, num_rows, vocab).float().requires_grad_()
    targets = TopKTargets.from_logits(random_logits(1, num_rows, vocab).float(), 8)
    labels = torch.zeros(num_rows, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        sparse_kd_with_ce(student, targets, labels=labels).backward()
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    )
    assert allocated <= 1.1 * student.numel() * 4
