"""Time and memory of the losses beside the way each is usually written.

    python benchmarks/losses.py                  # the report in benchmarks/reports/
    python benchmarks/losses.py --tiny --out X   # seconds; what the test runs

Two tables. The first is the common training step: label cross-entropy plus distillation from a
sparse record. The second takes every loss by itself, beside its dense form. All variants of a table
take turns in one process, so that a busy machine slows all of them; read the ratios, not the
milliseconds.

Memory is the process' peak resident size during forward and backward (Linux resets that peak on
request), above what inputs hold, in units of one [rows, V] tensor of logits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitstore import losses
from logitstore.losses import MISSING
from logitstore.targets import DenseTargets, SampledTargets, ThresholdTargets, TopKTargets

REPORTS = Path(__file__).resolve().parent / "reports"
Loss = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """One variant: seconds of every repeat, and peak extra bytes."""

    table: str
    vocab: int
    rows: int
    variant: str
    baseline: str
    seconds: list[float]
    extra_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class Inputs:
    """Zipf-like teacher and a student near it, with records of the teacher.

    Positions are 4 sequences of rows / 4. The teacher's logits are kept only on request.
    """

    def __init__(
        self, num_rows: int, vocab: int, k: int, rounds: int = 50, keep_teacher: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        rank = torch.arange(1, vocab + 1, dtype=torch.float32).log()
        self.student = torch.empty(num_rows, vocab)
        self.shape = (4, num_rows // 4)
        teacher_rows = torch.empty(num_rows if keep_teacher else 1, vocab)
        records, labels, sampled_ids, counts = [], [], [], []
        for index, student in enumerate(self.student):
            # One row at a time: no second [rows, V] tensor exists while inputs are made.
            order = torch.randperm(vocab, generator=generator)
            teacher = teacher_rows[index if keep_teacher else 0]
            teacher[order] = -1.3 * rank + 0.3 * torch.randn(vocab, generator=generator)
            student.copy_(teacher + 0.5 * torch.randn(vocab, generator=generator))
            probs = torch.softmax(teacher, -1)
            draws = torch.multinomial(probs, rounds, replacement=True, generator=generator)
            unique, count = draws.unique(return_counts=True)
            labels.append(draws[0])
            records.append(TopKTargets.from_logits(teacher, k, labels=draws[0], temperatures=[2.0]))
            sampled_ids.append(unique)
            counts.append(count)
        self.labels = torch.stack(labels).view(self.shape)
        self.topk = self._stack(records)
        self.dense = (
            DenseTargets.from_logits(teacher_rows.view(*self.shape, vocab))
            if (keep_teacher)
            else None
        )
        num_ids = torch.tensor([len(c) for c in counts])
        entries: dict[str, Any] = {
            "vocab_size": vocab,
            "ids": torch.cat(sampled_ids),
            "weights": torch.cat(counts).float() / rounds,
            "num_ids": num_ids,
            "lengths": torch.full((4,), num_rows // 4),
        }
        self.sampled = SampledTargets(**entries, counts=torch.cat(counts), rounds=rounds)
        self.threshold = ThresholdTargets(
            **entries,
            num_heads=torch.ones_like(num_ids),
            log_tail=self.topk.log_tail.flatten(),
        )

    def _stack(self, records: list[TopKTargets]) -> TopKTargets:
        changes: dict[str, Any] = {}
        for name in ("ids", "logprobs", "log_tail", "lse", "label_logprob", "label_rank"):
            rows = torch.stack([getattr(r, name) for r in records])
            changes[name] = rows.view(*self.shape, *rows.shape[1:])
        for name in ("entropy", "logit_mean"):
            changes[name] = torch.stack([getattr(r, name) for r in records]).view(self.shape)
        lse_at = torch.stack([r.lse_at[2.0] for r in records]).view(self.shape)
        return replace(records[0], **changes, lse_at={2.0: lse_at})


def naive_kl(student: Tensor, teacher_probs: Tensor) -> Tensor:
    """KL with a [rows, V] target: what a sparse record becomes when the loss is dense."""
    vocab = student.shape[-1]
    log_q = F.log_softmax(student.view(-1, vocab), -1)
    return F.kl_div(log_q, teacher_probs.view(-1, vocab), reduction="batchmean")


def naive_two_losses(student: Tensor, labels: Tensor, targets: TopKTargets) -> Tensor:
    """CE and KD added, each with a softmax of its own."""
    logprobs = F.log_softmax(student, -1).gather(-1, targets.ids)
    kd = (targets.logprobs.exp() * (targets.logprobs - logprobs)).sum(-1).mean()
    return 0.5 * F.cross_entropy(student.flatten(0, 1), labels.flatten()) + 0.5 * kd


def naive_llp_rank(student: Tensor, targets: TopKTargets) -> Tensor:
    """Pairs of log-probs behind a softmax of its own; ties add nothing."""
    logprobs = F.log_softmax(student, -1).gather(-1, targets.ids).flatten(0, 1)
    teacher = targets.logprobs.flatten(0, 1)
    i, j = torch.triu_indices(targets.k, targets.k, offset=1)
    gap = teacher[:, i] - teacher[:, j]
    sign = (gap > 0.1).float() - (gap < -0.1).float()
    return F.margin_ranking_loss(logprobs[:, i], logprobs[:, j], sign, margin=0.1)


def naive_llp_distribution(student: Tensor, targets: TopKTargets) -> Tensor:
    """KL over the contexts, from log-probs behind a softmax of its own."""
    logprobs = F.log_softmax(student, -1).gather(-1, targets.ids).flatten(0, 1)
    log_q = F.log_softmax(logprobs, -1)
    log_p = F.log_softmax(targets.logprobs.flatten(0, 1), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def step_variants(inputs: Inputs, topk: TopKTargets) -> dict[str, Loss]:
    """The first table; the first entry is the baseline."""
    labels, k = inputs.labels, topk.k

    def cross_entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())

    return {
        "F.cross_entropy alone": cross_entropy,
        f"CE + KD, one pass, topk:{k}, ghost": lambda z: losses.sparse_kd_with_ce(
            z, topk, labels=labels
        ),
        f"CE + KD, one pass, topk:{k}, uniform": lambda z: losses.sparse_kd_with_ce(
            z, topk, labels=labels, missing="uniform"
        ),
        "CE + KD, one pass, sampled": lambda z: losses.sparse_kd_with_ce(
            z, inputs.sampled, labels=labels
        ),
        f"CE + KD, two losses (log_softmax + gather), {k} ids": lambda z: naive_two_losses(
            z, labels, topk
        ),
        "CE + dense KL (target scattered)": lambda z: (
            0.5 * cross_entropy(z) + 0.5 * naive_kl(z, topk.dense())
        ),
    }


# Losses measured from a top-K list and from dense targets, both with these options.
FROM_BOTH: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "jsd": {},
    "tvd": {},
    "pld": {},
    "ttm": {"temperature": 2.0},
    "wttm": {"temperature": 2.0},
    "topkd": {},
    "dual_head": {},
    "kd_partial": {"kind": "topk", "k": 64},
    "logits_sft": {},
    "uld": {},
    "gld": {},
    "topk_wasserstein": {},
}
# Batch-wise: its cost grows with the square of the rows.
SINKHORN_ROWS = 32


def single_variants(inputs: Inputs) -> dict[str, tuple[Loss, Loss]]:
    """The second table: name -> (from the sparse record, dense form)."""
    labels, topk, dense = inputs.labels, inputs.topk, inputs.dense
    assert dense is not None
    pairs: dict[str, tuple[Loss, Loss]] = {
        "cross_entropy": (
            lambda z: losses.cross_entropy(z, topk, labels=labels),
            lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()),
        ),
        "random_sampling_kd": (
            lambda z: losses.random_sampling_kd(z, inputs.sampled),
            lambda z: naive_kl(z, inputs.sampled.dense()),
        ),
        "threshold_kd": (
            lambda z: losses.threshold_kd(z, inputs.threshold),
            lambda z: naive_kl(z, inputs.threshold.dense()),
        ),
    }
    pairs["sparse_kd_with_ce"] = (
        lambda z: losses.sparse_kd_with_ce(z, topk, labels=labels),
        lambda z: (
            0.5 * F.cross_entropy(z.flatten(0, 1), labels.flatten())
            + 0.5 * naive_kl(z, torch.softmax(dense.logits, -1))
        ),
    )
    pairs["llp_rank"] = (
        lambda z: losses.llp_rank(z, topk),
        lambda z: naive_llp_rank(z, topk),
    )
    pairs["llp_distribution"] = (
        lambda z: losses.llp_distribution(z, topk),
        lambda z: naive_llp_distribution(z, topk),
    )
    # Both sides tokenize alike, three bytes a token; every token is a group of its own.
    byte_end = 3 * torch.arange(1, labels.shape[1] + 1).expand_as(labels)
    aligned = replace(topk, byte_end=byte_end), replace(dense, byte_end=byte_end)
    pairs["gold"] = (
        lambda z: losses.gold(z, aligned[0], labels=labels, byte_end=byte_end),
        lambda z: losses.gold(
            z, aligned[1], labels=labels, byte_end=byte_end, target_labels=labels
        ),
    )
    for missing in MISSING:
        pairs[f"forward_kl, {missing}"] = (
            lambda z, m=missing: losses.forward_kl(z, topk, missing=m, labels=labels),
            lambda z: naive_kl(z, torch.softmax(dense.logits, -1)),
        )
    for name, options in FROM_BOTH.items():
        function = losses.LOSSES[name].function
        assert function is not None
        pairs[name] = (
            lambda z, f=function, o=options: f(z, topk, labels=labels, **o),
            lambda z, f=function, o=options: f(z, dense, labels=labels, **o),
        )

    def first_rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[:SINKHORN_ROWS] if x.ndim > 1 else x

    few_topk, few_dense = topk.map(first_rows), dense.map(first_rows)
    pairs[f"sinkhorn, {min(SINKHORN_ROWS, labels.numel())} rows"] = (
        lambda z: losses.sinkhorn(first_rows(z), few_topk),
        lambda z: losses.sinkhorn(first_rows(z), few_dense),
    )
    return pairs


def run_once(loss: Loss, student: Tensor) -> None:
    leaf = student.detach().requires_grad_()
    loss(leaf.view(4, -1, leaf.shape[-1])).backward()


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(loss: Loss, student: Tensor) -> int:
    """Highest resident size during one step, above the size before it."""
    # Memory that making the inputs freed, and the allocator kept, would hide what a loss takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run_once(loss, student)
    return resident_bytes("VmHWM") - before


def measure(
    table: str, variants: dict[str, tuple[Loss, str]], student: Tensor, repeats: int
) -> list[Row]:
    """All variants take turns; the first round warms up and measures memory."""
    extra = {name: peak_extra_bytes(loss, student) for name, (loss, _) in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (loss, _) in variants.items():
            start = time.perf_counter()
            run_once(loss, student)
            seconds[name].append(time.perf_counter() - start)
    return [
        Row(table, student.shape[1], student.shape[0], name, base, seconds[name], extra[name])
        for name, (_, base) in variants.items()
    ]


def run(vocabularies: list[int], step_rows: int, single_rows: int, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for vocab in vocabularies:
        inputs = Inputs(step_rows, vocab, 64)
        for k in (12, 64):
            variants = step_variants(inputs, inputs.topk.truncated(k))
            base = next(iter(variants))
            rows += measure(
                f"step, K = {k}",
                {name: (loss, base) for name, loss in variants.items()},
                inputs.student,
                repeats,
            )
        inputs = Inputs(single_rows, vocab, 64, keep_teacher=True)
        pairs = single_variants(inputs)
        both: dict[str, tuple[Loss, str]] = {}
        for name, (ours, dense) in pairs.items():
            both[name] = (ours, f"{name}, dense")
            both[f"{name}, dense"] = (dense, f"{name}, dense")
        rows += measure("each loss, K = 64", both, inputs.student, repeats)
    return rows


def environment() -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "processor": platform.machine(),
        "load_1min": f"{os.getloadavg()[0]:.1f}",
    }


HEAD = """\
# Losses: time and memory of a training step's loss

