"""No NaN: one-hot teachers, gaps of 1e4, vocabularies padded with -inf, for every loss and record.

Letters: B samples, T positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from logitstore import losses
from logitstore.losses.contract import LossInfo
from logitstore.spec.errors import TargetsError
from logitstore.targets import (
    DenseTargets,
    SampledTargets,
    ScoresTargets,
    Targets,
    ThresholdTargets,
    TopKTargets,
)
from tests.losses.cases import generator, log_softmax64, random_logits

B, T, V, K = 2, 3, 10, 4
LABELS = torch.randint(0, V - 2, (B, T), generator=generator(0))
BYTE_END = torch.arange(1, T + 1).expand(B, T)
NORMAL = random_logits(1, B, T, V, scale=1.0)
PADDED = torch.tensor([False] * (V - 2) + [True] * 2)

TEACHERS = {
    "one-hot": torch.full((B, T, V), -torch.inf).scatter(-1, LABELS[..., None], 0.0),
    "gaps of 1e4": 1e4 * NORMAL,
    "padded": NORMAL.masked_fill(PADDED, -torch.inf),
}
STUDENTS = {
    "plain": random_logits(2, B, T, V, scale=1.0),
    "gaps of 1e4": random_logits(3, B, T, V, scale=1e4),
}
OPTIONS = {
    "gld": {"k": 3},
    "gold": {"byte_end": BYTE_END, "target_labels": LABELS},
    "kd_partial": {"kind": "topk", "k": 3},
    "topk_wasserstein": {"k": 3},
    "topkd": {"k": 3},
    "ttm": {"gamma": 0.5},
    "wttm": {"gamma": 0.5},
}


def records(teacher: Tensor) -> dict[str, Targets]:
    """The same teacher in every signal."""
    topk = TopKTargets.from_logits(teacher, K, labels=LABELS, temperatures=[2.0])
    scalars = {n: getattr(topk, n) for n in ("lse", "label_logprob", "label_rank", "entropy")}
    flat = {
        "vocab_size": V,
        "lengths": torch.full((B,), T),
        **{name: x.reshape(-1) for name, x in scalars.items()},
    }
    draws = torch.multinomial(
        log_softmax64(teacher).exp().reshape(-1, V), 8, replacement=True, generator=generator(1)
    )
    ids, counts = zip(*(row.unique(return_counts=True) for row in draws), strict=True)
    width = torch.tensor([len(x) for x in ids])
    # A head holds what has a probability in float32.
    held = [row[: max(int((row.exp() > 0).sum()), 1)] for row in topk.logprobs.reshape(-1, K)]
    num_heads = torch.tensor([len(x) for x in held])
    kept_ids = zip(topk.ids.reshape(-1, K), held, strict=True)
    return {
        "dense": dataclasses.replace(DenseTargets.from_logits(teacher), byte_end=BYTE_END),
        "topk": dataclasses.replace(topk, byte_end=BYTE_END),
        "sampled": SampledTargets(
            ids=torch.cat(ids),
            counts=torch.cat(counts),
            weights=torch.cat(counts) / 8,
            num_ids=width,
            rounds=8,
            **flat,
        ),
        "threshold": ThresholdTargets(
            ids=torch.cat([ids[: len(row)] for ids, row in kept_ids]),
            weights=torch.cat(held).exp(),
            num_ids=num_heads,
            num_heads=num_heads,
            log_tail=topk.log_tail.reshape(-1),
            **flat,
        ),
        "scores": ScoresTargets(
            vocab_size=1000,
            ids=torch.arange(V).expand(B, T, V).clone(),
            scores=teacher.clamp_min(-2e4),
        ),
    }


def calls(info: LossInfo, signal: str):
    """Every treatment of the missing mass, at T = 1 and, where the record allows it, 2."""
    parameters = inspect.signature(info.function).parameters
    softens = "temperature" in parameters and info.name not in ("ttm", "wttm", "sinkhorn")
    for missing in info.missing.get(signal, (None,)):
        for temperature in (1.0, 2.0) if softens and signal in ("dense", "topk") else (None,):
            options = dict(OPTIONS.get(info.name, {}))
            if info.name == "kd_partial" and signal in ("sampled", "threshold"):
                options = {"kind": "pt"} if signal == "sampled" else {"kind": "topk"}
            if missing is not None:
                options["missing"] = missing
            if temperature is not None:
                options["temperature"] = temperature
            yield options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_value_and_gradient_are_finite(teacher, dtype):
    students = {name: x.to(dtype) for name, x in STUDENTS.items()}
    if teacher == "padded":
        students["padded"] = STUDENTS["plain"].masked_fill(PADDED, -torch.inf).to(dtype)
    checked = 0
    for signal, targets in records(TEACHERS[teacher].float()).items():
        for name, info in losses.LOSSES.items():
            if signal not in info.signals:
                continue
            for options in calls(info, signal):
                for student_name, student in students.items():
                    leaf = student.clone().requires_grad_()
                    where = f"{name}({signal}, {options}), student {student_name}"
                    if is_refused(name, signal, teacher):
                        with pytest.raises(TargetsError, match="can occur"):
                            info.function(leaf, targets, labels=LABELS, **options)
                        continue
                    if student_name == "padded" and spreads_to_every_id(name, options, signal):
                        continue
                    value = info.function(leaf, targets, labels=LABELS, **options)
                    value.backward()
                    assert value.isfinite(), where
                    assert leaf.grad.isfinite().all(), where
                    checked += 1
    assert checked > 150


def is_refused(name: str, signal: str, teacher: str) -> bool:
    """Losses that compare raw logits, of which an id that cannot occur has none."""
    if name == "topkd":
        return teacher != "gaps of 1e4"
    too_few = teacher == "one-hot" or (teacher == "gaps of 1e4" and signal == "threshold")
    return name in ("gld", "topk_wasserstein") and too_few


def spreads_to_every_id(name: str, options: dict, signal: str) -> bool:
    """Whether the target gives mass to ids that the padded student rules out: truly infinite."""
    if name == "kd_partial":
        return True
    if name in ("ttm", "wttm") and signal == "topk":
        return options["missing"].startswith("uniform")
    return options.get("missing", "").startswith("uniform") and name in (
        "forward_kl",
        "sparse_kd_with_ce",
    )


def test_rounded_logprobs_leave_a_softened_tail():
    """At T = 2 a list in half precision can sum to 1; the tail that is stored does not vanish."""
    teacher = random_logits(4, 1, 6, 40, scale=6.0).float()
    whole = TopKTargets.from_logits(teacher, 30, temperatures=[0.5, 2.0])
    stored = dataclasses.replace(
        whole,
        logprobs=(whole.logprobs + 1e-3).half().float(),
        log_tail=whole.log_tail.half().float(),
    )
    for temperature in (0.5, 2.0):
        student = random_logits(5, 1, 6, 40, scale=1.0).float().requires_grad_()
        value = losses.reverse_kl(student, stored, temperature=temperature)
        exact = losses.reverse_kl(student, whole, temperature=temperature)
        torch.testing.assert_close(value, exact, rtol=0.1, atol=0)


def test_labels_may_be_any_integers():
    student = random_logits(1, B, T, V)
    targets = TopKTargets.from_logits(NORMAL, K)
    short = losses.cross_entropy(student, targets, labels=LABELS.int())
    torch.testing.assert_close(short, losses.cross_entropy(student, targets, labels=LABELS))
