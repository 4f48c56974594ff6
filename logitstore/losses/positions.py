"""The positions of a batch that count, with everything a loss reads at them.

Losses that gather, sort or take logarithms row by row work on counted rows only: a masked row may hold
NaN or infinities, and `0 * NaN` in the backward pass would spread them. Dropping such rows is the only
exact way out, and it also saves their arithmetic. When every row counts nothing is copied.

Letters: R rows of the batch, N rows that count, V student vocabulary, K kept ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore.losses.contract import LossAndCount, Reduction, Rows, reduce, require
from logitstore.spec.errors import TargetsError
from logitstore.targets import PAD_ID, DenseTargets, Targets, ThresholdTargets, TopKTargets
from logitstore.targets.base import pad_rows
from logitstore.targets.dense import at_least_float32

__all__ = [
    "Positions",
    "counted_positions",
    "dense_logits",
    "tail_logsumexp",
    "tempered_logprobs",
]


class Positions(NamedTuple):
    """The N counted rows.

    Attributes:
        student_NV: float32 or float64, rows that count.
        labels_N: int64, or None when no labels were given.
        targets: leading shape [N]; threshold targets appear as the `TopKTargets` of their exact head.
        rows: the R rows they were taken from.
    """

    student_NV: Tensor
    labels_N: Tensor | None
    targets: Targets
    rows: Rows

    def reduce(self, loss_N: Tensor, reduction: Reduction, with_count: bool) -> Tensor | LossAndCount:
        """`contract.reduce` of a value per counted row; rows that do not count are 0."""
        rows = self.rows
        loss_R = loss_N
        if loss_N.shape[0] != rows.mask_R.shape[0]:
            loss_R = loss_N.new_zeros(rows.mask_R.shape).masked_scatter(rows.mask_R, loss_N)
        return reduce(loss_R, rows, reduction, with_count)


def counted_positions(rows: Rows, *, labelled: bool = False) -> Positions:
    """Take the rows that count out of `rows`.

    Args:
        rows: what `contract.align` returned.
        labelled: rows without a label (negative) do not count either.

    Raises: TargetsError shape-mismatch when a field of the targets has another leading shape than the
        student; empty-mask when no row with a label is left.
    """
    targets = rows.targets
    if isinstance(targets, ThresholdTargets):
        targets = _head(targets)
        if targets.lengths is not None and len(rows.leading) >= 2:
            targets = targets.padded(rows.leading[-1])
    if labelled and rows.labels_R is not None:
        rows = rows._replace(mask_R=rows.mask_R & (rows.labels_R >= 0))
        if not bool(rows.mask_R.any()):
            raise TargetsError(
                "empty-mask",
                "no position with a label counts: the mean would be 0 / 0",
                hint="labels[:, t] = tokens[:, t + 1]; skip batches where all of them are ignored",
            )
    keep_R = None if bool(rows.mask_R.all()) else rows.mask_R
    changes: dict[str, Any] = {"lengths": None}
    for field in dataclasses.fields(targets):
        # The ids of control tokens are shared by all positions.
        if field.name in ("lengths", "always_ids"):
            continue
        value = getattr(targets, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = _take(value, rows, keep_R, field.name)
        elif field.name == "lse_at":
            changes[field.name] = {
                t: _take(x, rows, keep_R, f"lse_at[{t}]") for t, x in value.items()
            }
    return Positions(
        rows.student_RV if keep_R is None else rows.student_RV[keep_R],
        rows.labels_R if keep_R is None or rows.labels_R is None else rows.labels_R[keep_R],
        dataclasses.replace(targets, **changes),
        rows,
    )


def dense_logits(targets: DenseTargets, like_NV: Tensor) -> Tensor:
    """Teacher logits [N, V] in the dtype of `like_NV`; ids only the student has are -inf."""
    logits_NV = at_least_float32(targets.logits).to(like_NV.dtype)
    extra = like_NV.shape[-1] - logits_NV.shape[-1]
    return torch.nn.functional.pad(logits_NV, (0, extra), value=-math.inf) if extra else logits_NV


def tempered_logprobs(
    logprobs: Tensor, targets: Targets, temperature: float, needed_by: str
) -> Tensor:
    """log p_T of ids whose log p is given: (log p + lse) / T - lse_at[T], exact for any subset of ids.

    Args:
        logprobs: float [N] or [N, K], at temperature 1.
        temperature: T. A stored temperature within 1e-6 (relative) is the same one, so that T = 1/gamma
            finds what was captured as a rounded decimal.
        needed_by: name of the loss, for the error.

    Raises: TargetsError aux-missing when T != 1 and `lse` or `lse_at[T]` is not stored.
    """
    if temperature == 1:
        return logprobs
    lse_N = require(targets, "lse", needed_by)
    stored = next((t for t in targets.lse_at if math.isclose(t, temperature, rel_tol=1e-6)), None)
    lse_at_N = require(
        targets, "lse_at", needed_by, temperature=temperature if stored is None else stored
    )
    if logprobs.ndim > lse_N.ndim:
        lse_N, lse_at_N = lse_N[:, None], lse_at_N[:, None]
    return (logprobs + lse_N.to(logprobs.dtype)) / temperature - lse_at_N.to(logprobs.dtype)


def tail_logsumexp(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """logsumexp over the ids of each row that are not in `ids_NK` (-1 pads), [N]; -inf when none is left.

    Masks with -inf; never subtracts exponentials, which is noise once the kept mass exceeds 0.9999.
    """
    value: Tensor = _TailLogsumexp.apply(logits_NV, ids_NK)
    return value


class _TailLogsumexp(torch.autograd.Function):
    # torch's logsumexp has a NaN gradient where everything is -inf, which K = V makes normal.
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
        row_NK = torch.arange(ids_NK.shape[0], device=ids_NK.device)[:, None] * logits_NV.shape[-1]
        inside_E = (row_NK + ids_NK)[ids_NK != PAD_ID]
        outside_NV = logits_NV.contiguous().view(-1).index_fill(0, inside_E, -math.inf)
        tail_N = torch.logsumexp(outside_NV.view_as(logits_NV), -1)
        ctx.save_for_backward(logits_NV, inside_E, tail_N)
        return tail_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, inside_E, tail_N = ctx.saved_tensors
        empty_N = tail_N == -math.inf
        grad_NV = (logits_NV - tail_N.masked_fill(empty_N, math.inf)[:, None]).exp_()
        # Kept ids may have overflowed above; they are overwritten, not multiplied.
        grad_NV.view(-1).index_fill_(0, inside_E, 0.0)
        return grad_NV.mul_(grad_N[:, None]), None


def _take(x: Tensor, rows: Rows, keep_R: Tensor | None, name: str) -> Tensor:
    dims = len(rows.leading)
    if x.shape[:dims] != rows.leading:
        raise TargetsError(
            "shape-mismatch",
            f"targets and student_logits disagree in {name}",
            got=f"{name} {list(x.shape)}",
            expected=f"{list(rows.leading)} first, the leading shape of student_logits",
        )
    flat = x.reshape(rows.mask_R.numel(), *x.shape[dims:])
    return flat if keep_R is None else flat[keep_R]


def _head(targets: ThresholdTargets) -> TopKTargets:
    """The exact head of threshold targets as top-K targets; each position has its own K."""
    head_E = targets.head_mask()
    width = max(int(targets.num_heads.max()), 1)
    shared = {f.name: getattr(targets, f.name) for f in dataclasses.fields(Targets)}
    return TopKTargets(
        ids=pad_rows(targets.ids[head_E], targets.num_heads, width, PAD_ID),
        logprobs=pad_rows(
            at_least_float32(targets.weights)[head_E].log(), targets.num_heads, width, -math.inf
        ),
        log_tail=targets.log_tail,
        **shared,
    )
