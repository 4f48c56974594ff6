"""The hybrid distance of GOLD: ids that both vocabularies share, and the rest by rank.

Rows are sub-distributions c softmax(z / T); every formula holds for any total mass.

Letters: G rows, V vocabulary, M matched ids, K stored ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logitstore.losses.dense_divergence import LOG_ZERO
from logitstore.losses.sequences import in_row_chunks
from logitstore.losses.sorted_probs import StoredHead
from logitstore.spec.errors import UsageError
from logitstore.targets.dense import at_least_float32

__all__ = ["hybrid_distance", "hybrid_distance_to_head"]


def hybrid_distance(
    student_GV: Tensor,
    teacher_GV: Tensor,
    matched_ids: tuple[Tensor, Tensor],
    weights: tuple[float, float],
    beta: float,
    temperatures: tuple[float, float],
    log_scales: tuple[Tensor, Tensor],
) -> Tensor:
    """[G]: weights[0] JSD_beta over matched columns + weights[1] sorted L1 over the others.

    `matched_ids` are (student, teacher) int64 [M]; `temperatures` and `log_scales` (log c, [G]) are
    (student, teacher) too. A side without unmatched ids is all zeros there.
    """
    student_ids_M, teacher_ids_M = matched_ids
    student_rest = _other_ids(student_ids_M, student_GV.shape[-1])
    teacher_rest = _other_ids(teacher_ids_M, teacher_GV.shape[-1])
    rest_width = max(student_rest.numel(), teacher_rest.numel())

    def of_chunk(
        student_gV: Tensor, teacher_gV: Tensor, log_scale_g: Tensor, teacher_log_scale_g: Tensor
    ) -> Tensor:
        log_q_gV = _scaled_logprobs(student_gV, temperatures[0], log_scale_g)
        with torch.no_grad():
            log_p_gV = _scaled_logprobs(teacher_gV, temperatures[1], teacher_log_scale_g)
            log_p_gV = log_p_gV.to(log_q_gV.dtype)
            rest_p_gW = _sorted(log_p_gV[:, teacher_rest].exp(), rest_width)
        jsd_g = _jsd_terms(log_p_gV[:, teacher_ids_M], log_q_gV[:, student_ids_M], beta).sum(-1)
        rest_q_gW = _sorted(log_q_gV[:, student_rest].exp(), rest_width)
        return weights[0] * jsd_g + weights[1] * (rest_q_gW - rest_p_gW).abs().sum(-1)

    width = max(student_GV.shape[-1], teacher_GV.shape[-1])
    return in_row_chunks(of_chunk, width, student_GV, teacher_GV, *log_scales)


def hybrid_distance_to_head(
    student_GV: Tensor,
    head: StoredHead,
    ids_GK: Tensor,
    teacher_vocab_size: int,
    matched_ids: tuple[Tensor, Tensor],
    weights: tuple[float, float],
    beta: float,
    temperature: float,
    log_scale_G: Tensor,
) -> Tensor:
    """[G]: a lower bound of `hybrid_distance` from the K stored ids of a teacher that are `head`.

    Stored matched ids enter the JSD exactly; stored unmatched ids are the largest of their kind, so
    they meet the student's largest unmatched probabilities exactly. The mass nobody knows, r, goes
    to either part where it makes that part smallest.
    """
    if not 0 < beta < 1:
        raise UsageError(
            "bad-argument",
            "the hybrid distance from a top-K record is bounded only inside 0 < beta < 1",
            got=beta,
            expected="0 < beta < 1, or dense targets",
        )
    student_ids_M, teacher_ids_M = matched_ids
    student_of_teacher_V = ids_GK.new_full((teacher_vocab_size,), -1)
    student_of_teacher_V[teacher_ids_M] = student_ids_M
    student_rest = _other_ids(student_ids_M, student_GV.shape[-1])

    def of_chunk(
        student_gV: Tensor,
        probs_gK: Tensor,
        held_gK: Tensor,
        tail_g: Tensor,
        ids_gK: Tensor,
        log_scale_g: Tensor,
    ) -> Tensor:
        log_q_gV = _scaled_logprobs(student_gV, temperature, log_scale_g)
        p_gK, tail_g = probs_gK.to(log_q_gV.dtype), tail_g.to(log_q_gV.dtype)
        student_id_gK = student_of_teacher_V[ids_gK.clamp_min(0)]
        matched_gK = held_gK & (student_id_gK >= 0)
        log_q_gK = log_q_gV.gather(-1, student_id_gK.clamp_min(0))
        terms_gK = _jsd_terms(p_gK.log().clamp_min(LOG_ZERO), log_q_gK, beta)
        jsd_g = torch.where(matched_gK, terms_gK, 0.0).sum(-1)
        # Student mass on matched ids that are not stored, against at most r: equal masses cost 0.
        stored_q_g = torch.where(matched_gK, log_q_gK.exp(), 0.0).sum(-1)
        matched_tail_g = (log_q_gV[:, student_ids_M].exp().sum(-1) - stored_q_g).clamp_min(0)
        log_tail_q_g = matched_tail_g.clamp_min(torch.finfo(p_gK.dtype).tiny).log()
        log_tail_p_g = torch.minimum(tail_g.log().clamp_min(LOG_ZERO), log_tail_q_g)
        jsd_g = jsd_g + torch.where(
            matched_tail_g > tail_g, _jsd_terms(log_tail_p_g, log_tail_q_g, beta), 0.0
        )
        # Stored unmatched ids in descending order, then zeros.
        unmatched_gK = held_gK & ~matched_gK
        rest_p_gK = p_gK.masked_fill(~unmatched_gK, 0.0).sort(-1, descending=True).values
        k = p_gK.shape[-1]
        rest_q_gW = log_q_gV[:, student_rest]
        kept = min(k, student_rest.numel())
        rest_q_gK = torch.nn.functional.pad(rest_q_gW.topk(kept).values.exp(), (0, k - kept))
        in_head_gK = torch.arange(k, device=p_gK.device) < unmatched_gK.sum(-1, keepdim=True)
        rest_q_gK = torch.where(in_head_gK, rest_q_gK, 0.0)
        rest_tail_g = (rest_q_gW.exp().sum(-1) - rest_q_gK.sum(-1)).clamp_min(0)
        rest_g = (rest_q_gK - rest_p_gK).abs().sum(-1) + (rest_tail_g - tail_g).clamp_min(0)
        return weights[0] * jsd_g + weights[1] * rest_g

    return in_row_chunks(of_chunk, student_GV.shape[-1], student_GV, *head, ids_GK, log_scale_G)


def _jsd_terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Per column beta p log(p/m) + (1 - beta) q log(q/m); KL(p || q) at beta 0, KL(q || p) at 1."""
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _scaled_logprobs(logits_gV: Tensor, temperature: float, log_scale_g: Tensor) -> Tensor:
    logprobs_gV = torch.log_softmax(at_least_float32(logits_gV) / temperature, -1)
    return (logprobs_gV + log_scale_g.to(logprobs_gV.dtype)[:, None]).clamp_min(LOG_ZERO)


def _sorted(values_gW: Tensor, width: int) -> Tensor:
    sorted_gW = values_gW.sort(-1, descending=True).values
    return torch.nn.functional.pad(sorted_gW, (0, width - sorted_gW.shape[-1]))


def _other_ids(ids_M: Tensor, vocab_size: int) -> Tensor:
    other_V = torch.ones(vocab_size, dtype=torch.bool, device=ids_M.device)
    other_V[ids_M] = False
    return other_V.nonzero()[:, 0]