Question: what does distillation from a sparse record add to a training step, and what does each
loss cost beside its dense form?

Forward and backward to the logits, float32; median of repeats taken in turns in one process
(fastest to slowest in brackets). Memory is the peak above the inputs, in units of one [rows, V]
tensor of logits. Synthetic Zipf teacher. CPU only; GPUs are not measured.
"""


def markdown(rows: list[Row], facts: dict[str, str | int], command: str) -> str:
    lines = [
        HEAD,
        f"Command: `{command}`  ",
        "; ".join(f"{key} {value}" for key, value in facts.items()) + "  ",
        f"Repeats: {len(rows[0].seconds)}",
    ]
    by_name = {(r.table, r.vocab, r.variant): r for r in rows}
    for table, vocab in dict.fromkeys((r.table, r.vocab) for r in rows):
        part = [r for r in rows if (r.table, r.vocab) == (table, vocab)]
        lines += [
            "",
            f"## {table}, {part[0].rows} x {vocab:,}",
            "",
            "| variant | ms | x baseline | extra memory |",
            "|---|---|---|---|",
        ]
        for r in part:
            base = by_name[(table, vocab, r.baseline)]
            low, high = min(r.seconds) * 1e3, max(r.seconds) * 1e3
            logits_bytes = r.rows * r.vocab * 4
            lines.append(
                f"| {r.variant} | {r.median_s * 1e3:.0f} ({low:.0f} to {high:.0f}) "
                f"| {r.median_s / base.median_s:.2f} | {r.extra_bytes / logits_bytes:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    options = parser.parse_args(argv)
    if options.tiny:
        rows = run([500], 8, 8, 1)
    else:
        torch.set_num_threads(options.threads)
        rows = run([32_000, 128_256], 2048, 256, options.repeats)
    facts = environment()
    command = "python benchmarks/losses.py " + " ".join(argv if argv is not None else sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"command": command.strip(), "environment": facts, "rows": [asdict(r) for r in rows]}
    (options.out / "losses.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(rows, facts, command.strip())
    (options.out / "losses.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
