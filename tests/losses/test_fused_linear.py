"""LM head and loss in one: same numbers as the two in sequence, without the logits of all
positions."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses import cross_entropy, forward_kl, fused_linear_kd, sparse_kd_with_ce
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets
from tests.losses.cases import generator, log_softmax64, random_logits, seeds

FUSED = inspect.getmodule(fused_linear_kd)
MISSING = ("ghost", "renormalize", "none", "uniform", "uniform_all", "label")


def make_case(seed, leading=(2, 6), hidden_size=5, vocab=17, teacher_vocab=17):
    hidden = random_logits(seed, *leading, hidden_size, scale=1.0)
    weight = random_logits(seed + 1, vocab, hidden_size, scale=1.0)
    bias = random_logits(seed + 2, vocab, scale=1.0)
    zt = random_logits(seed + 3, *leading, teacher_vocab)
    labels = torch.randint(teacher_vocab, leading, generator=generator(seed))
    mask = torch.rand(leading, generator=generator(seed)) > 0.4
    mask[..., 0] = True
    return hidden, weight, bias, zt, labels, mask


def make_targets(kind, zt, k=4):
    if kind == "topk":
        return TopKTargets.from_logits(zt, k)
    p = log_softmax64(zt).exp()
    top = p.topk(k, -1)
    if kind == "sampled":
        counts = torch.arange(1, k + 1).expand_as(top.indices)
        return SampledTargets.from_counts(
            top.indices, counts, rounds=k * (k + 1) // 2, vocab_size=zt.shape[-1]
        )
    num = zt.shape[:-1].numel()
    weights = top.values.clone()
    weights[..., -1] = 1 - weights[..., :-1].sum(-1)
    return ThresholdTargets(
        vocab_size=zt.shape[-1],
        lengths=torch.full((zt.shape[0],), zt.shape[1]),
        ids=top.indices.flatten(),
        weights=weights.flatten(),
        num_ids=torch.full((num,), k),
        num_heads=torch.full((num,), k - 1),
        log_tail=weights[..., -1].flatten().log(),
    )


def gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@given(
    seed=seeds,
    kind=st.sampled_from(["topk", "sampled", "threshold"]),
    missing=st.sampled_from(MISSING),
    weights=st.sampled_from([(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)]),
    reduction=st.sampled_from(["mean", "sum"]),
    rows_at_a_time=st.sampled_from([1, 4, 100]),
    padded_vocab=st.sampled_from([17, 20]),
)
@settings(max_examples=60)
def test_value_and_gradients_are_the_unfused_ones(
    seed, kind, missing, weights, reduction, rows_at_a_time, padded_vocab
):
    hidden, weight, bias, zt, labels, mask = make_case(seed, vocab=padded_vocab)
    targets = make_targets(kind, zt)
    ce_weight, kd_weight = weights
    options = {"mask": mask, "reduction": reduction}
    shared = {"ce_weight": ce_weight, "kd_weight": kd_weight, "missing": missing}

    def unfused(h, w, b):
        logits = h @ w.t() + b
        loss = ce_weight * cross_entropy(logits, targets, labels=labels, **options)
        return loss + kd_weight * forward_kl(
            logits, targets, labels=labels, missing=missing, **options
        )

    def fused(h, w, b):
        return fused_linear_kd(h, w, targets, labels, bias=b, **shared, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FUSED, "chunk_rows", lambda *_: rows_at_a_time)
        got = gradients(fused, hidden, weight, bias)
    torch.testing.assert_close(got, gradients(unfused, hidden, weight, bias), rtol=1e-9, atol=1e-10)


def test_frozen_parts_and_kept_graphs():
    hidden, weight, _, zt, labels, mask = make_case(0)
    targets = make_targets("topk", zt)
    leaf = hidden.clone().requires_grad_()
    loss, count = fused_linear_kd(leaf, weight, targets, labels, mask=mask, with_count=True)
    assert count == mask.sum()
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    (third,) = torch.autograd.grad(3 * loss, leaf)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(3 * first, third)
    assert (first[~mask] == 0).all()
    with torch.no_grad():
        assert fused_linear_kd(leaf, weight, targets, labels, mask=mask) == loss
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(fused_linear_kd(leaf, weight, targets, labels), leaf, create_graph=True)


# The compiler looks at .grad of what it carries over a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile_leaves_it_as_it_is():
    hidden, weight, _, zt, labels, mask = make_case(0)
    targets = make_targets("topk", zt)

    def fused(h, w):
        return fused_linear_kd(h, w, targets, labels, mask=mask)

    compiled = torch.compile(fused, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled, hidden, weight), gradients(fused, hidden, weight)
    )


def test_gradcheck():
    hidden, weight, bias, zt, labels, mask = make_case(0, leading=(1, 3), vocab=7, teacher_vocab=7)
    targets = make_targets("topk", zt, k=3)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_linear_kd(h, w, targets, labels, bias=b, mask=mask), leaves
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_float32_sums(autocast):
    hidden, weight, _, zt, labels, mask = make_case(3, leading=(4, 16))
    targets = make_targets("topk", zt.float())
    inputs = (
        [hidden.float(), weight.float()] if autocast else [hidden.bfloat16(), weight.bfloat16()]
    )

    def fused(h, w):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused_linear_kd(h, w, targets, labels, mask=mask)

    value, (grad_hidden, grad_weight) = gradients(fused, *inputs)
    want, (want_hidden, want_weight) = gradients(
        lambda h, w: sparse_kd_with_ce(h @ w.t(), targets, labels=labels, mask=mask),
        *[x.bfloat16().double() for x in inputs],
    )
    assert value.dtype == torch.float32
    assert grad_hidden.dtype == inputs[0].dtype
    torch.testing.assert_close(value.double(), want, rtol=2e-2, atol=0)
    for got, exact in ((grad_hidden, want_hidden), (grad_weight, want_weight)):
        assert (got.double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_float16_gradients_wait_for_the_gradient_scaler():
    """1 / count and a flat student underflow in float16; a scaled loss must still get through."""
    hidden, weight, _, zt, labels, _ = make_case(5, leading=(16, 64))
    targets = make_targets("topk", zt.float())
    scale = 2.0**16

    def scaled(h, w):
        return scale * fused_linear_kd(1e-3 * h, w, targets, labels)

    _, (_, got) = gradients(scaled, hidden.half(), weight.half())
    _, (_, want) = gradients(scaled, hidden.half().double(), weight.half().double())
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=1e-3 * float(want.abs().max()))


def test_rows_that_do_not_count_do_not_matter_even_as_nan():
    hidden, weight, _, zt, labels, mask = make_case(1)
    targets = make_targets("topk", zt)
    spoiled = hidden.masked_fill(~mask[..., None], torch.nan)

    def fused(h, w):
        return fused_linear_kd(h, w, targets, labels, mask=mask)

    torch.testing.assert_close(gradients(fused, spoiled, weight), gradients(fused, hidden, weight))


def test_no_tensor_as_large_as_the_logits_exists(monkeypatch):
    hidden, weight, _, zt, labels, _ = make_case(0, leading=(8, 32), vocab=2000)
    targets = make_targets("topk", zt)
    monkeypatch.setattr(FUSED, "chunk_rows", lambda *_: 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(lambda h, w: fused_linear_kd(h, w, targets, labels), hidden, weight)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 8 * 32 * 2000 * 8 / 8


def test_refusals():
    hidden, weight, _, zt, labels, _ = make_case(0)
    targets = make_targets("topk", zt)
    with pytest.raises(UsageError, match="reduces there"):
        fused_linear_kd(hidden, weight, targets, labels, reduction="none")
    with pytest.raises(TargetsError, match=r"lm_head_weight \[V, D\]"):
        fused_linear_kd(hidden, weight.t(), targets, labels)
    with pytest.raises(TargetsError, match="needs labels"):
        fused_linear_kd(hidden, weight, targets)
    with pytest.raises(TargetsError, match="needs sparse targets"):
        fused_linear_kd(hidden, weight, DenseTargets.from_logits(zt), labels)
    with pytest.raises(TargetsError, match="missing='renormalize_both'"):
        fused_linear_kd(hidden, weight, targets, labels, missing="renormalize_both")
    with pytest.raises(TargetsError, match="smaller than the teacher's"):
        fused_linear_kd(hidden, weight[:9], targets, labels)
    assert fused_linear_kd(hidden, weight, targets, ce_weight=0.0).isfinite()


# First ids and sizes of two ranks; the second case leaves one rank with 2 ids, all of which may be
# in a row's list, so that the rank has no tail of its own.
SPLITS = ((9, 8), (15, 2))


def _run_rank(rank: int, path: str) -> None:
    """Compares this rank's part with the unsharded loss; an exception here fails the test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = dist.group.WORLD
    # Chunks that need several rounds of collectives.
    FUSED.chunk_rows = lambda *_: 5
    try:
        for split in SPLITS:
            part = slice(0, split[0]) if rank == 0 else slice(split[0], None)
            for seed, kind, missing in [
                *((i, "topk", name) for i, name in enumerate(MISSING)),
                (7, "sampled", "ghost"),
                (8, "threshold", "ghost"),
            ]:
                hidden, weight, bias, zt, labels, mask = make_case(seed)
                # One row whose list holds all ids of the small shard.
                zt[0, 0, 15:] = 20.0
                targets = make_targets(kind, zt)

                def fused(h, w, b, group, targets=targets, labels=labels, mask=mask, m=missing):
                    return fused_linear_kd(
                        h, w, targets, labels, bias=b, mask=mask, missing=m, group=group
                    )

                want, (want_h, want_w, want_b) = gradients(
                    lambda h, w, b: fused(h, w, b, None), hidden, weight, bias
                )
                got, (got_h, got_w, got_b) = gradients(
                    lambda h, w, b: fused(h, w, b, group), hidden, weight[part], bias[part]
                )
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(got_h, want_h)
                torch.testing.assert_close(got_w, want_w[part])
                torch.testing.assert_close(got_b, want_b[part])
        _check_data_parallel(rank)
    finally:
        dist.destroy_process_group()


def _check_data_parallel(rank: int) -> None:
    """DDP over samples of unequal count: sum / global count gives the whole batch's gradient."""
    hidden, weight, _, zt, labels, mask = make_case(11)
    head = torch.nn.Linear(5, 17, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    model = torch.nn.parallel.DistributedDataParallel(head)
    mine = slice(rank, rank + 1)
    targets = make_targets("topk", zt[mine])
    loss, count = sparse_kd_with_ce(
        model(hidden[mine]),
        targets,
        labels=labels[mine],
        mask=mask[mine],
        reduction="sum",
        with_count=True,
    )
    everywhere = count.clone()
    dist.all_reduce(everywhere)
    # DDP averages gradients over the two ranks.
    (2 * loss / everywhere).backward()
    _, (want,) = gradients(
        lambda w: sparse_kd_with_ce(
            hidden @ w.t(), make_targets("topk", zt), labels=labels, mask=mask
        ),
        weight,
    )
    torch.testing.assert_close(head.weight.grad, want)


def test_vocabulary_shards_and_data_parallel_over_two_processes(tmp_path: Path):
    mp.spawn(_run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)
