"""What every loss declares and how every loss begins and ends.

A loss is a plain function

    loss(student_logits, targets, *, labels=None, mask=None, ..., reduction, with_count)

decorated with `@loss(...)`, which records what it accepts (`LossInfo`) and refuses the rest before
any arithmetic. Inside, `align` flattens student and targets to matching rows and `reduce` ends it,
so that masks, reductions, counts and error messages are the same everywhere.

Letters: R rows (all positions of the batch, padding included), V vocabulary, K kept ids.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, overload

import torch
from torch import Tensor

from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, ScoresTargets, Targets, TopKTargets, WeightedTargets
from logitstore.targets.dense import at_least_float32

__all__ = [
    "LOSSES",
    "MISSING",
    "LossAndCount",
    "LossFunction",
    "LossInfo",
    "Missing",
    "Reduction",
    "Rows",
    "align",
    "loss",
    "reduce",
    "require",
]

Reduction = Literal["mean", "sum", "none"]
# Treatments of the mass a top-K record does not hold; docs/losses/missing.md compares them.
Missing = Literal[
    "ghost", "renormalize", "renormalize_both", "none", "uniform", "uniform_all", "label"
]
MISSING: tuple[str, ...] = get_args(Missing)
Exactness = Literal["exact", "unbiased", "bounded", "approximate"]


class LossAndCount(NamedTuple):
    """A reduced loss and how many rows it counts, so that accumulation and DDP can divide once.

    `loss` is what `reduction` says; `count` int64 scalar. The exact mean over several batches or
    ranks is the sum of `loss` (reduction="sum") over the sum of `count`.
    """

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


@dataclass(frozen=True)
class LossInfo:
    """What a loss accepts, for checks, the compatibility matrix and the documentation pages.

    Attributes:
        name: canonical function name.
        signals: signal -> how exact the loss is from that record.
        missing: signal -> allowed values of `missing=`; absent when the loss has no such choice.
        needs: signal -> names of target fields it cannot do without (`lse`, `log_tail`, `lse_at`,
            ...).
        needs_labels: True when `labels` must be given.
        source: paper and section.
        aliases: other names the field uses.
        function: the function as users call it, with the checks of this declaration.
    """

    name: str
    signals: Mapping[str, Exactness]
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_labels: bool = False
    source: str = ""
    aliases: tuple[str, ...] = ()
    function: LossFunction | None = None

    def check_signal(self, signal: str) -> None:
        """Refuse a signal this loss has no meaning for."""
        if signal not in self.signals:
            raise TargetsError(
                "targets-mismatch",
                f"{self.name} cannot be computed from {signal} targets",
                got=signal,
                expected=", ".join(self.signals),
                hint=f"capture with one of these signals, or see docs/losses/{self.name}.md",
            )

    def check_missing(self, signal: str, missing: str) -> None:
        """Refuse a treatment of the missing mass that is infinite or meaningless here.

        Signals this loss names no choice for lack nothing: every treatment is the same there.
        """
        # A loss may name treatments of its own, such as uld's bucket and zero.
        if missing not in MISSING and not any(missing in own for own in self.missing.values()):
            raise UsageError(
                "bad-argument",
                f"{self.name}: unknown treatment of the missing mass",
                where="missing",
                got=missing,
                expected=", ".join(self.missing.get(signal, MISSING)),
            )
        allowed = self.missing.get(signal)
        if allowed is not None and missing not in allowed:
            raise TargetsError(
                "missing-not-allowed",
                f"{self.name} from {signal} targets has no finite, meaningful value "
                f"for missing={missing!r}",
                got=missing,
                expected=", ".join(allowed),
            )


# canonical name -> LossInfo; filled by `@loss` when a loss module is imported.
LOSSES: dict[str, LossInfo] = {}


class LossFunction(Protocol):
    """A declared loss as type checkers see it: a tensor unless `with_count` asks for the count.

    `inspect.signature` and help() show each loss's own options; a checker takes them as they come.
    """

    info: LossInfo
    __name__: str

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        targets: Targets,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = ...,
        with_count: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        targets: Targets,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = ...,
        with_count: Literal[True],
        **options: Any,
    ) -> LossAndCount: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        targets: Targets,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = ...,
        with_count: bool,
        **options: Any,
    ) -> Tensor | LossAndCount: ...


def loss(
    *,
    signals: Mapping[str, Exactness],
    missing: Mapping[str, tuple[str, ...]] | None = None,
    needs: Mapping[str, tuple[str, ...]] | None = None,
    needs_labels: bool = False,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Callable[[Callable[..., Tensor | LossAndCount]], LossFunction]:
    """Declare a loss: register it, and check targets, `missing=` and labels on each call."""

    def decorate(function: Callable[..., Tensor | LossAndCount]) -> LossFunction:
        info = LossInfo(
            name=function.__name__,
            signals=signals,
            missing=missing or {},
            needs=needs or {},
            needs_labels=needs_labels,
            source=source,
            aliases=aliases,
        )
        default_missing = inspect.signature(function).parameters.get("missing")

        @functools.wraps(function)
        def checked(student_logits: Tensor, targets: Targets, **options: Any) -> Any:
            info.check_signal(targets.signal)
            if default_missing is not None:
                chosen = options.get("missing", default_missing.default)
                if chosen is not None:
                    info.check_missing(targets.signal, chosen)
            for name in info.needs.get(targets.signal, ()):
                require(targets, name, info.name)
            if info.needs_labels and options.get("labels") is None:
                raise TargetsError(
                    "label-missing",
                    f"{info.name} needs labels",
                    expected="labels=batch.labels, int64 in the leading shape of student_logits",
                )
            return function(student_logits, targets, **options)

        declared = cast(LossFunction, checked)
        info = declared.info = LOSSES[info.name] = replace(info, function=declared)
        return declared

    return decorate


# field of the targets -> the capture flag that stores it
_CAPTURE_FLAG = {
    "lse": "--aux lse",
    "log_tail": "--aux log_tail",
    "label_logprob": "--aux label_logprob",
    "label_rank": "--aux label_rank",
    "entropy": "--aux entropy",
    "logit_mean": "--aux logit_mean",
    "byte_end": "--aux byte_end",
}


def require(
    targets: Targets, name: str, needed_by: str, *, temperature: float | None = None
) -> Tensor:
    """The field `name` (or `lse_at[temperature]`), or an error naming the capture flag.

    A stored temperature within 1e-6 (relative) is the same one, so that T = 1/gamma finds what was
    captured as a rounded decimal.
    """
    if temperature is not None:
        value = next(
            (x for t, x in targets.lse_at.items() if math.isclose(t, temperature, rel_tol=1e-6)),
            None,
        )
        if value is None:
            held = ", ".join(str(t) for t in targets.lse_at) or "none"
            raise TargetsError(
                "aux-missing",
                f"{needed_by} at temperature {temperature} needs lse_at[{temperature}]",
                got=f"stored temperatures: {held}",
                hint=f"capture with --lse-at {temperature}",
            )
        return value
    value = getattr(targets, name, None)
    if value is None:
        raise TargetsError(
            "aux-missing",
            f"{needed_by} needs the field {name}, which these targets do not hold",
            hint=f"capture with {_CAPTURE_FLAG.get(name, '--aux ' + name)}",
        )
    return value


class Rows(NamedTuple):
    """Student, labels and mask flattened to R rows.

    `student_RV` keeps the caller's dtype when it is float32 or float64, else float32 (a copy).
    `labels_R` int64, negative where there is none, or None. `mask_R` bool.
    `targets`: padded form (leading [B, T]), or the flat weighted form, whose row of entry e is
    `row_of_position[position_of_entry]`. `leading` is the leading shape of student_logits.
    """

    student_RV: Tensor
    labels_R: Tensor | None
    mask_R: Tensor
    targets: Targets
    leading: torch.Size
    row_of_position: Tensor | None

    def per_row(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[R] from a scalar per position, flat [N] or padded; `fill` where there is none."""
        if self.row_of_position is None or x.numel() == self.mask_R.numel():
            return x.reshape(-1)
        out_R = x.new_full(self.mask_R.shape, fill)
        out_R[self.row_of_position] = x
        return out_R


