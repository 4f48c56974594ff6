"""GOLD: universal logit distillation over groups of tokens that cover the same bytes of text.

Letters: B samples, T student positions, U target positions, V vocabulary, G groups, E extra rows
(rows of a group beside its base row), M matched ids, K stored ids.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from logitstore.losses.byte_alignment import byte_groups
from logitstore.losses.contract import LossAndCount, Reduction, loss, require
from logitstore.losses.hybrid import hybrid_distance, hybrid_distance_to_head
from logitstore.losses.positions import tempered_logprobs
from logitstore.losses.sequences import both_sides, reduce_sequences, sequence_rows
from logitstore.losses.sorted_probs import (
    Tail,
    sorted_distance,
    sorted_distance_to_head,
    stored_head,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["gold"]

# TRL's floor of every scalar factor of a group.
LOG_FLOOR = math.log(1e-8)


class _Side(NamedTuple):
    """One side's G groups: the base row of each, and row and group of the E extra factors."""

    base_G: Tensor
    extra_row_E: Tensor
    extra_group_E: Tensor


@loss(
    signals={"dense": "exact", "topk": "bounded"},
    missing={"topk": ("bucket", "zero")},
    needs={"dense": ("byte_end",), "topk": ("byte_end", "label_logprob")},
    needs_labels=True,
    source="GOLD of TRL (experimental), extending arXiv:2402.12030; top-K forms derived here",
)
def gold(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    byte_end: Tensor | None = None,
    mask: Tensor | None = None,
    target_labels: Tensor | None = None,
    target_mask: Tensor | None = None,
    strategy: Literal["bayesian", "observed"] = "bayesian",
    matched_ids: tuple[Tensor, Tensor] | None = None,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    beta: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_student_end: bool = False,
    skip_teacher_end: bool = False,
    same_bytes: bool = False,
    missing: Tail = "bucket",
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over samples of the mean over byte groups of the distance of two merged distributions.

    Tokens of both sides that end at the same byte close a group (`byte_groups`). A group of one
    token is its row's distribution; a longer one multiplies one row's distribution by the
    probabilities of the other tokens, a sub-distribution P_g:

        bayesian  P_g = prob[row of the last token] * prod over earlier tokens of prob(token)
        observed  P_g = prob[first row] * prod over later rows k of prob[k, id_k], rows one later

    Without `matched_ids` the distance is sum_i |sorted difference|, as in `uld`. With them (hybrid)
    it is w JSD_beta on the columns both vocabularies share + (1 - w) times the sorted distance of
    the other columns, w = M / V_T; beta weights the teacher.

    Args:
        student_logits: float [B, T, V_S], the student's own tokens of the same text.
        targets: dense, or topk with `label_logprob` (bayesian only), with `byte_end` [B, U]
            (capture with --aux byte_end). Teacher temperature != 1 from topk needs `lse_at[T]`.
        labels: int64 [B, T], labels[:, t] = tokens[:, t + 1]; required.
        byte_end: int64 [B, T], byte offset in the sample's text where the student's *input* token t
            ends, see `byte_ends`; required. The token row t predicts ends at byte_end[:, t + 1].
        mask, target_mask: bool [B, T] and [B, U], rows that count; see `uld`.
        target_labels: int64 [B, U], the teacher's realised next tokens; dense targets need it.
        strategy: "bayesian" is the chain rule. "observed" is TRL's default: it takes rows one
            position later, so that row k, which predicts token k + 1, is asked for token k.
        matched_ids: (student ids [M], teacher ids [M]) that mean the same, see `matched_ids` of
            byte_alignment; turns the hybrid distance on.
        matched_weight, unmatched_weight: fixed w and, unless given too, 1 - w.
        beta: weight of the teacher in the JSD; 0 is KL(teacher || student), 1 the reverse, as TRL.
            From topk only 0 < beta < 1.
        student_temperature, teacher_temperature, skip_student_end, skip_teacher_end: as in `uld`.
            TRL skips the end token on both sides.
        same_bytes: leave out groups whose two sides do not cover exactly the same bytes: the one
            after the last common end (a side was cut off), and those at the edge of what counts,
            where the first token of a text has no row that predicts it. TRL keeps them; turn it on
            for packed or truncated text.
        missing: "bucket" or "zero", how topk's tail enters the sorted distance; hybrid: bucket.
        reduction: over samples with a group; "none" gives [B].
        with_count: also return how many samples have a group.

    From topk, bucket: a lower bound of the dense value. Plain: too low by at most 2 min(s, r) per
    group, s and r the two scaled tail masses. Hybrid: the unseen mass r is split so that both parts
    are smallest; too low by at most w (beta r log(1/beta) + (1 - beta) s_m log(1/(1 - beta))) +
    2 (1 - w) r, s_m the student's mass on matched ids that are not stored.

    Raises: TargetsError aux-missing, label-missing, targets-mismatch, missing-not-allowed,
        shape-mismatch, empty-mask; UsageError bad-argument.

    Published code and our choice: scalars have a floor of 1e-8 and carry gradient in both; the JSD
    is formed in the log domain here, without TRL's floor of 1e-8 on every column; columns without a
    counterpart on the other side count in full here, and not at all there when one side has no
    unmatched id; end offsets of rows are compared, so BOS and other text-free tokens do no harm.

    Source: huggingface/trl, experimental GOLD trainer; arXiv:2402.12030.
    """
    if strategy not in ("bayesian", "observed"):
        raise UsageError(
            "bad-argument", "unknown strategy", got=strategy, expected="bayesian or observed"
        )
    assert labels is not None
    lengths_B = None if targets.lengths is None else targets.lengths.cpu()
    sides = both_sides(student_logits, targets, labels, mask, target_mask)
    targets = sides.targets
    target_end_BU = require(targets, "byte_end", "gold")
    if byte_end is None or byte_end.shape != labels.shape:
        raise TargetsError(
            "shape-mismatch",
            "gold aligns tokens by where they end in the text",
            got="no byte_end" if byte_end is None else f"byte_end {list(byte_end.shape)}",
            expected=f"byte_end {list(labels.shape)}, one offset per student token",
            hint="byte_ends(tokens, byte_length_of_id) of logitstore.losses",
        )
    dense = isinstance(targets, DenseTargets)
    if dense and target_labels is None:
        raise TargetsError(
            "label-missing",
            "gold from dense targets needs the teacher's realised tokens",
            expected="target_labels=batch.labels of the store, int64 [B, U]",
        )
    if not dense and strategy == "observed":
        raise TargetsError(
            "targets-mismatch",
            "strategy observed reads probabilities that a top-K record does not hold",
            got=targets.signal,
            expected="dense targets, or strategy='bayesian'",
        )
    if matched_ids is not None and not dense and missing == "zero":
        raise TargetsError(
            "missing-not-allowed",
            "the hybrid distance splits the tail itself",
            got="missing='zero'",
            expected="bucket",
        )
    shift = int(strategy == "observed")
    mask_BT, target_mask_BU = sides.mask_BT.clone(), sides.target_mask_BU.clone()
    # The end of a row's token is the next position's; the last position has none.
    mask_BT[:, -1] = False
    target_mask_BU[:, -1] = False
    if lengths_B is not None:
        target_mask_BU[torch.arange(lengths_B.numel()), (lengths_B - 1).clamp_min(0)] = False
    student_rows = sequence_rows(mask_BT, None, skip_end=skip_student_end)
    target_rows = sequence_rows(target_mask_BU, None, skip_end=skip_teacher_end)
    device = student_logits.device
    student, target, num_groups_B = _groups(
        [(student_rows[key], target_rows[key]) for key in student_rows],
        byte_end.cpu().flatten(),
        target_end_BU.cpu().flatten(),
        strategy,
        same_bytes,
    )
    student = _Side(*(x.to(device) for x in student))
    target = _Side(*(x.to(device) for x in target))
    student_RV = student_logits.flatten(0, 1)
    log_scale_G = _log_scale_from_logits(
        student_RV, student, labels.flatten(), student_temperature, shift
    )
    student_rows_G = student.base_G + shift
    hybrid = matched_ids is not None
    if matched_ids is not None:
        student_ids_M, teacher_ids_M = (ids.to(device) for ids in matched_ids)
        share = student_ids_M.numel() / targets.vocab_size
        weight = share if matched_weight is None else matched_weight
        weights = (weight, 1 - weight if unmatched_weight is None else unmatched_weight)
    if dense:
        assert isinstance(targets, DenseTargets)
        assert target_labels is not None
        teacher_RV = targets.logits.flatten(0, 1)
        with torch.no_grad():
            teacher_log_scale_G = _log_scale_from_logits(
                teacher_RV, target, target_labels.flatten(), teacher_temperature, shift
            )
            teacher_GV = teacher_RV[target.base_G + shift]
        temperatures = (student_temperature, teacher_temperature)
        scales = (log_scale_G, teacher_log_scale_G)
        if hybrid:
            distance_G = hybrid_distance(
                student_RV[student_rows_G],
                teacher_GV,
                (student_ids_M, teacher_ids_M),
                weights,
                beta,
                temperatures,
                scales,
            )
        else:
            distance_G = sorted_distance(
                student_RV, student_rows_G, teacher_GV, *temperatures, *scales
            )
    else:
        assert isinstance(targets, TopKTargets)
        head = stored_head(targets, target.base_G, teacher_temperature, "gold")
        with torch.no_grad():
            scale_G = _log_scale_from_record(targets, target, teacher_temperature).exp()
            head = head._replace(
                probs_PK=head.probs_PK * scale_G[:, None].to(head.probs_PK),
                tail_P=head.tail_P * scale_G.to(head.tail_P),
            )
        if hybrid:
            stored_ids_GK = targets.ids.flatten(0, 1)[target.base_G]
            distance_G = hybrid_distance_to_head(
                student_RV[student_rows_G],
                head,
                stored_ids_GK,
                targets.vocab_size,
                (student_ids_M, teacher_ids_M),
                weights,
                beta,
                student_temperature,
                log_scale_G,
            )
        else:
            distance_G = sorted_distance_to_head(
                student_RV, student_rows_G, head, student_temperature, missing, log_scale_G
            )
    num_groups_B = num_groups_B.to(device)
    sample_G = torch.repeat_interleave(
        torch.arange(num_groups_B.numel(), device=device),
        num_groups_B,
        output_size=distance_G.numel(),
    )
    sum_B = distance_G.new_zeros(num_groups_B.numel()).index_add(0, sample_G, distance_G)
    return reduce_sequences(
        sum_B / num_groups_B.clamp_min(1), num_groups_B > 0, reduction, with_count
    )


def _groups(
    rows: list[tuple[Tensor, Tensor]],
    student_end_R: Tensor,
    target_end_R: Tensor,
    strategy: str,
    same_bytes: bool,
) -> tuple[_Side, _Side, Tensor]:
    """Groups of all samples, sample by sample; rows are flat indices."""
    # base rows, extra rows, groups of the extra rows; per side
    found: tuple[tuple[list[int], list[int], list[int]], ...] = (([], [], []), ([], [], []))
    num_groups: list[int] = []
    for student_rows, target_rows in rows:
        row_lists = (student_rows.tolist(), target_rows.tolist())
        # Row t predicts token t + 1: that token's end is the row's.
        ends = (student_end_R[student_rows + 1].tolist(), target_end_R[target_rows + 1].tolist())
        groups = byte_groups(*ends, leftover=not same_bytes)
        if same_bytes:
            starts = (student_end_R[student_rows].tolist(), target_end_R[target_rows].tolist())
            groups = [
                group
                for group in groups
                if starts[0][group.student[0]] == starts[1][group.target[0]]
                and all(_adjoin(rows, side) for rows, side in zip(row_lists, group, strict=True))
            ]
        num_groups.append(len(groups))
        for group in groups:
            for (base, extra, extra_group), row_list, members in zip(
                found, row_lists, group, strict=True
            ):
                at = len(members) - 1 if strategy == "bayesian" else 0
                others = [row_list[m] for m in members if m != members[at]]
                extra_group += [len(base)] * len(others)
                extra += others
                base.append(row_list[members[at]])
    tensors = [[torch.tensor(x, dtype=torch.int64) for x in side] for side in found]
    (base_G, extra_E, group_E), (target_base_G, target_extra_E, target_group_E) = tensors
    return (
        _Side(base_G, extra_E, group_E),
        _Side(target_base_G, target_extra_E, target_group_E),
        torch.tensor(num_groups),
    )


def _adjoin(rows: list[int], members: range) -> bool:
    """Whether no uncounted row lies inside a group."""
    return rows[members[-1]] - rows[members[0]] == len(members) - 1


def _log_scale_from_logits(
    logits_RV: Tensor, side: _Side, next_token_R: Tensor, temperature: float, shift: int
) -> Tensor:
    """[G]: log of the product of a group's other probabilities; each factor at least 1e-8."""
    z_EV = at_least_float32(logits_RV[side.extra_row_E + shift]) / temperature
    token_E1 = next_token_R.to(z_EV.device)[side.extra_row_E][:, None]
    if token_E1.numel() and int(token_E1.min()) < 0:
        raise TargetsError(
            "label-missing",
            "a counted row of a group of several tokens has no label",
            got=int(token_E1.min()),
            expected="labels[:, t] = tokens[:, t + 1] wherever the mask is true, on both sides",
        )
    logprob_E = z_EV.gather(-1, token_E1)[:, 0] - torch.logsumexp(z_EV, -1)
    return _sum_by_group(logprob_E, side)


def _log_scale_from_record(targets: TopKTargets, side: _Side, temperature: float) -> Tensor:
    label_logprob_BU = require(targets, "label_logprob", "gold")
    at_rows = targets.map(lambda x: x.flatten(0, 1)[side.extra_row_E] if x.ndim > 1 else x)
    logprob_E = at_least_float32(label_logprob_BU.flatten()[side.extra_row_E])
    return _sum_by_group(tempered_logprobs(logprob_E, at_rows, temperature, "gold"), side)


def _sum_by_group(logprob_E: Tensor, side: _Side) -> Tensor:
    log_scale_G = logprob_E.new_zeros(side.base_G.numel())
    return log_scale_G.index_add(0, side.extra_group_E, logprob_E.clamp_min(LOG_FLOOR))
