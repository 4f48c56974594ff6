"""Counted rows of student and teacher, sequence by sequence; the two need not share a tokenizer.

A sequence is one sample, or one segment of a packed sample. Losses that compare whole sequences
(GLD) or pair the i-th counted row of one side with the i-th of the other (ULD, GOLD) start here
instead of `align`: lengths and vocabularies of the two sides may differ.

Letters: B samples, T student positions, U target positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from logitstore.losses.contract import LossAndCount, Reduction
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import Targets

__all__ = [
    "Sides",
    "both_sides",
    "in_row_chunks",
    "reduce_sequences",
    "rows_per_chunk",
    "sequence_rows",
]

SequenceRows = dict[tuple[int, int], Tensor]


class Sides(NamedTuple):
    """Which rows count on either side, on the CPU, where sequences are told apart.

    `mask_BT` bool for the student, `target_mask_BU` bool for the (padded) `targets`.
    """

    mask_BT: Tensor
    target_mask_BU: Tensor
    targets: Targets


def both_sides(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    target_mask: Tensor | None,
    *,
    ignore_index: int = -100,
) -> Sides:
    """The two masks. Without `target_mask` both sides hold the same tokens and share one mask.

    Raises: TargetsError shape-mismatch, empty-mask.
    """
    if student_logits.ndim != 3:
        raise TargetsError(
            "shape-mismatch",
            "a loss over sequences needs to know where samples end",
            got=f"student_logits {list(student_logits.shape)}",
            expected="[B, T, V]",
        )
    leading = student_logits.shape[:2]
    mask_BT = _student_mask(leading, labels, mask, ignore_index)
    if targets.lengths is None:
        # Padded targets: any per-position field tells the length; here the first tensor with two
        # axes.
        target_leading = _padded_leading(targets)
        present_BU = torch.ones(target_leading, dtype=torch.bool)
    else:
        lengths_B = targets.lengths.cpu()
        longest = int(lengths_B.max())
        target_length = leading[1] if target_mask is None else target_mask.shape[1]
        if longest > target_length:
            raise _mask_shape_error(leading, (lengths_B.numel(), longest))
        targets = targets.padded(target_length)
        present_BU = torch.arange(target_length) < lengths_B[:, None]
    if target_mask is None:
        if tuple(present_BU.shape) != tuple(leading):
            raise _mask_shape_error(leading, tuple(present_BU.shape))
        # Same tokens: a row counts on both sides or on none.
        mask_BT = mask_BT & present_BU
        target_mask_BU = mask_BT
    else:
        if target_mask.shape != present_BU.shape:
            raise TargetsError(
                "shape-mismatch",
                "target_mask and targets disagree",
                got=f"target_mask {list(target_mask.shape)}",
                expected=f"{list(present_BU.shape)}, the padded shape of the targets",
            )
        target_mask_BU = target_mask.cpu().bool() & present_BU
    if not (bool(mask_BT.any()) and bool(target_mask_BU.any())):
        raise TargetsError(
            "empty-mask",
            "no position counts: the mean would be 0 / 0",
            hint="skip batches whose loss_mask is all zero",
        )
    return Sides(mask_BT, target_mask_BU, targets)


def student_rows(
    student_logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """bool [B, T] on the CPU: the student's counted rows, for targets that keep no positions."""
    mask_BT = _student_mask(student_logits.shape[:2], labels, mask, ignore_index)
    if not bool(mask_BT.any()):
        raise TargetsError(
            "empty-mask",
            "no position counts: the mean would be 0 / 0",
            hint="skip batches whose loss_mask is all zero",
        )
    return mask_BT


