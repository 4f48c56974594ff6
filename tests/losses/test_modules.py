"""nn.Module forms: same numbers as the functions, and a store that cannot serve refused at once."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
import torch

from logitstore import losses
from logitstore.losses.modules import module_names
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import TopKTargets
from tests.losses.cases import random_logits

ALL_FIELDS = (
    "label_logprob",
    "label_rank",
    "entropy",
    "top1_logprob",
    "log_tail",
    "lse",
    "logit_mean",
    "byte_end",
)


# (loss, signal) -> options without which the loss does not take the signal
NEEDED_OPTIONS = {("kd_partial", "sampled"): {"kind": "ls"}}


@dataclass
class Signal:
    kind: str
    k: int = 12


@dataclass
class Header:
    signal: Signal
    stored_fields: tuple[str, ...] = ()
    lse_at: tuple[float, ...] = field(default=())


def header(kind: str, *fields: str, lse_at: tuple[float, ...] = ()) -> Header:
    return Header(Signal(kind), fields, lse_at)


def test_a_module_is_its_function():
    zs, zt = random_logits(0, 2, 3, 9), random_logits(1, 2, 3, 9)
    labels = torch.zeros(2, 3, dtype=torch.long)
    targets = TopKTargets.from_logits(zt, 4, temperatures=[2.0])
    module = losses.ForwardKL(missing="label", temperature=2.0)
    want = losses.forward_kl(zs, targets, labels=labels, missing="label", temperature=2.0)
    assert module(zs, targets, labels=labels) == want
    assert repr(module) == "ForwardKL(missing='label', temperature=2.0)"
    again = pickle.loads(pickle.dumps(module))  # noqa: S301 (our own bytes)
    assert again(zs, targets, labels=labels) == want
    fused = losses.FusedLinearKD(ce_weight=0.0, kd_weight=1.0)
    head = random_logits(2, 9, 5)
    hidden = random_logits(3, 2, 3, 5)
    want = losses.forward_kl(hidden @ head.t(), targets)
    torch.testing.assert_close(fused(hidden, head, targets), want)


def test_every_loss_has_a_class_and_aliases_point_at_one_function():
    seen = set(losses.LOSSES)
    for class_name, name in module_names().items():
        module_class = getattr(losses, class_name)
        assert module_class.__name__ == class_name
        assert issubclass(module_class, torch.nn.Module)
        for alias in losses.LOSSES[name].aliases:
            assert alias not in seen
            seen.add(alias)
            assert getattr(losses, alias) is getattr(losses, name)
    with pytest.raises(AttributeError, match="no_such_loss"):
        _ = losses.no_such_loss


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_store_with_everything_serves_every_signal_a_loss_declares(name):
    info = losses.LOSSES[name]
    module_class = getattr(losses, {v: k for k, v in module_names().items()}[name])
    for kind in info.signals:
        options = NEEDED_OPTIONS.get((name, kind), {})
        module_class(header=header(kind, *ALL_FIELDS, lse_at=(2.0,)), **options)
    for kind in {"dense", "topk", "sampled", "threshold", "scores", "graph"} - set(info.signals):
        with pytest.raises(TargetsError) as error:
            module_class(header=header(kind, *ALL_FIELDS, lse_at=(2.0,)))
        assert error.value.kind == "targets-mismatch"


@pytest.mark.parametrize(
    ("make", "store", "message", "kind"),
    [
        (
            lambda h: losses.ForwardKL(header=h),
            header("topk", "lse"),
            "--aux log_tail",
            "aux-missing",
        ),
        (
            lambda h: losses.ForwardKL(header=h, temperature=2.0),
            header("topk", "lse", "log_tail", lse_at=(4.0,)),
            "--lse-at 2.0",
            "aux-missing",
        ),
        (
            lambda h: losses.ForwardKL(header=h, temperature=2.0),
            header("topk", "log_tail", lse_at=(2.0,)),
            "--aux lse",
            "aux-missing",
        ),
        (
            lambda h: losses.ForwardKL(header=h, temperature=2.0),
            header("sampled", "entropy"),
            "captured temperature only",
            "not-retemperable",
        ),
        (
            lambda h: losses.ReverseKL(header=h, missing="none"),
            header("topk", "log_tail"),
            "ghost, renormalize_both",
            "missing-not-allowed",
        ),
        (
            lambda h: losses.RandomSamplingKD(header=h, value="unbiased"),
            header("sampled"),
            "--aux entropy",
            "aux-missing",
        ),
        (
            lambda h: losses.FusedLinearKD(header=h),
            header("topk"),
            "--aux log_tail",
            "aux-missing",
        ),
        (lambda h: losses.TTM(header=h), header("sampled"), "from sampled", "targets-mismatch"),
    ],
)
def test_what_a_store_lacks_is_refused_at_construction(make, store, message, kind):
    with pytest.raises(TargetsError, match=message) as error:
        make(store)
    assert error.value.kind == kind


def test_unknown_options_are_refused():
    with pytest.raises(UsageError, match="temprature") as error:
        losses.ForwardKL(temprature=2.0)
    assert "temperature" in str(error.value)
    with pytest.raises(UsageError, match="no option 'labels'"):
        losses.ForwardKL(labels=None)
