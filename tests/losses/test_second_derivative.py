"""A second derivative is exact or refused, never passed off as zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from logitstore import losses
from logitstore.spec.errors import UsageError
from logitstore.targets import SampledTargets
from tests.losses.cases import random_logits
from tests.losses.laws import (
    B,
    T,
    V,
    dense_targets,
    scores_targets,
    some_labels,
    threshold_targets,
    topk_targets,
)

LABELS = some_labels()
BYTE_END = torch.arange(T).expand(B, T)
OPTIONS = {
    "gld": {"k": 2},
    "gold": {"byte_end": BYTE_END, "target_labels": LABELS},
    "kd_partial": {"k": 3},
    "topk_wasserstein": {"k": 2},
    "ttm": {"temperature": 2.0},
    "wttm": {"temperature": 2.0},
}


def targets_of(signal):
    if signal == "sampled":
        ids = torch.arange(3).expand(B, T, 3)
        return SampledTargets.from_counts(ids, torch.ones_like(ids), rounds=3, vocab_size=V)
    if signal == "threshold":
        return threshold_targets(LABELS)
    if signal == "scores":
        return scores_targets()
    targets = topk_targets(LABELS) if signal == "topk" else dense_targets()
    return dataclasses.replace(targets, byte_end=BYTE_END)


CASES = [
    (name, signal)
    for name, info in sorted(losses.LOSSES.items())
    for signal in info.signals
    if signal != "graph"
]


@pytest.mark.parametrize(("name", "signal"), CASES)
def test_exact_or_refused(name, signal):
    options = dict(OPTIONS.get(name, {}))
    if name == "kd_partial" and signal == "sampled":
        options = {"kind": "pt"}
    targets = targets_of(signal)
    if name == "kd_partial" and signal == "sampled":
        scalars = topk_targets(LABELS).label_logprob.flatten()
        targets = dataclasses.replace(targets, label_logprob=scalars)
    student = random_logits(9, B, T, V)
    direction = random_logits(10, B, T, V, scale=1.0)

    def gradient(z, create_graph=False):
        leaf = z.clone().requires_grad_()
        value = losses.LOSSES[name].function(leaf, targets, labels=LABELS, **options)
        return leaf, torch.autograd.grad(value, leaf, create_graph=create_graph)[0]

    try:
        leaf, first = gradient(student, create_graph=True)
    except UsageError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "no second derivative" in refusal
        return
    step = 1e-5
    want = (gradient(student + step * direction)[1] - gradient(student - step * direction)[1]) / (
        2 * step
    )
    product = (first * direction).sum()
    got = torch.zeros_like(leaf)
    if product.requires_grad:
        if (name, signal) == ("sinkhorn", "dense"):
            with pytest.raises(NotImplementedError, match="cdist"):
                torch.autograd.grad(product, leaf)
            return
        (second,) = torch.autograd.grad(product, leaf, allow_unused=True)
        got = got if second is None else second
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
