"""Judging augmentations by the teacher alone, and picking mixed samples. Metrics: no gradients.

Letters: N pools (or samples), B samples, C classes, K stored ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from logitstore.losses.contract import require
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = [
    "EntropyBracket",
    "cutmix_pick",
    "cutmix_scores",
    "entropy_bracket",
    "pool_mean",
    "t_stddev",
    "t_stddev_bound",
]

T = TypeVar("T")


def pool_mean(
    pool: Iterable[Targets],
    *,
    missing: Literal["zero", "uniform"] = "uniform",
    residual: bool = False,
) -> Tensor:
    """Mean teacher probability of each class over all samples of a pool, float64 [C].

    A pool is what the paper calls 5 consecutive steps: 5 batches, or 10 with the mixed ones. Exact
    from dense targets, unbiased from sampled and threshold ones. Top-K targets leave the mass
    outside at 0 ("zero") or spread it evenly over the other classes ("uniform").

    Args:
        pool: batches of targets; every position is one sample.
        missing: what stands for the mass outside top-K ids.
        residual: return the mean mass outside instead, float64 scalar, for `t_stddev_bound`.

    Raises: UsageError bad-argument for an empty pool or an unknown treatment.
    """
    if missing not in ("zero", "uniform"):
        raise UsageError(
            "bad-argument", "unknown treatment", got=missing, expected="zero or uniform"
        )
    total_C: Tensor | None = None
    outside = torch.zeros((), dtype=torch.float64)
    num_samples = 0
    for targets in pool:
        probs_BC = targets.dense().double().reshape(-1, targets.vocab_size)
        if isinstance(targets, TopKTargets):
            kept_BC = torch.zeros_like(probs_BC, dtype=torch.bool)
            ids_BK = targets.ids.reshape(-1, targets.k)
            # Padding repeats the first id of its row.
            kept_BC.scatter_(-1, torch.where(ids_BK == PAD_ID, ids_BK[:, :1], ids_BK), True)
            rest_B = _residual(targets).double().reshape(-1)
            outside = outside.to(rest_B.device) + rest_B.sum()
            if missing == "uniform":
                num_outside_B = (~kept_BC).sum(-1).clamp_min(1)
                probs_BC = torch.where(kept_BC, probs_BC, (rest_B / num_outside_B)[:, None])
        total_C = probs_BC.sum(0) if total_C is None else total_C + probs_BC.sum(0)
        num_samples += probs_BC.shape[0]
    if total_C is None or num_samples == 0:
        raise UsageError("bad-argument", "an empty pool has no mean", expected="batches of targets")
    return (outside if residual else total_C) / num_samples


def t_stddev(pool_means: Tensor) -> Tensor:
    """T. stddev: the mean over classes of the standard deviation over pools of the mean
    probability.

    Lower is better: an augmentation whose samples make the teacher's mean output vary less gives a
    student of lower test loss. Unbiased (N - 1) deviation; the teacher runs in eval mode at
    temperature 1.

    Args:
        pool_means: float [N, C], one `pool_mean` (or stored pool table row) per pool.

    Returns: float64 scalar; NaN for fewer than two pools, as in the released code.

    Source: arXiv:2012.02909; code MingSun-Tse/Good-DA-in-KD. The mean entropy it prints runs over
        everything since the start, because a list is never reset; it is not offered here.
    """
    if pool_means.shape[0] < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=pool_means.device)
    return pool_means.double().std(0, correction=1).mean()


def t_stddev_bound(residuals: Tensor, num_classes: int, *, missing: str) -> Tensor:
    """How far `t_stddev` of pools made from top-K targets can be from the dense value, float64.

    By the triangle inequality the error is at most mean_c std_n(e_nc), e_nc the probability that
    the pools' means miss (or wrongly add) in class c. Only its sum over classes r_n is known, and
    std_n(e_c) <= sum_n |e_nc| / sqrt(N - 1), hence sum_n r_n / (C sqrt(N - 1)) for "zero" and twice
    that for "uniform", which also adds r_n elsewhere.

    Args:
        residuals: float [N], `pool_mean(..., residual=True)` of each pool.
        num_classes: C.
        missing: the treatment the pools were made with.
    """
    factor = 2.0 if missing == "uniform" else 1.0
    spread = num_classes * max(residuals.shape[0] - 1, 1) ** 0.5
    return factor * residuals.double().sum() / spread


class EntropyBracket(NamedTuple):
    """lower <= entropy <= upper, nats, float [...]."""

    lower: Tensor
    upper: Tensor


def entropy_bracket(targets: TopKTargets) -> EntropyBracket:
    """What K log-probs and the mass outside say about the entropy of the whole distribution, nats.

    With H_K = -sum_S p log p and r the mass outside: at most H_K - r log(r / (V - K)) (r spread
    evenly); at least H_K plus the entropy of floor(r / p_K) classes as large as the last stored one
    and one class with what remains (no class outside can be larger).
    """
    logprobs = at_least_float32(targets.logprobs)
    kept = targets.ids != PAD_ID
    head = torch.special.entr(logprobs.exp()).sum(-1)
    r = _residual(targets)
    num_outside = (targets.vocab_size - kept.sum(-1)).to(r.dtype)
    last = torch.where(kept, logprobs, 0.0).amin(-1).exp()
    upper = head + torch.special.entr(r) + torch.special.xlogy(r, num_outside.clamp_min(1))
    copies = (r / last).floor().clamp_max(num_outside)
    remainder = (r - copies * last).clamp_min(0.0)
    lower = head + copies * torch.special.entr(last) + torch.special.entr(remainder)
    # Rounded log-probs can put the two in the wrong order by their rounding.
    return EntropyBracket(torch.minimum(lower, upper), upper)


def cutmix_scores(
    kind: Literal["teacher_entropy", "student_entropy", "kld", "dissimilarity"],
    *,
    teacher: Targets | None = None,
    student_logits: Tensor | None = None,
    original: Targets | None = None,
    temperature: float = 4.0,
) -> Tensor:
    """The score of each mixed sample for `cutmix_pick`, float [N]; higher is picked first.

    - "teacher_entropy": entropy of the teacher's output on the mixed sample. From dense targets, or
      any targets with the stored `entropy`; without it `entropy_bracket` is all that top-K holds.
    - "student_entropy": entropy of softmax(student_logits).
    - "kld": KL(p_T || q_T), dense teacher and student at `temperature`; no T^2.
    - "dissimilarity": the smallest squared distance between the teacher's probabilities on the
      mixed sample and on any of the `original` samples, both dense.

    Args:
        teacher: teacher record of the mixed samples, leading shape [N]. Interpolated logits of the
            two originals are a different criterion.
        student_logits: float [N, C], the student's logits on the mixed samples.
        original: teacher record of the plain samples.
        temperature: of "kld".

    Raises: UsageError bad-argument when the kind's inputs are missing; TargetsError
        targets-mismatch, aux-missing.

    The released option defaults to "kld"; the methods in the paper are the two entropies. Its
    entropy is NaN at p = 0; here 0 log 0 = 0.

    Source: arXiv:2012.02909; code MingSun-Tse/Good-DA-in-KD.
    """
    if kind == "student_entropy":
        return _entropy(_given(student_logits, "student_logits", kind))
    mixed = _given(teacher, "teacher", kind)
    if kind == "teacher_entropy":
        if isinstance(mixed, DenseTargets):
            return _entropy(mixed.logits)
        return require(mixed, "entropy", "cutmix_scores('teacher_entropy')")
    if kind == "kld":
        logits_NC = at_least_float32(_given(student_logits, "student_logits", kind))
        log_q_NC = torch.log_softmax(logits_NC / temperature, -1)
        teacher_NC = at_least_float32(_dense(mixed, kind).logits).to(log_q_NC.dtype)
        log_p_NC = torch.log_softmax(teacher_NC / temperature, -1)
        p_NC = log_p_NC.exp()
        return torch.where(p_NC > 0, p_NC * (log_p_NC - log_q_NC), 0.0).sum(-1)
    if kind == "dissimilarity":
        p_NC = _dense(mixed, kind).logprobs.exp()
        plain_BC = _dense(_given(original, "original", kind), kind).logprobs.exp()
        exactly = "donot_use_mm_for_euclid_dist"  # the matrix form cancels for near samples
        return torch.cdist(p_NC, plain_BC, compute_mode=exactly).square().amin(-1)
    raise UsageError(
        "bad-argument",
        "unknown score",
        got=kind,
        expected="teacher_entropy, student_entropy, kld or dissimilarity",
    )


def cutmix_pick(scores: Tensor, num_pick: int) -> Tensor:
    """Indices of the `num_pick` samples with the highest scores, ascending by score, int64.

    The paper mixes n_run = 2 times and keeps as many of the 2 B samples as a batch holds. Fewer
    candidates than `num_pick`: all are kept. Ties keep their order, so later ones are picked.

    Args:
        scores: float [N], one per mixed sample, from `cutmix_scores` or a store's `entropy`; for
            text, of positions or sequences.
        num_pick: how many to keep, >= 1.

    Raises: UsageError bad-argument for NaN scores or num_pick < 1; TargetsError shape-mismatch.

    The target of a picked sample is the teacher's own output on it, never the mixed label.

    Source: arXiv:2012.02909 (CutMixPick).
    """
    if scores.ndim != 1:
        raise TargetsError(
            "shape-mismatch", "scores are one per sample", got=list(scores.shape), expected="[N]"
        )
    if num_pick < 1 or bool(scores.isnan().any()):
        raise UsageError(
            "bad-argument",
            "cannot pick by these scores",
            got=f"num_pick={num_pick}, {int(scores.isnan().sum())} NaN",
            expected="num_pick >= 1 and no NaN",
        )
    return torch.sort(scores, stable=True).indices[-num_pick:]


def _residual(targets: TopKTargets) -> Tensor:
    """Mass outside the stored ids, float [...]."""
    if targets.log_tail is not None:
        return at_least_float32(targets.log_tail).exp()
    return (1 - at_least_float32(targets.logprobs).exp().sum(-1)).clamp_min(0.0)


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(torch.softmax(at_least_float32(logits), -1)).sum(-1)


def _given(value: T | None, name: str, kind: str) -> T:
    if value is None:
        raise UsageError("bad-argument", f"cutmix_scores({kind!r}) needs {name}", where=name)
    return value


def _dense(targets: Targets, kind: str) -> DenseTargets:
    if not isinstance(targets, DenseTargets):
        raise TargetsError(
            "targets-mismatch",
            f"cutmix_scores({kind!r}) needs every probability",
            got=targets.signal,
            expected="dense",
            hint="capture with --signal dense, or pick by teacher_entropy with --aux entropy",
        )
    return targets