def align(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    ignore_index: int = -100,
    upcast: bool = True,
) -> Rows:
    """Flatten student [..., V], labels [...], mask [...] and targets to the same R rows.

    No shift happens here or anywhere: row t of the student meets row t of the targets (DESIGN
    section 4). A position counts when `mask` is true there (default: all positions the targets
    have) and, when labels are given without a mask, when its label is not `ignore_index`.
    Vocabulary: the student may have more ids than the teacher (extended vocabularies), never fewer.

    Raises: TargetsError shape-mismatch, empty-mask.
    """
    leading = student_logits.shape[:-1]
    vocab = student_logits.shape[-1]
    if vocab < targets.vocab_size:
        raise TargetsError(
            "shape-mismatch",
            "the student's vocabulary is smaller than the teacher's",
            got=f"student_logits {list(student_logits.shape)}",
            expected=f"last axis >= {targets.vocab_size}",
            hint="use a student with the teacher's tokenizer, or a cross-tokenizer loss (uld)",
        )
    length = leading[-1] if len(leading) >= 2 else None
    _check_leading(targets, leading)
    row_of_position: Tensor | None = None
    present_R: Tensor | None = None
    num_rows = leading.numel()
    if targets.lengths is not None:
        lengths_B = targets.lengths.to(student_logits.device)
        if length is None:
            if num_rows != int(lengths_B.sum()):
                raise _shape_error(student_logits, f"{int(lengths_B.sum())} rows")
        else:
            if lengths_B.numel() != num_rows // length:
                raise _shape_error(student_logits, f"{lengths_B.numel()} samples")
            if int(lengths_B.max()) > length:
                raise _shape_error(student_logits, f"at least {int(lengths_B.max())} positions")
            present_BT = torch.arange(length, device=lengths_B.device) < lengths_B[:, None]
            present_R = present_BT.reshape(-1)
            row_of_position = present_R.nonzero()[:, 0]
            targets = targets.padded(length)
    mask_R = _flat(mask, leading, "mask")
    labels_R = _flat(labels, leading, "labels")
    if mask_R is None:
        mask_R = torch.ones(num_rows, dtype=torch.bool, device=student_logits.device)
        if present_R is not None:
            mask_R = present_R
        if labels_R is not None:
            mask_R = mask_R & (labels_R != ignore_index)
    else:
        mask_R = mask_R.bool()
        if present_R is not None:
            # A mask cannot ask for rows the teacher never saw.
            mask_R = mask_R & present_R
    # Under torch.compile the check would break the graph; an empty mask then gives 0 / 0 = NaN.
    if not torch.compiler.is_compiling() and not bool(mask_R.any()):
        raise TargetsError(
            "empty-mask",
            "no position counts: the mean would be 0 / 0",
            hint="skip batches whose loss_mask is all zero",
        )
    student_RV = student_logits.reshape(num_rows, vocab)
    return Rows(
        at_least_float32(student_RV) if upcast else student_RV,
        None if labels_R is None else labels_R.long(),
        mask_R,
        targets,
        leading,
        row_of_position,
    )


