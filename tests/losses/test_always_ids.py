"""Control tokens stored at every position: part of the list wherever a loss can use them.

Letters: B samples, T positions, V vocabulary, K kept ids, A always-ids.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from logitstore import losses
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import PAD_ID, TopKTargets
from tests.losses.cases import random_logits, value_and_gradient
from tests.losses.laws import (
    TEMPERATURES,
    B,
    K,
    T,
    V,
    dense_targets,
    some_labels,
    threshold_targets,
    topk_targets,
)

ALWAYS = torch.tensor([7, 0, 4])
LABELS = some_labels()


def log_p():
    return dense_targets().logprobs


def beside(targets, always_ids=ALWAYS):
    """The same record with always-ids."""
    logprobs = log_p()[..., always_ids]
    if targets.lengths is not None:
        logprobs = logprobs.flatten(0, 1)
    return dataclasses.replace(targets, always_ids=always_ids, always_logprobs=logprobs)


def written_out(k=K):
    """The list of K and the always-ids as one padded list, in descending order, row by row."""
    full = topk_targets(LABELS, V)
    ids = torch.full((B, T, k + len(ALWAYS)), PAD_ID)
    logprobs = torch.full(ids.shape, -torch.inf, dtype=torch.float64)
    log_tail = torch.full((B, T), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            row = log_p()[b, t]
            order = row.argsort(descending=True).tolist()
            held = [i for i in order if i in order[:k] or i in ALWAYS.tolist()]
            ids[b, t, : len(held)] = torch.tensor(held)
            logprobs[b, t, : len(held)] = row[held]
            log_tail[b, t] = row[[i for i in order if i not in held]].logsumexp(-1)
    return dataclasses.replace(full, ids=ids, logprobs=logprobs, log_tail=log_tail)


USES_THEM = {
    "ttm, uniform": functools.partial(losses.ttm, temperature=2.0),
    "ttm, ghost": functools.partial(losses.ttm, temperature=2.0, missing="ghost"),
    "ttm, estimate": functools.partial(losses.ttm, gamma=0.5, missing="uniform_estimate"),
    "ttm, renormalize": functools.partial(losses.ttm, gamma=0.5, missing="renormalize"),
    "wttm": functools.partial(losses.wttm, temperature=2.0),
    "kd_partial": losses.kd_partial,
    "kd_partial, T = 2": functools.partial(losses.kd_partial, temperature=2.0),
    "dual_head": losses.dual_head,
    "topkd": functools.partial(losses.topkd, k=3),
    "llp_rank": losses.llp_rank,
    "llp_distribution": losses.llp_distribution,
    "sinkhorn": losses.sinkhorn,
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.jsd,
    "tvd": losses.tvd,
}


@pytest.mark.parametrize("name", USES_THEM)
def test_a_list_with_always_ids_is_the_longer_list(name):
    student = random_logits(9, B, T, V)
    got = value_and_gradient(USES_THEM[name], student, beside(topk_targets(LABELS)), labels=LABELS)
    want = value_and_gradient(USES_THEM[name], student, written_out(), labels=LABELS)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kd_partial", "dual_head", "llp_rank", "llp_distribution", "pld"])
def test_a_head_takes_its_always_ids_in_their_place(name):
    """A head without some probable ids, which are always-ids, is the head with them."""
    whole = threshold_targets(LABELS)
    entry = torch.arange(len(whole.ids))
    position = whole.position_of_entry()
    first = torch.searchsorted(position, torch.arange(B * T))
    # Each position's second entry leaves the head; all such ids are always-ids.
    removed = first + 1
    always = whole.ids[removed].unique()
    keep = ~(whole.head_mask() & torch.isin(whole.ids, always))
    num_removed = torch.bincount(position[~keep], minlength=B * T)
    cut = dataclasses.replace(
        whole,
        ids=whole.ids[keep],
        weights=whole.weights[keep],
        num_ids=whole.num_ids - num_removed,
        num_heads=whole.num_heads - num_removed,
    )
    assert len(cut.ids) < len(entry)
    cut = beside(cut, always)
    # The same list, written out: heads of V slots in descending order.
    log_p_NV = log_p().flatten(0, 1)
    ids = torch.full((B * T, V), PAD_ID)
    logprobs = torch.full((B * T, V), -torch.inf, dtype=torch.float64)
    start = 0
    for n, (size, heads) in enumerate(zip(cut.num_ids, cut.num_heads, strict=True)):
        held = {*cut.ids[start : start + heads].tolist(), *always.tolist()}
        start += size
        order = [i for i in log_p_NV[n].argsort(descending=True).tolist() if i in held]
        ids[n, : len(order)] = torch.tensor(order)
        logprobs[n, : len(order)] = log_p_NV[n, order]
    shared = topk_targets(LABELS)
    log_rest = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1)).view(B, T)
    written = dataclasses.replace(
        shared, ids=ids.view(B, T, V), logprobs=logprobs.view(B, T, V), log_tail=log_rest
    )
    cut = dataclasses.replace(cut, log_tail=log_rest.flatten())
    function = losses.LOSSES[name].function
    student = random_logits(9, B, T, V)
    got = value_and_gradient(function, student, cut, labels=LABELS)
    want = value_and_gradient(function, student, written, labels=LABELS)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        losses.pld,
        functools.partial(losses.kd_partial, k=4),
        functools.partial(losses.gld, k=4),
        functools.partial(losses.topk_wasserstein, k=4),
        losses.uld,
    ],
)
def test_losses_over_ranks_leave_a_list_as_it_is(function):
    student, targets = random_logits(9, B, T, V), topk_targets(LABELS)
    got = function(student, beside(targets), labels=LABELS)
    torch.testing.assert_close(got, function(student, targets, labels=LABELS), rtol=1e-12, atol=0)


def test_the_k_largest_are_not_looked_for_among_always_ids():
    with pytest.raises(UsageError, match=r"1\.\.5"):
        losses.kd_partial(
            random_logits(9, B, T, V), beside(topk_targets(LABELS)), labels=LABELS, k=K + 1
        )


@pytest.mark.parametrize("function", [losses.gld, losses.topk_wasserstein])
def test_a_head_without_its_always_ids_does_not_rank(function):
    with pytest.raises(TargetsError, match="3 always-ids") as error:
        function(random_logits(9, B, T, V), beside(threshold_targets(LABELS)), labels=LABELS, k=2)
    assert error.value.kind == "targets-mismatch"


def test_one_sided_tail_still_lies_between_none_and_dense():
    student = random_logits(9, B, T, V, scale=5.0)
    stored = beside(TopKTargets.from_logits(dense_targets().logits, 3))
    value = functools.partial(losses.dual_head, student, reduction="none")
    none, one_sided = value(stored), value(stored, missing="one_sided")
    exact = value(dense_targets())
    assert (none <= one_sided + 1e-12).all()
    assert (one_sided <= exact + 1e-12).all()
    assert (none < one_sided).any()


@pytest.mark.parametrize(
    "function",
    [losses.forward_kl, losses.kd_partial, losses.pld, losses.sinkhorn],
    ids=["forward_kl", "kd_partial", "pld", "sinkhorn"],
)
def test_a_rounded_temperature_is_the_stored_one(function):
    """--lse-at 3.3333333 serves T = 10 / 3."""
    name = "teacher_temperature" if function is losses.pld else "temperature"
    targets = topk_targets(LABELS)
    rounded = dataclasses.replace(targets, lse_at={3.3333333: targets.lse_at[TEMPERATURES[2]]})
    student = random_logits(9, B, T, V)
    want = function(student, targets, labels=LABELS, **{name: 10 / 3})
    assert function(student, rounded, labels=LABELS, **{name: 10 / 3}) == want
    with pytest.raises(TargetsError, match=r"--lse-at 3.334"):
        function(student, rounded, labels=LABELS, **{name: 3.334})
