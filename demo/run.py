"""The main job, end to end, on a real model and a real corpus: `make demo`.

    SmolLM2-135M reads the Python documentation once -> a top-64 store -> verified -> one small
    student trained from it with the labels alone, one with the teacher's record -> demo-out/report

Every step is a command a user types, printed before it runs. A second run finds its work done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from demo import fetch_assets  # noqa: E402  (runs from a checkout, which is not on the path yet)

# Else glibc gives the logits' memory back after every step, and the kernel clears it for the next.
KEEP_BUFFERS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

SIGNAL = "topk:64"
SEQ_LEN = 512
TOKENS = 53_248  # 104 windows of 512
STEPS = 300
LOSSES = {"ce": "labels alone (cross-entropy)", "kd": "teacher record (forward KL)"}


def show(command: list[str]) -> None:
    """Print a command as a user would type it."""
    words = [Path(w).name if w == sys.executable else w for w in command]
    if len(words) > 24:
        words = [*words[:8], f"... ({len(words) - 16} more)", *words[-8:]]
    print("\n$ " + shlex.join(words), file=sys.stderr, flush=True)


def run(command: list[str]) -> str:
    """Run a command, messages to the terminal, and return what it prints on stdout."""
    show(command)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **KEEP_BUFFERS},
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def logitstore(*words: str) -> str:
    """Run the installed `logitstore` command."""
    return run([str(Path(sys.executable).parent / "logitstore"), *words])


def capture(teacher: Path, corpus: list[Path], out: Path) -> dict[str, Any]:
    """Run the teacher once; returns the figures of the run that did the work."""
    store, figures = out / "store", out / "capture.json"
    answer = json.loads(
        logitstore(
            "precompute",
            "--teacher", f"hf:{teacher}",
            "--corpus", *[str(f) for f in corpus],
            "--signal", SIGNAL,
            "--seq-len", str(SEQ_LEN),
            "--max-tokens", str(TOKENS),
            "--out", str(store),
            "--json",
        )
    )  # fmt: skip
    if not answer["skipped_shards"] or not figures.exists():
        figures.write_text(json.dumps(answer, indent=1))
    return json.loads(figures.read_text())


def train(store: Path, loss: str, out: Path, key: str) -> dict[str, Any]:
    """One student, in a process without a teacher; its result is kept under a key of its inputs."""
    result = out / f"student-{loss}-{key}.json"
    if not result.exists():
        script = REPOSITORY / "demo" / "train.py"
        words = ["--store", str(store), "--loss", loss, "--steps", str(STEPS), "--out", str(result)]
        run([sys.executable, str(script), *words])
    return json.loads(result.read_text())


# Measured on one store with `demo/train.py`, seeds 0, 1, 2: 5.779, 5.770, 6.327 with labels alone,
# 5.848, 6.088, 5.674 with the record.
SPREAD = (
    "One seed and a few minutes: this shows that it runs, not which loss is better. Other seeds on "
    "the same store differ by 0.6 nats, more than the two students do."
)


def report(
    out: Path, captured: dict[str, Any], stats: dict[str, Any], students: dict[str, Any]
) -> str:
    """The table, also written to report.md, and the plot."""
    rows = [
        ("captured", f"{stats['positions']:,} tokens with {SIGNAL} in {stats['shards']} shards"),
        ("capture speed", f"{captured['tokens'] / captured['seconds']:,.0f} tokens/s"),
        ("stored", f"{stats['bytes_per_position']:.1f} bytes/token"),
        ("teacher's loss on the labels", f"{stats['nll']:.3f} nats/token"),
        ("mass kept by the record", f"{stats['measures']['kept_mass']['mean']:.4f}"),
    ]
    for loss, student in students.items():
        final = student["validation_curve"][-1][1]
        speed = f"{student['tokens_per_s']:,.0f} tokens/s"
        rows.append(
            (f"student, {LOSSES[loss]}", f"validation loss {final:.3f} nats/token at {speed}")
        )
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"| {name:<{width}} | {value} |" for name, value in rows)
    table = f"| {'what':<{width}} | value |\n|{'-' * (width + 2)}|---|\n{table}\n"
    steps = next(iter(students.values()))
    (out / "report.md").write_text(
        f"# Demo report\n\nTeacher SmolLM2-135M-Instruct, corpus Python documentation; students: "
        f"{steps['parameters']:,} parameters, {steps['steps']} steps, "
        f"{steps['train_samples']} training and {steps['validation_samples']} held-out samples.\n\n"
        f"{table}\n{SPREAD}\n\n![validation loss against steps](report.png)\n"
    )
    plot(out / "report.png", stats, students)
    return f"{table}\n{SPREAD}\n"


def plot(path: Path, stats: dict[str, Any], students: dict[str, Any]) -> None:
    """Validation loss against steps, with the teacher's own loss as the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for loss, student in students.items():
        steps, values = zip(*student["validation_curve"], strict=True)
        axes.plot(steps, values, marker="o", markersize=4, label=f"student: {LOSSES[loss]}")
    axes.axhline(stats["nll"], color="0.4", linestyle="--", label="teacher, whole corpus")
    axes.set_xlabel(f"step ({SEQ_LEN} tokens each)")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("A student trained from the store, without the teacher")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo-out")
    arguments = parser.parse_args()
    start = time.perf_counter()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    teacher = fetch_assets.smollm2()
    corpus = fetch_assets.demo_corpus()

    captured = capture(teacher, corpus, out)
    store = out / "store"
    logitstore("verify", str(store), "--full")
    logitstore("inspect", str(store))
    stats = json.loads(logitstore("stats", str(store), "--json"))
    script = (REPOSITORY / "demo" / "train.py").read_bytes()
    key = hashlib.sha256(script + json.dumps(stats, sort_keys=True).encode()).hexdigest()[:12]
    students = {loss: train(store, loss, out, key) for loss in LOSSES}
    print("\n" + report(out, captured, stats, students))
    print(f"{out / 'report.md'} and report.png; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
