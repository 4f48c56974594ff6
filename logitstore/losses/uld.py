"""Universal logit distillation: compare sorted probabilities, no shared vocabulary needed.

Letters: B samples, T student positions, V vocabulary, K stored ids, P pairs of rows, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.losses.contract import LossAndCount, Reduction, loss
from logitstore.losses.sequences import both_sides, reduce_sequences, sequence_rows
from logitstore.losses.sorted_probs import (
    Tail,
    sorted_distance,
    sorted_distance_to_head,
    stored_head,
)
from logitstore.targets import DenseTargets, Targets, TopKTargets

__all__ = ["uld"]


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

    student_RV = student_logits.flatten(0, 1)
    student_rows_P = first_rows(student_sequences)
    target_rows_P = first_rows(target_sequences)
    if isinstance(sides.targets, DenseTargets):
        teacher_PV = sides.targets.logits.flatten(0, 1)[target_rows_P]
        distance_P = sorted_distance(
            student_RV, student_rows_P, teacher_PV, student_temperature, teacher_temperature
        )
    else:
        assert isinstance(sides.targets, TopKTargets)
        head = stored_head(sides.targets, target_rows_P, teacher_temperature, "uld")
        distance_P = sorted_distance_to_head(
            student_RV, student_rows_P, head, student_temperature, missing
        )
    num_pairs_S = num_pairs_S.to(device)
    sequence_P = torch.repeat_interleave(
        torch.arange(len(shared), device=device), num_pairs_S, output_size=distance_P.numel()
    )
    sum_S = distance_P.new_zeros(len(shared)).index_add(0, sequence_P, distance_P)
    loss_S = sum_S / num_pairs_S.clamp_min(1)
    return reduce_sequences(loss_S, num_pairs_S > 0, reduction, with_count)
