"""Universal logit distillation: compare sorted probabilities, no shared vocabulary needed.

Letters: B samples, T student positions, V vocabulary, K stored ids, P pairs of rows, S sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, loss
from logitstore.losses.positions import tempered_logprobs
from logitstore.losses.sequences import both_sides, in_row_chunks, reduce_sequences, sequence_rows
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["StoredHead", "sorted_distance", "sorted_distance_to_head", "stored_head", "uld"]

Tail = Literal["bucket", "zero"]


@loss(
    signals={"dense": "exact", "topk": "bounded"},
    missing={"topk": ("bucket", "zero")},
    source="arXiv:2402.12030 (TMLR), released code; top-K form derived for this project",
    aliases=("universal_logit_distillation",),
)
def uld(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    target_segment_ids: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_student_end: bool = False,
    skip_teacher_end: bool = False,
    missing: Tail = "bucket",
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over samples of the mean over paired rows of sum_i |q~(i) - p~(i)|, each sum in [0, 2].

    p~ and q~ are teacher and student probabilities sorted descending, zero-padded to the larger
    vocabulary. The i-th counted row of the student meets the i-th counted row of the targets; the
    longer side's rest is dropped. With row t predicting token t+1 the first counted row is the one
    before the first answer token, as in the released slices.

    From `topk` targets the K stored probabilities meet the student's K largest exactly; with s the
    student's mass beyond them and r the teacher's, the tail lies in [|s - r|, s + r]. "bucket"
    takes |s - r|: a lower bound of the exact value, too low by at most 2 min(s, r). "zero" takes s:
    it misses in either direction and drives the student's tail to zero.

    Args:
        student_logits: float [B, T, V_S], the student's own tokens.
        targets: dense or topk, of any vocabulary and length. Teacher temperature != 1 from topk
            needs `lse` and `lse_at[T]`.
        labels, mask: [B, T], which rows of the student count (mask, or label != -100).
        target_mask: bool [B, U], which rows of the targets count. Needed whenever the tokenizers
            differ; without it both sides hold the same tokens and share one mask.
        segment_ids, target_segment_ids: int [B, T] and [B, U]: pair rows inside equal segments of
            equal samples and average over segments instead of samples.
        student_temperature, teacher_temperature: tau of each softmax.
        skip_student_end, skip_teacher_end: leave out each sequence's last counted row, the one
            that predicts the end token. The released recipe skips the student's.
        missing: "bucket" or "zero", topk only.
        reduction: over sequences that have a pair; "none" gives [B] (or one per segment), 0
            without.
        with_count: also return how many sequences have a pair.

    Raises: TargetsError aux-missing, missing-not-allowed, shape-mismatch, empty-mask.

    The paper adds 1.5 x ULD to the cross-entropy: ULD alone never says which token is right.

    Published code and our choice: an answer that is empty once the end token is gone divides by
    zero there, here it does not count (a batch of such gives a 0 that keeps the graph); holes in an
    answer (-100 inside) are counted by total but sliced contiguously there, here exactly the
    counted rows are used; without a leading -100 the released slice is unshifted, here rows never
    shift; softmax overwrites logits in the model's dtype there, here it is float32 or better.

    Source: arXiv:2402.12030, section 3; Nicolas-BZRD/llm-recipes.
    """
    sides = both_sides(student_logits, targets, labels, mask, target_mask)
    if target_segment_ids is None and target_mask is None:
        target_segment_ids = segment_ids
    student_sequences = sequence_rows(sides.mask_BT, segment_ids, skip_end=skip_student_end)
    target_sequences = sequence_rows(
        sides.target_mask_BU, target_segment_ids, skip_end=skip_teacher_end
    )
    shared = [key for key in student_sequences if key in target_sequences]
    num_pairs_S = torch.tensor(
        [min(len(student_sequences[key]), len(target_sequences[key])) for key in shared]
    )
    device = student_logits.device

    def first_rows(sequences: dict[tuple[int, int], Tensor]) -> Tensor:
        pieces = [sequences[key][:n] for key, n in zip(shared, num_pairs_S.tolist(), strict=True)]
        return torch.cat(pieces).to(device)

    student_PV = student_logits.flatten(0, 1)[first_rows(student_sequences)]
    target_rows_P = first_rows(target_sequences)
    if isinstance(sides.targets, DenseTargets):
        teacher_PV = sides.targets.logits.flatten(0, 1)[target_rows_P]
        distance_P = sorted_distance(
            student_PV, teacher_PV, student_temperature, teacher_temperature
        )
    else:
        assert isinstance(sides.targets, TopKTargets)
        head = stored_head(sides.targets, target_rows_P, teacher_temperature, "uld")
        distance_P = sorted_distance_to_head(student_PV, head, student_temperature, missing)
    num_pairs_S = num_pairs_S.to(device)
    sequence_P = torch.repeat_interleave(
        torch.arange(len(shared), device=device), num_pairs_S, output_size=distance_P.numel()
    )
    sum_S = distance_P.new_zeros(len(shared)).index_add(0, sequence_P, distance_P)
    loss_S = sum_S / num_pairs_S.clamp_min(1)
    return reduce_sequences(loss_S, num_pairs_S > 0, reduction, with_count)


