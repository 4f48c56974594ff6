"""What is known of the teacher without sampling: moments of p, and variances in closed form.

Letters: P positions, V vocabulary, E entries of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from real_rows import Window

from logitstore.signals.threshold import solve_threshold
from logitstore.spec.signals import HEAD_STEP
from logitstore.targets import Targets, TopKTargets
from logitstore.targets.weighted import WeightedTargets

__all__ = ["Exact", "Expected", "exact_of"]

Floats = NDArray[np.float64]

# More ids than any threshold here puts into a head.
_WIDEST_HEAD = 640


@dataclass(frozen=True)
class Expected:
    """Per position in closed form: E||w - p||^2, sum_i Var(w_i) / p_i, and what rounding adds."""

    error: Floats
    relative: Floats
    rounding: Floats
    label_rounding: Floats


@dataclass(frozen=True)
class Exact:
    """The teacher on some windows, float64.

    Attributes:
        p: function-like access through `at`.
        squares: [P], sum p^2.
        others: [P, H], the largest probabilities that are not the label's, descending.
        others_rest, others_rest_squares: [P], mass and sum of squares beyond them.
        label: [P], probability of the label, 0 where there is none.
        counted: bool [P], positions with a label.
    """

    logits: torch.Tensor
    lse: torch.Tensor
    squares: Floats
    others: Floats
    others_rest: Floats
    others_rest_squares: Floats
    label: Floats
    label_ids: NDArray[np.int64]
    counted: NDArray[np.bool_]

    def at(self, position: torch.Tensor, ids: torch.Tensor) -> Floats:
        """Probabilities of some ids of some positions."""
        return (self.logits[position, ids].double() - self.lse[position]).exp().numpy()

    def squared_error(self, targets: Targets, missing: str = "none") -> Floats:
        """[P], ||w - p||^2 of the targets; w of a top-K list with its rest treated as `missing`."""
        if isinstance(targets, WeightedTargets):
            position, ids = targets.position_of_entry(), targets.ids
            weights = targets.weights.double().numpy()
        else:
            assert isinstance(targets, TopKTargets)
            ids = targets.ids.flatten()
            position = torch.arange(len(targets.ids)).repeat_interleave(targets.ids.shape[1])
            weights = targets.logprobs.double().exp().numpy().flatten()
        p, owner = self.at(position, ids), position.numpy()
        count = len(self.squares)
        kept = np.bincount(owner, weights, count)
        rest = np.maximum(1 - np.bincount(owner, p, count), 0)
        beyond = np.maximum(self.squares - np.bincount(owner, p * p, count), 0)
        if missing == "renormalize":
            weights = weights / kept[owner]
        error = np.bincount(owner, (weights - p) ** 2, count)
        if missing == "uniform":
            share = rest / (self.logits.shape[1] - np.bincount(owner, minlength=count))
            return error + beyond - share * rest
        if missing == "label":
            stored = np.bincount(owner, ids.numpy() == self.label_ids[owner], count) > 0
            hit = ids.numpy() == self.label_ids[owner]
            off = np.bincount(owner[hit], (weights - p)[hit], count)
            off = np.where(stored, off, -self.label)
            return error + beyond + (off + rest) ** 2 - off**2
        return error + beyond

    def rskd(self, rounds: int) -> Expected:
        """RS-KD in closed form."""
        zero = np.zeros(len(self.squares))
        relative = np.full(len(self.squares), (self.logits.shape[1] - 1) / rounds)
        return Expected((1 - self.squares) / rounds, relative, zero, zero)

    def threshold(self, tau: float) -> tuple[Expected, int]:
        """Threshold sampling in closed form, and how many ids vary more than under RS-KD(1/tau)."""
        p = self.others
        share = np.minimum(p / tau, 1).sum(1) + self.others_rest / tau
        k = np.maximum(np.ceil(share - 1e-7), 1).astype(np.int64)
        solved = solve_threshold(*map(torch.from_numpy, (p, self.others_rest, k)))
        heads, mass, tails = (t.numpy() for t in solved)
        is_head = np.arange(p.shape[1]) < heads[:, None]
        own_tau = mass / np.maximum(tails, 1)
        tail_squares = np.where(is_head, 0.0, p * p).sum(1) + self.others_rest_squares
        error = own_tau * mass - tail_squares
        ids = self.logits.shape[1] - heads - self.counted
        relative = ids * own_tau - mass
        # Stochastic rounding of a probability between two steps.
        rounded = np.where(is_head & (np.arange(p.shape[1]) > 0), _rounding_variance(p), 0.0)
        of_mass = np.where(heads > 0, _rounding_variance(mass), 0.0)
        of_top = np.where(heads > 0, rounded.sum(1) + of_mass, 0.0)
        rounding = rounded.sum(1) + of_top + of_mass / np.maximum(tails, 1)
        with np.errstate(divide="ignore"):
            half = np.exp(np.log(self.label).astype(np.float16).astype(np.float64))
        label_rounding = np.where(self.counted, (half - self.label) ** 2, 0.0) * (1 + (heads > 0))
        # Id by id against p (1 - p) / N, with every rounding; beyond the widest head no id varies
        # more, since p (tau - p) <= p (1 - p) tau.
        tail_variance = np.where(is_head, 0.0, p * np.maximum(own_tau[:, None] - p, 0))
        spread = np.where(is_head, 0.0, p * (of_mass / np.maximum(mass * tails, 1e-300))[:, None])
        variance = rounded + tail_variance + spread
        variance[:, 0] += np.where(heads > 0, of_top, 0.0)
        worse = int((variance > p * (1 - p) * tau * (1 + 1e-9) + 1e-15)[self.counted].sum())
        return Expected(error, relative, rounding, label_rounding), worse


def _rounding_variance(p: Floats) -> Floats:
    """Variance of rounding p up or down to exp(-m / 64) with the right mean."""
    steps = np.ceil(-np.log(np.maximum(p, 1e-300)) / HEAD_STEP)
    low, high = np.exp(-steps * HEAD_STEP), np.exp(-(steps - 1) * HEAD_STEP)
    return np.maximum((high - p) * (p - low), 0)


def exact_of(windows: Sequence[Window]) -> Exact:
    """Everything at once, window by window."""
    logits = torch.from_numpy(np.concatenate([w.logits for w in windows]))
    labels = np.concatenate([w.labels for w in windows])
    parts: list[tuple[Floats, ...]] = []
    for start in range(0, len(logits), 128):
        z = logits[start : start + 128].double()
        lse = torch.logsumexp(z, -1)
        p = (z - lse[:, None]).exp()
        label = torch.from_numpy(labels[start : start + 128])
        at = label.clamp_min(0)[:, None]
        of_label = torch.where(label >= 0, p.gather(-1, at)[:, 0], 0.0)
        squares = p.square().sum(-1)
        others = torch.where((label >= 0)[:, None], p.scatter(-1, at, 0.0), p)
        top = others.topk(min(_WIDEST_HEAD, others.shape[1])).values
        rest = others.scatter(-1, others.topk(top.shape[1]).indices, 0.0)
        parts.append(
            tuple(
                t.numpy()
                for t in (lse, squares, top, rest.sum(-1), rest.square().sum(-1), of_label)
            )
        )
    lse, squares, others, rest, rest_squares, label = map(np.concatenate, zip(*parts, strict=True))
    return Exact(
        logits,
        torch.from_numpy(lse),
        squares,
        others,
        rest,
        rest_squares,
        label,
        labels,
        labels >= 0,
    )
