"""Every registered loss as a torch.nn.Module: options in the constructor, tensors in the call.

`ForwardKL(missing="ghost", temperature=2.0)(student_logits, targets, mask=mask)` is
`forward_kl(student_logits, targets, mask=mask, missing="ghost", temperature=2.0)`. With `header=`,
the header of the store to train from, the constructor refuses what the store cannot serve, so that
a run fails before its first batch.

Classes are named after their functions: `random_sampling_kd` is `RandomSamplingKD`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from logitstore.losses.contract import LOSSES, LossAndCount, LossInfo
from logitstore.losses.fused_linear import fused_linear_kd
from logitstore.spec.errors import LogitstoreError, UsageError
from logitstore.targets import (
    DenseTargets,
    GraphTargets,
    SampledTargets,
    ScoresTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
)

__all__ = ["FusedLinearKD", "LossModule", "StoreHeader", "class_name", "module_names"]

_UPPER = ("ce", "gld", "jsd", "kd", "kl", "llp", "pld", "sft", "ttm", "tvd", "uld", "wttm")
# Given with each batch, never fixed at construction.
_PER_CALL = frozenset({"student_logits", "targets", "labels", "mask", "hidden", "lm_head_weight"})
# What a store, as opposed to a batch, can lack.
_STORE_KINDS = frozenset(
    {"aux-missing", "missing-not-allowed", "not-retemperable", "targets-mismatch"}
)


class StoreHeader(Protocol):
    """What a store's header says about its records."""

    @property
    def signal(self) -> Any: ...

    @property
    def stored_fields(self) -> tuple[str, ...]: ...

    @property
    def lse_at(self) -> tuple[float, ...]: ...


class LossModule(nn.Module):
    """A loss with its options fixed.

    Args:
        header: header of the store to train from; checks at construction that every field the loss
            needs with these options is stored. The error names the capture flag.
        options: keyword options of the function, checked by name.

    Raises: UsageError bad-argument for an unknown option; TargetsError aux-missing,
        missing-not-allowed, not-retemperable or targets-mismatch from the check against `header`.
    """

    info: LossInfo
    function: Callable[..., Any]

    def __init__(self, *, header: StoreHeader | None = None, **options: Any) -> None:
        super().__init__()
        known = _options_of(self.function)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UsageError(
                "bad-argument",
                f"{type(self).__name__} has no option {unknown[0]!r}",
                got=", ".join(unknown),
                expected=", ".join(known),
            )
        self.options = options
        if header is not None:
            _check_store(self.function, options, header)

    def forward(
        self, student_logits: Tensor, targets: Targets, **batch: Any
    ) -> Tensor | LossAndCount:
        """The loss of a batch; `batch` holds labels, mask and whatever else changes with it."""
        result: Tensor | LossAndCount = type(self).function(
            student_logits, targets, **{**self.options, **batch}
        )
        return result

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearKD(LossModule):
    """`fused_linear_kd` with its options fixed; called with hidden states and the head's weight."""

    function = staticmethod(fused_linear_kd)

    def __init__(self, *, header: StoreHeader | None = None, **options: Any) -> None:
        super().__init__(header=None, **options)
        if header is not None:
            # The unfused loss needs the same of the store.
            unfused = {k: v for k, v in options.items() if k not in ("bias", "group")}
            _check_store(_checked("sparse_kd_with_ce"), unfused, header)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, lm_head_weight: Tensor, targets: Targets, **batch: Any
    ) -> Tensor | LossAndCount:
        """The loss of a batch; `batch` holds labels, mask and bias."""
        return fused_linear_kd(hidden, lm_head_weight, targets, **{**self.options, **batch})


def class_name(name: str) -> str:
    """forward_kl -> ForwardKL."""
    return "".join(p.upper() if p in _UPPER else p[0].upper() + p[1:] for p in name.split("_"))


def module_names() -> dict[str, str]:
    """Class name -> function name, for every registered loss."""
    return {class_name(name): name for name in LOSSES}


_CLASSES: dict[str, type[LossModule]] = {}


