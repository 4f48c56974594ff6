"""Losses on what a store gives back: header checks, padding, and nearness to the teacher itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import logitstore as ls
from logitstore import losses
from logitstore.spec.errors import TargetsError
from logitstore.targets import DenseTargets
from tests.losses.cases import random_logits

LENGTHS = (16, 9, 16, 5)
VOCAB = 60


@pytest.fixture
def teacher():
    """Tokens and logits [T, V] of each sample."""
    rng = np.random.default_rng(0)
    logits = [random_logits(i, length, VOCAB).float() for i, length in enumerate(LENGTHS)]
    return [(rng.integers(0, VOCAB, len(x)), x) for x in logits]


def batch_of(tmp_path, signal, teacher):
    with ls.writer(tmp_path / "store", signal=signal, vocab_size=VOCAB) as writer:
        for tokens, logits in teacher:
            writer.add(tokens, logits)
    dataset = ls.LogitDataset(tmp_path / "store")
    return ls.open(tmp_path / "store").header, ls.collate([dataset[i] for i in range(len(dataset))])


def full_loss(function, student, teacher, mask):
    dense = torch.zeros(*student.shape)
    for row, (_, logits) in enumerate(teacher):
        dense[row, : len(logits)] = logits
    leaf = student.clone().requires_grad_()
    value = function(leaf, DenseTargets.from_logits(dense), mask=mask)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("signal", ["topk:60", "topk:12", "sampled:2000", "threshold:tau=1/1000"])
def test_training_from_a_store_is_near_training_from_the_teacher(tmp_path, signal, teacher):
    header, batch = batch_of(tmp_path, signal, teacher)
    loss = losses.ForwardKL(header=header)
    student = random_logits(9, len(LENGTHS), max(LENGTHS), VOCAB).float()
    leaf = student.clone().requires_grad_()
    value = loss(leaf, batch.targets, mask=batch.loss_mask)
    (gradient,) = torch.autograd.grad(value, leaf)
    want, want_gradient = full_loss(losses.forward_kl, student, teacher, batch.loss_mask)
    assert (gradient[~batch.loss_mask] == 0).all()
    distance = (gradient - want_gradient).abs().sum()
    if signal == "topk:12":
        tail_mass = batch.targets.padded().log_tail.exp() * batch.loss_mask
        assert distance <= 2.02 * tail_mass.sum() / batch.loss_mask.sum()
    else:
        # float16 log-probs; noise of 2,000 draws; noise below 1/1000.
        limit = {"topk:60": 2e-3, "sampled:2000": 0.05, "threshold:tau=1/1000": 0.02}[signal]
        assert distance <= limit * want_gradient.abs().sum()
    if signal.startswith("topk"):
        assert value <= want * (1 + 2e-3)
        assert value >= want * 0.8

    merged = losses.sparse_kd_with_ce(
        leaf, batch.targets, labels=batch.labels, mask=batch.loss_mask, ce_weight=0.2, kd_weight=0.8
    )
    ce = losses.cross_entropy(leaf, batch.targets, labels=batch.labels, mask=batch.loss_mask)
    torch.testing.assert_close(merged, 0.2 * ce + 0.8 * value)


def test_the_header_of_a_real_store_is_checked(tmp_path, teacher):
    header, _ = batch_of(tmp_path, "topk:12", teacher)
    with pytest.raises(TargetsError, match="--lse-at 2") as error:
        losses.ForwardKL(header=header, temperature=2.0)
    assert error.value.kind == "aux-missing"