class StoredHead(NamedTuple):
    """What a top-K record knows of P rows' sorted probabilities.

    `probs_PK` descending, 0 where fewer than K are stored; `held_PK` bool, where one is stored;
    `tail_P` the mass beyond them.
    """

    probs_PK: Tensor
    held_PK: Tensor
    tail_P: Tensor


def stored_head(
    targets: TopKTargets, rows_P: Tensor, temperature: float, needed_by: str
) -> StoredHead:
    """The head of padded targets at flat rows, at a temperature that was captured."""
    at_rows = targets.map(lambda x: x.flatten(0, 1)[rows_P.to(x.device)] if x.ndim > 1 else x)
    logprobs_PK = at_least_float32(at_rows.logprobs)
    held_PK = at_rows.ids != PAD_ID
    probs_PK = tempered_logprobs(logprobs_PK, at_rows, temperature, needed_by).exp()
    probs_PK = probs_PK.masked_fill(~held_PK, 0.0)
    if temperature == 1 and at_rows.log_tail is not None:
        tail_P = at_rows.log_tail.to(probs_PK.dtype).exp()
    else:
        # Enters linearly, never through a logarithm, so that the rounding of 1 - sum is harmless.
        tail_P = (1 - probs_PK.sum(-1)).clamp_min(0)
    if targets.k >= targets.vocab_size:
        tail_P = tail_P.masked_fill(held_PK.sum(-1) >= targets.vocab_size, 0.0)
    return StoredHead(probs_PK, held_PK, tail_P)


def sorted_distance(
    student_PV: Tensor,
    teacher_PV: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    log_scale_P: Tensor | None = None,
    teacher_log_scale_P: Tensor | None = None,
) -> Tensor:
    """[P]: sum_i |c q~(i) - d p~(i)| of two vocabularies' logits; c, d are 1 or exp(log scale)."""
    width = max(student_PV.shape[-1], teacher_PV.shape[-1])

    def of_chunk(
        student_pV: Tensor, teacher_pV: Tensor, log_scale_p: Tensor, teacher_log_scale_p: Tensor
    ) -> Tensor:
        q_pV = _sorted_probs(student_pV, student_temperature, log_scale_p, width)
        with torch.no_grad():
            p_pV = _sorted_probs(teacher_pV, teacher_temperature, teacher_log_scale_p, width)
        return (q_pV - p_pV.to(q_pV)).abs().sum(-1)

    one_P = at_least_float32(student_PV).new_zeros(student_PV.shape[0])
    return in_row_chunks(
        of_chunk,
        width,
        student_PV,
        teacher_PV,
        one_P if log_scale_P is None else log_scale_P,
        one_P if teacher_log_scale_P is None else teacher_log_scale_P,
    )


def _sorted_probs(logits_pV: Tensor, temperature: float, log_scale_p: Tensor, width: int) -> Tensor:
    logprobs_pV = torch.log_softmax(at_least_float32(logits_pV) / temperature, -1)
    probs_pV = (logprobs_pV + log_scale_p.to(logprobs_pV)[:, None]).exp()
    sorted_pV = probs_pV.sort(-1, descending=True).values
    return torch.nn.functional.pad(sorted_pV, (0, width - sorted_pV.shape[-1]))


def sorted_distance_to_head(
    student_PV: Tensor,
    head: StoredHead,
    student_temperature: float,
    tail: Tail,
    log_scale_P: Tensor | None = None,
) -> Tensor:
    """[P]: the head of sum_i |c q~(i) - p~(i)| exactly, and its tail as `tail` says.

    The student is never sorted: its K largest logits and one logsumexp per row are enough.
    """

    def of_chunk(
        student_pV: Tensor, probs_pK: Tensor, held_pK: Tensor, tail_p: Tensor, log_scale_p: Tensor
    ) -> Tensor:
        z_pV = at_least_float32(student_pV)
        if student_temperature != 1:
            z_pV = z_pV / student_temperature
        k = min(probs_pK.shape[-1], z_pV.shape[-1])
        lse_p1 = torch.logsumexp(z_pV, -1, keepdim=True)
        q_pK = (z_pV.topk(k).values - lse_p1).exp()
        # A student with fewer ids than K has zeros there.
        q_pK = torch.nn.functional.pad(q_pK, (0, probs_pK.shape[-1] - k))
        q_pK = torch.where(held_pK, q_pK, 0.0)
        scale_p = log_scale_p.exp()
        # As for the teacher: linear, so 1 - sum is accurate enough; nothing is left when K = V.
        student_tail_p = scale_p * (1 - q_pK.sum(-1)).clamp_min(0)
        student_tail_p = student_tail_p.masked_fill(held_pK.sum(-1) >= z_pV.shape[-1], 0.0)
        head_p = (scale_p[:, None] * q_pK - probs_pK.to(q_pK)).abs().sum(-1)
        if tail == "zero":
            return head_p + student_tail_p
        return head_p + (student_tail_p - tail_p.to(q_pK)).abs()

    if log_scale_P is None:
        log_scale_P = at_least_float32(student_PV).new_zeros(student_PV.shape[0])
    return in_row_chunks(of_chunk, student_PV.shape[-1], student_PV, *head, log_scale_P)