def __getattr__(name: str) -> type[LossModule]:
    """Classes are made when first asked for, from whatever is registered then."""
    if name not in _CLASSES:
        function_name = module_names().get(name)
        if function_name is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        function = _checked(function_name)
        _CLASSES[name] = type(
            name,
            (LossModule,),
            {
                "__doc__": f"`{function_name}` with its options fixed.\n\n{function.__doc__}",
                "__module__": __name__,
                "function": staticmethod(function),
                "info": LOSSES[function_name],
            },
        )
    return _CLASSES[name]


def __dir__() -> list[str]:
    return sorted([*__all__, *module_names()])


def _checked(name: str) -> Callable[..., Any]:
    """The function as users call it, with the checks of `@loss`."""
    function = LOSSES[name].function
    assert function is not None
    return function


def _options_of(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _PER_CALL]


def _check_store(
    function: Callable[..., Any], options: dict[str, Any], header: StoreHeader
) -> None:
    """Call the loss on two made-up positions that hold what the store holds.

    So the checks at construction are those of the call, for every loss and every option. What the
    made-up batch itself lacks (a table, byte offsets of the student) is no fault of the store.
    """
    targets = _example(header)
    student_logits = torch.zeros(1, 2, targets.vocab_size)
    labels = torch.full((1, 2), targets.vocab_size - 1)
    try:
        with torch.no_grad():
            function(student_logits, targets, labels=labels, **options)
    except LogitstoreError as error:
        if error.kind in _STORE_KINDS:
            raise


def _example(header: StoreHeader) -> Targets:
    """Targets of [1, 2] positions with the signal and the fields of a store.

    The last id is the label: no list holds it, so that a missing `label_logprob` is found.
    """
    k = int(getattr(header.signal, "k", None) or 16)
    vocab = k + 8
    logits = torch.linspace(2.0, -2.0, vocab).expand(1, 2, -1)
    full = TopKTargets.from_logits(
        logits,
        k,
        labels=torch.full((1, 2), vocab - 1),
        temperatures=header.lse_at,
    )
    available = {
        "label_logprob": full.label_logprob,
        "label_rank": full.label_rank,
        "entropy": full.entropy,
        "top1_logprob": full.logprobs[..., 0],
        "log_tail": full.log_tail,
        "lse": full.lse,
        "logit_mean": full.logit_mean,
        "byte_end": torch.tensor([[1, 2]]),
    }
    fields: dict[str, Any] = {
        name: value for name, value in available.items() if name in header.stored_fields
    }
    fields["lse_at"] = full.lse_at
    log_tail = fields.pop("log_tail", None)
    kind = header.signal.kind
    if kind == "dense":
        return DenseTargets(vocab_size=vocab, logits=logits, **fields)
    if kind == "topk":
        return TopKTargets(
            vocab_size=vocab, ids=full.ids, logprobs=full.logprobs, log_tail=log_tail, **fields
        )
    if kind == "scores":
        return ScoresTargets(vocab_size=vocab, ids=full.ids, scores=logits[..., :k], **fields)
    if kind == "graph":
        return GraphTargets(
            vocab_size=vocab,
            row_sums=torch.ones(1, k),
            coactivation=torch.ones(1, k, k),
            num_positions=torch.tensor([2]),
            num_segments=torch.tensor([1]),
            lengths=torch.tensor([2]),
        )
    # Weighted targets are flat.
    flat = {name: x.reshape(-1) for name, x in fields.items() if name != "lse_at"}
    entries: dict[str, Any] = {
        "vocab_size": vocab,
        "lengths": torch.tensor([2]),
        "ids": full.ids.reshape(-1),
        "weights": full.logprobs.exp().reshape(-1),
        "num_ids": torch.tensor([k, k]),
        **flat,
    }
    if kind == "sampled":
        return SampledTargets(**entries, counts=torch.ones(2 * k, dtype=torch.int64), rounds=k)
    assert full.log_tail is not None
    return ThresholdTargets(
        **entries, num_heads=torch.tensor([k, k]), log_tail=full.log_tail.reshape(-1)
    )