def sequence_rows(
    mask_BT: Tensor, segment_ids: Tensor | None, *, skip_end: bool = False
) -> SequenceRows:
    """(sample, segment id) -> int64 flat indices b * T + t of its counted rows, in order.

    Segments without a counted row do not appear. Without segment ids every sample is one segment,
    0. `skip_end` leaves out the last counted row of each, the one that predicts the end token.
    """
    num_samples, length = mask_BT.shape
    if segment_ids is not None and segment_ids.shape != mask_BT.shape:
        raise TargetsError(
            "shape-mismatch",
            "segment_ids and their mask disagree",
            got=f"segment_ids {list(segment_ids.shape)}",
            expected=f"{list(mask_BT.shape)}",
        )
    segments_BT = None if segment_ids is None else segment_ids.cpu()
    out: SequenceRows = {}
    for b in range(num_samples):
        rows = mask_BT[b].nonzero()[:, 0]
        if segments_BT is None:
            out[(b, 0)] = rows + b * length
            continue
        segment_of_row = segments_BT[b, rows]
        for segment in torch.unique(segment_of_row).tolist():
            out[(b, segment)] = rows[segment_of_row == segment] + b * length
    if skip_end:
        out = {key: rows[:-1] for key, rows in out.items()}
    return out


def reduce_sequences(
    loss_S: Tensor, counted_S: Tensor, reduction: Reduction, with_count: bool
) -> Tensor | LossAndCount:
    """End a loss that has one value per sequence; `counted_S` bool: sequences that have any pair.

    A batch without any pair gives 0 (connected to the graph), not 0 / 0.
    """
    masked_S = torch.where(counted_S, loss_S, 0.0)
    count = counted_S.sum()
    if reduction == "none":
        value = masked_S
    elif reduction == "sum":
        value = masked_S.sum()
    elif reduction == "mean":
        value = masked_S.sum() / count.clamp_min(1)
    else:
        raise UsageError(
            "bad-argument", "unknown reduction", got=reduction, expected="mean, sum or none"
        )
    return LossAndCount(value, count) if with_count else value


# Elements of one chunk of rows: 16 MiB in float32, small against [R, V] and large enough to
# vectorise.
_CHUNK_ELEMENTS = 1 << 22


def rows_per_chunk(num_rows: int, width: int) -> int:
    """How many rows of `width` elements to work on at a time."""
    return max(1, min(num_rows, _CHUNK_ELEMENTS // max(width, 1)))


def in_row_chunks(function: Callable[..., Tensor], width: int, *tensors: Tensor) -> Tensor:
    """`function` over chunks of axis 0 of all tensors, concatenated; recomputed in backward.

    A sorted or softmaxed copy of all rows never exists at once: one chunk's temporaries do. `width`
    is the number of elements a row needs.
    """
    rows = tensors[0].shape[0]
    per_chunk = rows_per_chunk(rows, width)
    if rows <= per_chunk:
        return function(*tensors)
    # split, not slices: its backward concatenates once instead of adding one full-size tensor per
    # chunk.
    chunks = zip(*(t.split(per_chunk) for t in tensors), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def _student_mask(
    leading: torch.Size, labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    for name, given in (("mask", mask), ("labels", labels)):
        if given is not None and given.shape != leading:
            raise TargetsError(
                "shape-mismatch",
                f"{name} and student_logits disagree",
                got=f"{name} {list(given.shape)}",
                expected=f"{list(leading)}, the leading shape of student_logits",
            )
    if mask is not None:
        return mask.cpu().bool()
    if labels is not None:
        return labels.cpu() != ignore_index
    return torch.ones(leading, dtype=torch.bool)


def _padded_leading(targets: Targets) -> tuple[int, int]:
    for name in ("logits", "ids", "label_logprob", "lse"):
        value = getattr(targets, name, None)
        if value is not None and value.ndim >= 2:
            return value.shape[0], value.shape[1]
    raise TargetsError(
        "shape-mismatch",
        "a loss over sequences needs targets that know where samples end",
        expected="flat targets with lengths, or padded targets with leading shape [B, T]",
    )


def _mask_shape_error(leading: torch.Size, target_leading: tuple[int, ...]) -> TargetsError:
    return TargetsError(
        "shape-mismatch",
        "student and targets have different lengths and no target_mask was given",
        got=f"student {list(leading)}, targets {list(target_leading)}",
        expected="equal lengths, or target_mask",
        hint="with two tokenizers pass mask= (student's rows) and target_mask= (the store's)",
    )
