"""Peak memory and time of the fused LM head beside F.linear and the sparse loss.

    python benchmarks/fused_linear.py                  # the report in benchmarks/reports/
    python benchmarks/fused_linear.py --tiny --out X   # seconds; what the test runs

Every measurement is a process of its own, started in turns, because memory is the peak resident
size of
the whole process: interpreter, torch, hidden states, head, both gradients, everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from logitstore.losses import fused_linear_kd, sparse_kd_with_ce
from logitstore.targets import SampledTargets, Targets, TopKTargets

REPORTS = Path(__file__).resolve().parent / "reports"
VARIANTS = {
    "unfused": "F.linear, then sparse_kd_with_ce (itself one copy of the logits)",
    "naive": "F.linear, then cross-entropy and KD as two losses",
    "fused": "fused_linear_kd",
}


def make_targets(kind: str, positions: int, vocab: int, k: int) -> Targets:
    generator = torch.Generator().manual_seed(1)
    # Distinct ids from a random start with a fixed stride: nothing as large as [positions, vocab].
    first = torch.randint(vocab, (positions, 1), generator=generator)
    ids = (first + torch.arange(k) * (vocab // k)) % vocab
    logprobs = torch.log_softmax(-1.3 * torch.arange(1, k + 2).float().log(), -1)
    if kind == "sampled":
        counts = torch.ones_like(ids)
        return SampledTargets.from_counts(ids, counts, rounds=k, vocab_size=vocab)
    return TopKTargets(
        vocab_size=vocab,
        ids=ids,
        logprobs=logprobs[:k].expand(positions, -1),
        log_tail=logprobs[k].expand(positions),
    )


def loss_of(
    variant: str, hidden: Tensor, weight: Tensor, targets: Targets, labels: Tensor
) -> Tensor:
    if variant == "fused":
        loss = fused_linear_kd(hidden, weight, targets, labels)
    elif variant == "unfused":
        loss = sparse_kd_with_ce(F.linear(hidden, weight), targets, labels=labels)
    else:
        assert isinstance(targets, TopKTargets)
        logits = F.linear(hidden, weight)
        logprobs = F.log_softmax(logits, -1).gather(-1, targets.ids)
        kd = (targets.logprobs.exp() * (targets.logprobs - logprobs)).sum(-1).mean()
        loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * kd
    assert isinstance(loss, Tensor)
    return loss


def child(options: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    targets = make_targets(options.targets, options.positions, options.vocab, options.k)
    labels = torch.randint(options.vocab, (options.positions,))
    hidden = torch.randn(options.positions, options.hidden_size).requires_grad_()
    weight = torch.empty(options.vocab, options.hidden_size).normal_(std=0.04).requires_grad_()
    start = time.perf_counter()
    loss = loss_of(options.child, hidden, weight, targets, labels)
    loss.backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None
    assert weight.grad is not None
    print(
        json.dumps(
            {
                "variant": options.child,
                "seconds": seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "loss": float(loss.detach()),
                "grad_hidden": float(hidden.grad.norm()),
                "grad_weight": float(weight.grad.norm()),
            }
        )
    )


def measure(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, float | str]]:
    results = []
    for _ in range(options.repeats):
        for variant in options.variants:
            command = [sys.executable, __file__, "--child", variant, *arguments]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
    return results


HEAD = """\
# Fused LM head: peak memory and time

Question: what do loss and gradients behind the LM head cost when the logits of all positions never
exist together?

Loss, and gradients of hidden states and head. Each measurement is a process of its own, in turns;
memory is the peak resident size of the whole process; medians (fastest to slowest). CPU only; GPUs
are not measured.
"""


def markdown(results: list[dict[str, float | str]], options: argparse.Namespace) -> str:
    lines = [
        HEAD,
        f"Command: `{options.command}`  ",
        f"python {platform.python_version()}; torch {torch.__version__}",
        f"threads {options.threads}; cores {os.cpu_count()}; load {os.getloadavg()[0]:.1f}  ",
        f"T = {options.positions}, V = {options.vocab:,}, d = {options.hidden_size}, float32, "
        f"{options.targets} targets with {options.k} ids, {options.repeats} repeats",
        "",
        "| variant | seconds | x unfused | peak GB | x unfused | loss | norm of head's gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    by_variant = {v: [r for r in results if r["variant"] == v] for v in options.variants}
    base = by_variant[options.variants[0]]
    base_s = statistics.median(float(r["seconds"]) for r in base)
    base_bytes = statistics.median(float(r["peak_bytes"]) for r in base)
    for variant, rows in by_variant.items():
        seconds = [float(r["seconds"]) for r in rows]
        peak = statistics.median(float(r["peak_bytes"]) for r in rows)
        median = statistics.median(seconds)
        lines.append(
            f"| {variant}: {VARIANTS[variant]} | {median:.1f} ({min(seconds):.1f} to "
            f"{max(seconds):.1f}) | {median / base_s:.2f} | {peak / 1e9:.2f} | "
            f"{peak / base_bytes:.3f} | {rows[0]['loss']:.6f} | {rows[0]['grad_weight']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, one repeat")
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--targets", choices=["topk", "sampled"], default="topk")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["unfused", "fused"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny:
        options.positions, options.vocab, options.hidden_size, options.k = 16, 300, 8, 4
        options.repeats = 1
    if options.child:
        child(options)
        return
    arguments = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("positions", "vocab", "hidden_size", "k", "targets", "threads")
    ]
    given = argv if argv is not None else sys.argv[1:]
    options.command = " ".join(["python benchmarks/fused_linear.py", *given])
    results = measure(options, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {key: str(value) for key, value in vars(options).items() if key not in ("child", "out")}
    report = json.dumps({"options": facts, "results": results}, indent=1)
    (options.out / "fused_linear.json").write_text(report + "\n")
    text = markdown(results, options)
    (options.out / "fused_linear.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