@overload
def reduce(
    loss_R: Tensor, rows: Rows, reduction: Reduction, with_count: Literal[False]
) -> Tensor: ...


@overload
def reduce(
    loss_R: Tensor, rows: Rows, reduction: Reduction, with_count: bool
) -> Tensor | LossAndCount: ...


def reduce(
    loss_R: Tensor, rows: Rows, reduction: Reduction, with_count: bool
) -> Tensor | LossAndCount:
    """End a loss: masked rows contribute exactly 0 (also when their value is NaN or infinite)."""
    masked_R = torch.where(rows.mask_R, loss_R, 0.0)
    count = rows.mask_R.sum()
    if reduction == "none":
        value = masked_R.reshape(rows.leading)
    elif reduction == "sum":
        value = masked_R.sum()
    elif reduction == "mean":
        value = masked_R.sum() / count
    else:
        raise UsageError(
            "bad-argument", "unknown reduction", got=reduction, expected="mean, sum or none"
        )
    return LossAndCount(value, count) if with_count else value


def _flat(x: Tensor | None, leading: torch.Size, name: str) -> Tensor | None:
    if x is None:
        return None
    if x.shape != leading:
        raise TargetsError(
            "shape-mismatch",
            f"{name} and student_logits disagree",
            got=f"{name} {list(x.shape)}",
            expected=f"{list(leading)}, the leading shape of student_logits",
        )
    return x.reshape(-1)


def _check_leading(targets: Targets, leading: torch.Size) -> None:
    """Compare leading shapes where there is no `lengths` to compare."""
    if targets.lengths is not None:
        return
    if isinstance(targets, DenseTargets):
        shape = targets.logits.shape[:-1]
    elif isinstance(targets, TopKTargets | ScoresTargets):
        shape = targets.ids.shape[:-1]
    elif isinstance(targets, WeightedTargets):
        # Entries are ragged, so only the number of positions can be compared.
        shape, leading = targets.num_ids.shape, torch.Size([leading.numel()])
    else:
        return
    if shape != leading:
        raise TargetsError(
            "shape-mismatch",
            "targets and student_logits disagree",
            got=f"targets {list(shape)}",
            expected=f"{list(leading)}, the leading shape of student_logits",
            hint="pass the student's logits for batch.tokens unchanged, without a shift",
        )


def _shape_error(student_logits: Tensor, expected: str) -> TargetsError:
    return TargetsError(
        "shape-mismatch",
        "student_logits and targets disagree",
        got=f"student_logits {list(student_logits.shape)}",
        expected=f"{expected} (from targets.lengths)",
        hint="pass the student's logits for batch.tokens unchanged, without a shift",
    )
