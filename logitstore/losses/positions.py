"""The positions of a batch that count, with everything a loss reads at them.

Losses that gather, sort or take logarithms row by row work on counted rows only: a masked row may
hold NaN or infinities, and `0 * NaN` in the backward pass would spread them. Dropping such rows
keeps them out and saves their arithmetic. When every row counts nothing is copied. Under
torch.compile, where shapes may not depend on data, such rows stay and hold zeros instead.

Letters: R rows of the batch, N rows that count, V student vocabulary, K kept ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, Rows, reduce, require
from logitstore.losses.rows import log_without, require_labels
from logitstore.spec.errors import TargetsError
from logitstore.targets import (
    PAD_ID,
    DenseTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
    WeightedTargets,
)
from logitstore.targets.base import pad_rows
from logitstore.targets.dense import at_least_float32

__all__ = [
    "Positions",
    "counted_positions",
    "dense_logits",
    "exact_head",
    "tempered_logprobs",
]


class Positions(NamedTuple):
    """The N counted rows (all R rows under torch.compile, those that do not count zeroed).

    Attributes:
        student_NV: rows that count, in the dtype `align` left them in.
        labels_N: int64, or None when no labels were given.
        targets: leading shape [N]; threshold targets appear as the `TopKTargets` of their exact
            head, sampled ones as their per-position scalars. Always-ids are part of the list.
        rows: the R rows they were taken from.
    """

    student_NV: Tensor
    labels_N: Tensor | None
    targets: Targets
    rows: Rows

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: the student's, at least float32."""
        return torch.promote_types(self.student_NV.dtype, torch.float32)

    def reduce(
        self, loss_N: Tensor, reduction: Reduction, with_count: bool
    ) -> Tensor | LossAndCount:
        """`contract.reduce` of a value per counted row; rows that do not count are 0."""
        rows = self.rows
        loss_R = loss_N
        if loss_N.shape[0] != rows.mask_R.shape[0]:
            loss_R = loss_N.new_zeros(rows.mask_R.shape).masked_scatter(rows.mask_R, loss_N)
        return reduce(loss_R, rows, reduction, with_count)


