"""Graph-on-logits distillation: second-order statistics of the top-k logits over a sequence.

Letters: R rows of a batch, N rows that count, V vocabulary, k nodes of the rank form, G sequences
(samples, or segments of packed samples), n nodes of the vocabulary form.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from logitstore.losses.contract import (
    LossAndCount,
    Reduction,
    align,
    loss,
    require,
)
from logitstore.losses.positions import counted_positions, exact_head
from logitstore.losses.sequences import (
    both_sides,
    reduce_sequences,
    sequence_rows,
    student_rows,
)
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import (
    PAD_ID,
    DenseTargets,
    GraphTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
)
from logitstore.targets.dense import at_least_float32

__all__ = ["gld", "gromov_wasserstein_square", "topk_wasserstein"]

DEFAULT_K = 10


class _Nodes(NamedTuple):
    """Largest logits of counted rows and their ids, each row's sequence, and rows per sequence."""

    values_Nk: Tensor
    ids_Nk: Tensor
    group_N: Tensor
    count_G: Tensor


@loss(
    signals={"dense": "exact", "topk": "exact", "threshold": "exact", "graph": "exact"},
    needs={"topk": ("lse",), "threshold": ("lse",)},
    source="arXiv:2505.13893 (InfiGFusion), framework figure; bounds derived for this project",
    aliases=("graph_on_logits",),
)
def gld(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    target_segment_ids: Tensor | None = None,
    k: int | None = None,
    form: Literal["rank", "vocab"] = "rank",
    per_position: bool = False,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over sequences of sum_i |sort(f_T)_i - sort(f_S)_i|, in squared logits.

    Of every counted row take the k largest *raw* logits v_t in descending order. The rank form has
    one node per rank: C = sum_t v_t v_t^T, f = C 1 = sum_t (sum_i v_ti) v_t, [k]. The vocabulary
    form has one node per id that is in any row's top k. C is never formed: f is enough.

    GW~ / n^2 <= sqrt(mean_i ((f_T - f_S)_i / n)^2) <= GW2, the Gromov-Wasserstein distance of the
    two graphs with uniform weights and square loss (Memoli's first lower bound), n the larger
    number of nodes in the rank form: the closed form is a scaled lower bound, not an estimate of
    GW2.

    Args:
        student_logits: float [B, T, V]. Not shift-invariant: the loss drives scale and offset too.
        targets: dense; topk or the exact head of threshold, with `lse` (raw logits, log-probs alone
            would give another number) and at least k ids at every counted row; or graph, whose mask
            was fixed at capture. Neither vocabulary nor length need be the student's. Always-ids
            play no part beside topk and are refused beside threshold, whose head then need not hold
            the k largest.
        labels, mask: [B, T], which rows of the student count, as in every loss. Masked before the
            product.
        target_mask: bool [B, U], which rows of the targets count; default: the same tokens, so the
            same mask.
        segment_ids: int [B, T], one graph per (sample, segment) of packed samples instead of one
            per sample.
        target_segment_ids: int [B, U]; default `segment_ids`. Equal ids of equal samples are
            compared.
        k: logits per row, default 10 (the paper gives none), or what graph targets hold. A smaller
            k than was stored is exact, except from graph targets that kept row sums only.
        form: "rank" (default, fits the published [B, d', d'] shape) or "vocab" (fits the abstract's
            words). Zeros are appended to the shorter f *after* sorting.
        per_position: divide f of each side by its number of counted rows, for sides of different
            length.
        reduction: over sequences; "none" gives [G] in order of sample, then segment id.
        with_count: also return the number of sequences.

    Raises: TargetsError aux-missing (lse), targets-mismatch (fewer than k stored; other segments),
        shape-mismatch, empty-mask.

    The gradient is sign-valued, grows like L k |z| and does not vanish near the optimum: use a
    small weight or `per_position`. k, the weight and any standardisation of logits are unpublished;
    the official repository has no loss code.

    Source: arXiv:2505.13893.
    """
    if form not in ("rank", "vocab"):
        raise UsageError("bad-argument", "unknown form", got=form, expected="rank or vocab")
    _refuse_always_ids(targets, "gld")
    if isinstance(targets, GraphTargets):
        sequences = sequence_rows(student_rows(student_logits, labels, mask), segment_ids)
        teacher_f, teacher_count_G = _stored_graphs(targets, k, form, list(sequences))
        # Row sums of the vocabulary form do not tell how many logits per row they were made from.
        if k is None:
            k = targets.row_sums.shape[-1] if form == "rank" else DEFAULT_K
    else:
        k = DEFAULT_K if k is None else k
        sides = both_sides(student_logits, targets, labels, mask, target_mask)
        sequences = sequence_rows(sides.mask_BT, segment_ids)
        if target_segment_ids is None and target_mask is None:
            target_segment_ids = segment_ids
        teacher_sequences = sequence_rows(sides.target_mask_BU, target_segment_ids)
        shared = [key for key in sequences if key in teacher_sequences]
        with torch.no_grad():
            teacher = _teacher_nodes(sides.targets, k, [teacher_sequences[key] for key in shared])
            teacher_f, teacher_count_G = _sorted_row_sums(teacher, form), teacher.count_G
        sequences = {key: sequences[key] for key in shared}
    student = _student_nodes(student_logits, k, list(sequences.values()))
    student_f = _sorted_row_sums(student, form)
    teacher_f = teacher_f.to(student_f)
    teacher_count_G = teacher_count_G.to(student_f.device)
    if per_position:
        student_f = student_f / student.count_G.clamp_min(1)[:, None]
        teacher_f = teacher_f / teacher_count_G.clamp_min(1)[:, None]
    width = max(student_f.shape[-1], teacher_f.shape[-1])
    difference_GK = _zero_padded(student_f, width) - _zero_padded(teacher_f, width)
    counted_G = (student.count_G > 0) & (teacher_count_G > 0)
    return reduce_sequences(difference_GK.abs().sum(-1), counted_G, reduction, with_count)


@loss(
    signals={"dense": "exact", "topk": "exact", "threshold": "exact"},
    needs={"topk": ("lse",), "threshold": ("lse",)},
    source="arXiv:2505.13893 (InfiGFusion), framework figure (token term)",
)
def topk_wasserstein(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    k: int = DEFAULT_K,
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over rows of sum_i |i-th largest student logit - i-th largest teacher logit|, i = 1..k.

    The token term WD~ beside GLD in the paper's figure: k times the one-dimensional Wasserstein
    distance of the two sets of k raw logits. Ids play no part; not shift-invariant.

    Args: as in `gld`, for sides that share tokens. Both need k ids per counted row and raw logits
        (`lse`).

    Raises: TargetsError aux-missing, targets-mismatch (fewer than k stored), shape-mismatch,
        empty-mask.

    Source: arXiv:2505.13893, framework figure; the predecessor InfiFusion z-scores the logits
        first, which the figure does not show and this function does not do.
    """
    _refuse_always_ids(targets, "topk_wasserstein")
    at = counted_positions(
        align(student_logits, targets, labels, mask, upcast=False), always_ids=False
    )
    student_Nk = at.student_NV.topk(_checked_k(k, at.student_NV.shape[-1])).values
    with torch.no_grad():
        if isinstance(at.targets, DenseTargets):
            teacher_Nk = _largest_logits(at.targets.logits, k)[0]
        else:
            assert isinstance(at.targets, TopKTargets)
            head = at.targets
            if isinstance(targets, ThresholdTargets) and head.label_rank is not None:
                head = _without_outranked_label(head)
            lse_N = require(head, "lse", "topk_wasserstein")
            teacher_Nk = _stored_logits(head.ids, head.logprobs, lse_N, k)[0]
    student_Nk = at_least_float32(student_Nk)
    return at.reduce((student_Nk - teacher_Nk.to(student_Nk)).abs().sum(-1), reduction, with_count)


def gromov_wasserstein_square(first_nn: Tensor, second_nn: Tensor) -> tuple[Tensor, Tensor]:
    """Exact squared Gromov-Wasserstein distance GW2^2 of two small co-activation matrices.

    Uniform weights 1/n and square loss: mean(C^2) + mean(D^2) - (2/n^2) max_pi tr(C pi D pi^T).
    Gram matrices are positive semidefinite, so the maximand is convex and a permutation is optimal:
    n! of them are tried.

    Args:
        first_nn, second_nn: float [n, n], symmetric positive semidefinite, n <= 9 (362,880
            permutations).

    Returns: scalar GW2^2 and the permutation int64 [n] that pairs node i of the first with node
        perm[i] of the second.

    Raises: UsageError bad-argument when n > 9 or the shapes differ.
    """
    n = first_nn.shape[0]
    if first_nn.shape != second_nn.shape or first_nn.shape != (n, n) or n > 9:
        raise UsageError(
            "bad-argument",
            "exact Gromov-Wasserstein enumerates permutations of equal, small graphs",
            got=f"{list(first_nn.shape)} and {list(second_nn.shape)}",
            expected="two [n, n] matrices, n <= 9",
            hint="for larger graphs use POT's gromov_wasserstein2, a local solver",
        )
    best = first_nn.new_tensor(torch.inf)
    best_perm = torch.arange(n)
    permutations = itertools.permutations(range(n))
    while chunk := list(itertools.islice(permutations, 40_320)):
        perm_Pn = torch.tensor(chunk, device=first_nn.device)
        paired_Pnn = second_nn[perm_Pn[:, :, None], perm_Pn[:, None, :]]
        cost_P = (first_nn - paired_Pnn).square().mean((-2, -1))
        value, index = cost_P.min(0)
        if value < best:
            best, best_perm = value, perm_Pn[index]
    return best, best_perm


def _student_nodes(student_logits: Tensor, k: int, rows_of_sequence: list[Tensor]) -> _Nodes:
    num_rows = student_logits.shape[0] * student_logits.shape[1]
    student_RV = student_logits.reshape(num_rows, -1)
    # topk before the selection: masked rows then get exact zeros, whatever they hold, without a
    # copy of the rest.
    values_Rk, ids_Rk = student_RV.topk(_checked_k(k, student_RV.shape[-1]))
    rows_N = _joined(rows_of_sequence).to(values_Rk.device)
    return _nodes(at_least_float32(values_Rk[rows_N]), ids_Rk[rows_N], rows_of_sequence)


def _teacher_nodes(targets: Targets, k: int, rows_of_sequence: list[Tensor]) -> _Nodes:
    if isinstance(targets, ThresholdTargets):
        # A head's width differs between rows, so the flat form is cut first and padded afterwards.
        head = exact_head(targets)
        head = _without_outranked_label(head) if head.label_rank is not None else head
        targets = head.padded() if head.lengths is not None else head
    rows_N = _joined(rows_of_sequence)

    def take(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[rows_N.to(x.device)]

    if isinstance(targets, DenseTargets):
        values_Nk, ids_Nk = _largest_logits(take(targets.logits), k)
    else:
        assert isinstance(targets, TopKTargets)
        lse_BU = require(targets, "lse", "gld")
        values_Nk, ids_Nk = _stored_logits(
            take(targets.ids), take(targets.logprobs), take(lse_BU), k
        )
    return _nodes(values_Nk, ids_Nk, rows_of_sequence)


def _largest_logits(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_Nk, ids_Nk = logits_NV.topk(_checked_k(k, logits_NV.shape[-1]))
    if bool(torch.isneginf(values_Nk).any()):
        raise _too_few_ids(int((values_Nk > -torch.inf).sum(-1).min()), k)
    return at_least_float32(values_Nk), ids_Nk


def _too_few_ids(held: int, k: int) -> TargetsError:
    return TargetsError(
        "targets-mismatch",
        "a counted position holds fewer exact ids than the loss compares",
        got=f"{held} ids that can occur",
        expected=f"at least k = {k}",
        hint=f"pass a smaller k, or capture with --signal topk:K={k} or threshold:k={k + 1}",
    )


def _stored_logits(
    ids_NK: Tensor, logprobs_NK: Tensor, lse_N: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest raw logits of rows that store K >= k ids in descending order."""
    possible_NK = (ids_NK != PAD_ID) & (logprobs_NK > -torch.inf)
    held = int(possible_NK.sum(-1).min()) if ids_NK.shape[0] else k
    if held < k:
        raise _too_few_ids(held, k)
    # float16 log-probs lose what a large lse adds; the sum is formed in float32 or better.
    logprobs_Nk = at_least_float32(logprobs_NK[:, :k])
    return logprobs_Nk + lse_N[:, None].to(logprobs_Nk.dtype), ids_NK[:, :k]


def _refuse_always_ids(targets: Targets, name: str) -> None:
    """A threshold head without its always-ids need not hold the k largest."""
    if isinstance(targets, ThresholdTargets) and targets.always_ids is not None:
        raise TargetsError(
            "targets-mismatch",
            f"{name} needs the k largest logits, which a threshold record with always-ids does not "
            "rank",
            got=f"threshold with {targets.always_ids.numel()} always-ids",
            expected="topk, dense, or threshold without always-ids",
        )


def _without_outranked_label(head: TopKTargets) -> TopKTargets:
    """Drop realised tokens that the head holds as such and not for their rank."""
    assert head.label_rank is not None
    num_heads_N = (head.ids != PAD_ID).sum(-1)
    outranked_N = head.label_rank >= num_heads_N
    rank_K = torch.arange(head.k, device=head.ids.device)
    last_NK = (rank_K == num_heads_N[:, None] - 1) & outranked_N[:, None]
    return dataclasses.replace(head, ids=head.ids.masked_fill(last_NK, PAD_ID))


def _nodes(values_Nk: Tensor, ids_Nk: Tensor, rows_of_sequence: list[Tensor]) -> _Nodes:
    count_G = torch.tensor([rows.numel() for rows in rows_of_sequence])
    group_N = torch.repeat_interleave(torch.arange(count_G.numel()), count_G)
    device = values_Nk.device
    return _Nodes(values_Nk, ids_Nk, group_N.to(device), count_G.to(device))


def _joined(rows_of_sequence: list[Tensor]) -> Tensor:
    return torch.cat(rows_of_sequence) if rows_of_sequence else torch.empty(0, dtype=torch.int64)


def _sorted_row_sums(nodes: _Nodes, form: str) -> Tensor:
    """f of every sequence, descending: [G, k], or [G, n] with zeros after its own nodes."""
    num_groups = nodes.count_G.numel()
    contribution_Nk = nodes.values_Nk * nodes.values_Nk.sum(-1, keepdim=True)
    if form == "rank":
        f_Gk = contribution_Nk.new_zeros(num_groups, contribution_Nk.shape[-1])
        return f_Gk.index_add(0, nodes.group_N, contribution_Nk).sort(-1, descending=True).values
    # One node per (sequence, id); the ids of a sequence follow each other in the sorted keys.
    base = int(nodes.ids_Nk.max()) + 1 if nodes.ids_Nk.numel() else 1
    key_Nk = nodes.group_N[:, None] * base + nodes.ids_Nk
    key_U, node_Nk = torch.unique(key_Nk, return_inverse=True)
    f_U = contribution_Nk.new_zeros(key_U.numel())
    f_U = f_U.index_add(0, node_Nk.reshape(-1), contribution_Nk.reshape(-1))
    num_nodes_G = torch.bincount(key_U // base, minlength=num_groups)
    width = int(num_nodes_G.max()) if num_groups else 0
    valid_Gn = torch.arange(width, device=f_U.device) < num_nodes_G[:, None]
    # -inf keeps absent nodes behind negative entries; they become zero only after the sort.
    f_Gn = f_U.new_full((num_groups, width), -torch.inf).masked_scatter(valid_Gn, f_U)
    return torch.where(valid_Gn, f_Gn.sort(-1, descending=True).values, 0.0)


def _stored_graphs(
    targets: GraphTargets, k: int | None, form: str, sequences: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Sorted f [G, k or n] and counted rows [G] of graph targets, one per student sequence."""
    stored_form = "rank" if targets.node_ids is None else "vocab"
    if form != stored_form:
        raise TargetsError(
            "targets-mismatch",
            "these graphs were captured in the other form",
            got=stored_form,
            expected=form,
            hint=f"pass form={stored_form!r}, or capture with --signal graph:k=...,form={form}",
        )
    f_Gk = at_least_float32(targets.row_sums)
    if form == "vocab":
        assert targets.node_ids is not None
        valid_Gn = targets.node_ids != PAD_ID
        f_Gk = f_Gk.masked_fill(~valid_Gn, -torch.inf).sort(-1, descending=True).values
        f_Gk = f_Gk.masked_fill(f_Gk == -torch.inf, 0.0)
    else:
        stored_k = f_Gk.shape[-1]
        if k is not None and (k > stored_k or (k < stored_k and targets.coactivation is None)):
            raise TargetsError(
                "targets-mismatch",
                "these graphs do not hold the first k ranks",
                got=f"k = {stored_k}"
                + ("" if targets.coactivation is not None else ", row sums only"),
                expected=f"k = {k}",
            )
        if k is not None and k < stored_k:
            assert targets.coactivation is not None
            f_Gk = at_least_float32(targets.coactivation)[:, :k, :k].sum(-1)
        f_Gk = f_Gk.sort(-1, descending=True).values
    index_G = _graph_of_sequence(targets, sequences)
    return f_Gk[index_G], targets.num_positions[index_G]


def _graph_of_sequence(targets: GraphTargets, sequences: list[tuple[int, int]]) -> Tensor:
    num_segments_B = targets.num_segments.tolist()
    positions_G = targets.num_positions.tolist()
    index: list[int] = []
    first = 0
    for b, num_segments in enumerate(num_segments_B):
        own = list(range(first, first + num_segments))
        first += num_segments
        wanted = sum(sample == b for sample, _ in sequences)
        if wanted != num_segments:
            # A segment of one token predicts nothing: it has a graph without positions and no
            # counted row.
            own = [g for g in own if positions_G[g] > 0]
        if wanted != len(own):
            raise TargetsError(
                "targets-mismatch",
                "student and store disagree about the segments of a sample",
                where=f"sample {b} of the batch",
                got=f"{wanted} segments with counted rows",
                expected=f"{len(own)} graphs",
                hint="pass segment_ids=batch.segment_ids and the store's own loss_mask",
            )
        index += own
    if sequences and len(num_segments_B) <= max(sample for sample, _ in sequences):
        raise TargetsError(
            "shape-mismatch",
            "student_logits and targets disagree",
            got=f"{max(sample for sample, _ in sequences) + 1} samples",
            expected=f"{len(num_segments_B)} samples (from targets.num_segments)",
        )
    return torch.tensor(index, dtype=torch.int64, device=targets.num_positions.device)


def _checked_k(k: int, vocab_size: int) -> int:
    if not 1 <= k <= vocab_size:
        raise TargetsError(
            "k-exceeds-vocabulary",
            "cannot compare that many logits",
            got=k,
            expected=f"1..{vocab_size}",
        )
    return k


def _zero_padded(f_Gk: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(f_Gk, (0, width - f_Gk.shape[-1]))
