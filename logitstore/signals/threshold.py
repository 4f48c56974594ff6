"""Threshold sampling: large probabilities exactly, the rest sampled with one weight, least
variance.

Per position, over the ids that are neither the realised next token nor an always-id (both are known
exactly for free), with probabilities p_1 >= p_2 >= .. and mass M:

    k    = ceil(sum_i min(1, p_i / tau0))                          (or the fixed k of
    `threshold:k=K`) h    = least h < k with p_(h+1) (k - h) < R_h,  R_h the mass outside the h
    largest;  tau = R_h / (k - h) head = the h largest;  tail = k - h ids by systematic sampling
    with inclusion probability p_i / tau

Every tail id weighs R_h / (k - h), so the weights of a position add up to 1 and E[w] = p. When no
such h exists the support has at most k ids and all of it is head.

Stored: head ids and log-probs, tail ids, and `tail_logprob` = log R_h. Log-probs are multiples of
1/64 nat, rounded up or down at random such that the *probability* is right on average. The largest
head's reads 0: its probability is what is missing to 1, so no rounding can make the weights of a
position add up to anything else. (An implied tail would turn negative at 0.01 % of real positions
with float16 heads, at 13 % with steps of 1/16.) Ids ascend, since a set costs fewer bytes than a
list. A position without heads has `tail_logprob` 0, and its tail is what is missing to 1.

Draws: 0 places the systematic grid, 1 rounds the tail's mass, 1 + j the j-th largest other head.

Source: Fearnhead & Clifford 2003 (JRSS B 65:4); Szegedy & Thorup, ESA 2007; arXiv:0803.0473.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.signals import random
from logitstore.signals.draws import InverseCdf
from logitstore.signals.encoder import Rows, register
from logitstore.signals.sampled import without
from logitstore.signals.selection import exact_topk
from logitstore.spec.header import Header
from logitstore.spec.signals import HEAD_STEP, ThresholdSpec

__all__ = ["ThresholdEncoder", "solve_threshold"]

# Steps a u16 holds; exp(-65535 / 64) is 0 in float64, so the last one stands for "no mass".
_MAX_STEPS = 65_535


@register("threshold")
class ThresholdEncoder:
    """Head ids with log-probs, tail ids, both ascending, and the tail's mass."""

    def __init__(self, spec: ThresholdSpec, header: Header) -> None:
        self._tau = spec.tau_value
        self._most = spec.budget
        self._always = header.always_ids

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        scale = (rows.top - rows.lse).double().exp()  # exp_z * scale = probability
        p_sorted, ids_sorted, residual, mass = self._largest(rows, scale)
        if self._tau is None:
            k = torch.full_like(rows.labels, self._most)
        else:
            below = (p_sorted < self._tau).double()
            share = (1 - below).sum(-1) + ((p_sorted * below).sum(-1) + residual) / self._tau
            # Float error must not turn an exact budget of 7 into 8.
            k = torch.ceil(share - 1e-7).long().clamp_(0, self._most)
            k = torch.where(mass > 0, k.clamp_min(1), 0)
        num_heads, tail_mass, num_tails = solve_threshold(p_sorted, residual, k)
        slots = torch.arange(p_sorted.shape[-1], device=rows.z.device)
        is_head = slots < num_heads[:, None]
        steps = self._steps(rows, p_sorted, is_head, tail_mass)
        tails = self._tail_ids(rows, ids_sorted, is_head, num_tails)
        tail_steps = torch.where(num_heads > 0, steps[:, 0], 0)
        steps[:, 0] = 0
        ascending = ids_sorted.masked_fill(~is_head, rows.z.shape[-1]).argsort(-1)
        return {
            "tail_logprob": tail_steps * -HEAD_STEP,
            "num_heads": num_heads,
            "head_ids": ids_sorted.gather(-1, ascending)[is_head],
            "head_logprobs": steps.gather(-1, ascending)[is_head] * -HEAD_STEP,
            "tail_ids": tails,
            "num_tails": num_tails,
        }

    def _largest(self, rows: Rows, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `most` largest of the other ids (float64 p, ids), the mass beyond them, all their
        mass."""
        vocab_size = rows.z.shape[-1]
        spare = 1 + len(self._always)
        found = exact_topk(rows.z, min(self._most + spare, vocab_size)).ids
        free = found == rows.labels[:, None]
        if self._always:
            always = torch.tensor(self._always, device=found.device)
            free |= (found[:, :, None] == always).any(-1)
        # Ids that are known for free move to the end; the order of the others stays.
        order = torch.argsort(free.int(), dim=-1, stable=True)
        ids = found.gather(-1, order)
        p = rows.exp_z.gather(-1, ids).double() * scale[:, None]
        p = p.masked_fill(free.gather(-1, order), 0.0)
        width = min(self._most, ids.shape[-1])
        ids, p = ids[:, :width], p[:, :width]
        rest = rows.exp_z.scatter(-1, ids, 0.0)
        self._clear_free(rest, rows.labels)
        residual = rest.sum(-1, dtype=torch.float64) * scale
        return p, ids, residual, residual + p.sum(-1)

    def _clear_free(self, weights_RV: Tensor, labels: Tensor) -> None:
        rows_with_label = (labels >= 0).nonzero()[:, 0]
        weights_RV[rows_with_label, labels[rows_with_label]] = 0.0
        if self._always:
            weights_RV[:, list(self._always)] = 0.0

    def _steps(self, rows: Rows, p: Tensor, is_head: Tensor, tail_mass: Tensor) -> Tensor:
        """int64 [R, H] multiples of -HEAD_STEP: the tail's mass in slot 0, heads in the others."""
        values = torch.cat([tail_mass[:, None], p[:, 1:]], -1)
        slot = torch.arange(values.shape[-1], device=p.device)
        uniform = random.uniform(
            rows.seed, rows.keys[:, None], rows.positions[:, None], 1 + slot[None, :]
        )
        low = torch.ceil(-values.log() / HEAD_STEP).clamp_(0, _MAX_STEPS)  # next smaller value
        p_low = torch.exp(-low * HEAD_STEP)
        p_high = torch.exp(-(low - 1) * HEAD_STEP)
        up = (uniform < (values - p_low) / (p_high - p_low)) & (low > 0)
        steps = torch.where(up, low - 1, low)
        # What is left for the largest head must stay positive; if many roundings went up together,
        # take all of them down. With tau >= 1/64 this cannot happen: h - 1 heads err by p / 64
        # each.
        others = torch.exp(-steps * HEAD_STEP) * is_head
        known = self._known_mass(rows)
        short = (1 - known - others.sum(-1) <= p[:, 0] / 8) & is_head[:, 0]
        return torch.where(short[:, None], low, steps).long()

    def _known_mass(self, rows: Rows) -> Tensor:
        """float64 [R]: probability of label and always-ids as a reader will see it (float16
        log-probs)."""
        has_label = rows.labels >= 0
        z_label = rows.z.gather(-1, rows.labels.clamp_min(0)[:, None])[:, 0]
        logprob = (z_label - rows.lse).half().double()
        label_is_always = torch.zeros_like(has_label)
        total = torch.zeros_like(logprob)
        if self._always:
            always = torch.tensor(self._always, device=rows.z.device)
            total = (rows.z[:, always] - rows.lse[:, None]).half().double().exp().sum(-1)
            label_is_always = (rows.labels[:, None] == always).any(-1)
        return total + torch.where(has_label & ~label_is_always, logprob.exp(), 0.0)

    def _tail_ids(self, rows: Rows, ids: Tensor, is_head: Tensor, num_tails: Tensor) -> Tensor:
        """int64 [E]: systematic sample of each row's tail, ascending, rows one after another."""
        weights = without(rows.exp_z, self._always).clone()
        self._clear_free(weights, rows.labels)
        row, slot = is_head.nonzero(as_tuple=True)
        weights[row, ids[row, slot]] = 0.0
        cdf = InverseCdf(weights)
        most = max(int(num_tails.max()), 1)
        index = torch.arange(most, device=ids.device)
        zero = torch.zeros_like(rows.positions)
        uniform = random.uniform(rows.seed, rows.keys, rows.positions, zero)
        # n points spaced total / n apart: every id's interval is shorter, so none is hit twice, and
        # rounding of the running sum cannot change the count.
        spacing = cdf.total / num_tails.clamp_min(1)
        picked = cdf.pick((uniform[:, None] + index) * spacing[:, None])
        wanted = index < num_tails[:, None]
        repeated = (picked[:, 1:] == picked[:, :-1]) & wanted[:, 1:]
        if bool(repeated.any()):
            _separate(picked, num_tails, weights, repeated.any(-1).nonzero()[:, 0])
        return picked[wanted]


def solve_threshold(p_RH: Tensor, residual_R: Tensor, k_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, tail mass and number of tail ids per row.

    Args:
        p_RH: float64 [R, H], the H >= max(k) largest probabilities, descending (or the whole
            support).
        residual_R: float64 [R], mass beyond them.
        k_R: int64 [R], ids to store.

    Returns: (h int64 [R], R_h float64 [R], n int64 [R]) with n = k - h, or n = 0 when the support
        has at
    most k ids and all of it is head.
    """
    width = p_RH.shape[-1]
    h = torch.arange(width, device=p_RH.device)
    # R_h from the small end: never 1 - sum.
    outside = p_RH.flip(-1).cumsum(-1).flip(-1) + residual_R[:, None]
    fits = (p_RH * (k_R[:, None] - h) < outside) & (h < k_R[:, None])
    found = fits.any(-1)
    first = fits.int().argmax(-1)
    support = (p_RH > 0).sum(-1)
    heads = torch.where(found, first, torch.minimum(support, k_R))
    mass = torch.where(found, outside.gather(-1, first[:, None])[:, 0], 0.0)
    return heads, mass, torch.where(found, k_R - heads, 0)


def _separate(picked: Tensor, num_tails: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Give ids hit twice through float rounding (an id as heavy as the spacing) to their next
    neighbour.

    Happens in a few rows per billion; those rows are walked one by one.
    """
    for row in rows.tolist():
        count = int(num_tails[row])
        possible = weights[row].nonzero()[:, 0]
        index = torch.searchsorted(possible, picked[row, :count].contiguous())
        rank = torch.arange(count, device=index.device)
        index = torch.cummax(index - rank, 0).values + rank
        # Running off the end pushes the last ones back instead.
        index = torch.minimum(index, possible.numel() - count + rank)
        picked[row, :count] = possible[index]