def counted_positions(
    rows: Rows,
    *,
    labelled: str | None = None,
    across_rows: bool = False,
    always_ids: bool = True,
) -> Positions:
    """Take the rows that count out of `rows`.

    Args:
        rows: what `contract.align` returned.
        labelled: name of a loss that needs a label in every row that counts.
        across_rows: rows meet each other in the loss, so zeroed ones would be seen; they are
            dropped also under torch.compile, which breaks the graph there.
        always_ids: False keeps a top-K list as it is, for losses over ranks: an always-id that the
            list lacks has no known rank. A threshold head lacks them even where they are probable.

    Raises: TargetsError shape-mismatch when a field of the targets has another leading shape than
        the student; label-missing.
    """
    targets = rows.targets
    in_head = isinstance(targets, ThresholdTargets)
    if isinstance(targets, WeightedTargets):
        targets = (
            exact_head(targets)
            if isinstance(targets, ThresholdTargets)
            else _PositionScalars(**_shared_fields(targets))
        )
        if targets.lengths is not None and len(rows.leading) >= 2:
            targets = targets.padded(rows.leading[-1])
    labels_R = rows.labels_R
    if labelled:
        labels_R = require_labels(rows, labelled, "")
    take = _zero if torch.compiler.is_compiling() and not across_rows else _drop
    every_row_counts = take is _drop and bool(rows.mask_R.all())

    def taken(x_R: Tensor) -> Tensor:
        return x_R if every_row_counts else take(x_R, rows.mask_R)

    changes: dict[str, Any] = {"lengths": None}
    for field in dataclasses.fields(targets):
        # The ids of control tokens are shared by all positions.
        if field.name in ("lengths", "always_ids"):
            continue
        value = getattr(targets, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = taken(_flat(value, rows, field.name))
        elif field.name == "lse_at":
            changes[field.name] = {
                t: taken(_flat(x, rows, f"lse_at[{t}]")) for t, x in value.items()
            }
    targets = dataclasses.replace(targets, **changes)
    if isinstance(targets, TopKTargets) and (always_ids or in_head):
        targets = _with_always_ids(targets, in_tail=not in_head)
    return Positions(
        taken(rows.student_RV), None if labels_R is None else taken(labels_R), targets, rows
    )


def dense_logits(at: Positions) -> Tensor:
    """Teacher logits [N, V of the student], dtype `at.dtype`; ids only the student has are -inf."""
    assert isinstance(at.targets, DenseTargets)
    logits_NV = at.targets.logits.to(at.dtype)
    extra = at.student_NV.shape[-1] - logits_NV.shape[-1]
    return torch.nn.functional.pad(logits_NV, (0, extra), value=-math.inf) if extra else logits_NV


def tempered_logprobs(
    logprobs: Tensor, targets: Targets, temperature: float, needed_by: str
) -> Tensor:
    """log p_T of ids whose log p is given: (log p + lse) / T - lse_at[T].

    Exact for any subset of ids.

    Args:
        logprobs: float [N] or [N, K], at temperature 1.
        temperature: T.
        needed_by: name of the loss, for the error.

    Raises: TargetsError aux-missing when T != 1 and `lse` or `lse_at[T]` is not stored.
    """
    if temperature == 1:
        return logprobs
    lse_N = require(targets, "lse", needed_by)
    lse_at_N = require(targets, "lse_at", needed_by, temperature=temperature)
    if logprobs.ndim > lse_N.ndim:
        lse_N, lse_at_N = lse_N[:, None], lse_at_N[:, None]
    return (logprobs + lse_N.to(logprobs.dtype)) / temperature - lse_at_N.to(logprobs.dtype)


def _with_always_ids(targets: TopKTargets, *, in_tail: bool) -> TopKTargets:
    """Always-ids that the list lacks, as more of its ids.

    `in_tail`: they are part of `log_tail` (a top-K record), lie below the list and follow it. A
    threshold head has them anywhere in its order and never in its tail.
    """
    if targets.always_ids is None or targets.always_logprobs is None:
        return targets
    ids_NA = targets.always_ids.expand(targets.ids.shape[0], -1)
    logprobs_NA = targets.always_logprobs.to(targets.logprobs.dtype)
    logprobs_NA, order_NA = torch.sort(logprobs_NA, dim=-1, descending=True, stable=True)
    ids_NA = ids_NA.gather(-1, order_NA)
    known_NA = (ids_NA[:, :, None] == targets.ids[:, None, :]).any(-1)
    logprobs_NA = logprobs_NA.masked_fill(known_NA, -math.inf)
    ids_NU = torch.cat([targets.ids, ids_NA.masked_fill(known_NA, PAD_ID)], -1)
    logprobs_NU = torch.cat([targets.logprobs, logprobs_NA], -1)
    log_tail = targets.log_tail
    if not in_tail:
        logprobs_NU, order_NU = torch.sort(logprobs_NU, dim=-1, descending=True, stable=True)
        ids_NU = ids_NU.gather(-1, order_NU)
    elif log_tail is not None:
        log_tail = log_without(log_tail, torch.logsumexp(logprobs_NA, -1).to(log_tail.dtype))
    return dataclasses.replace(
        targets,
        ids=ids_NU,
        logprobs=logprobs_NU,
        log_tail=log_tail,
        always_ids=None,
        always_logprobs=None,
    )


def _drop(x_R: Tensor, mask_R: Tensor) -> Tensor:
    return x_R[mask_R]


def _zero(x_R: Tensor, mask_R: Tensor) -> Tensor:
    return x_R.masked_fill(~mask_R.reshape(-1, *[1] * (x_R.ndim - 1)), 0)


def _flat(x: Tensor, rows: Rows, name: str) -> Tensor:
    dims = len(rows.leading)
    if x.shape[:dims] != rows.leading:
        raise TargetsError(
            "shape-mismatch",
            f"targets and student_logits disagree in {name}",
            got=f"{name} {list(x.shape)}",
            expected=f"{list(rows.leading)} first, the leading shape of student_logits",
        )
    return x.reshape(rows.mask_R.numel(), *x.shape[dims:])


def exact_head(targets: ThresholdTargets) -> TopKTargets:
    """The exact head of threshold targets as top-K targets; each position has its own K."""
    head_E = targets.head_mask()
    width = max(int(targets.num_heads.max()), 1)
    return TopKTargets(
        ids=pad_rows(targets.ids[head_E], targets.num_heads, width, PAD_ID),
        logprobs=pad_rows(
            at_least_float32(targets.weights)[head_E].log(), targets.num_heads, width, -math.inf
        ),
        log_tail=targets.log_tail,
        **_shared_fields(targets),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PositionScalars(Targets):
    """`label_logprob`, `lse` and their like, without the sampled ids."""

    def padded(self, length: int | None = None) -> Self:
        if self.lengths is None:
            return self
        return dataclasses.replace(self, **self._padded_scalars(self._padded_length(length)))


def _shared_fields(targets: Targets) -> dict[str, Any]:
    return {f.name: getattr(targets, f.name) for f in dataclasses.fields(Targets)}
