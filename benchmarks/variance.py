"""What a stored byte buys: error of the training target against bytes per token, on real logits.

    python benchmarks/variance.py                 # the report in benchmarks/reports/, 15 minutes
    python benchmarks/variance.py --tiny --out X  # random logits, seconds; what the test runs

Rows are logits of SmolLM2-135M (V = 49,152) over the King James Bible and the Python documentation,
kept in `.cache/benchmarks` once made. Every arm goes through the product's own encoder, container,
targets and losses. w are the weights a student is trained with, p the teacher's probabilities.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact import exact_of
from real_rows import Window, cached_rows
from report import REPORTS, environment, write_report
from sources import encoded, make_header
from stored import stored
from students import Lesson, Student, full_lesson, gradient_angle, gradient_of, train_student
from variance_page import page, plot

from logitstore.record import Record
from logitstore.spec.signals import SampledSpec, ThresholdSpec, parse_signal
from logitstore.targets import Targets, from_records

WINDOWS_A_CHUNK = 4
RSKD = ("8", "16", "30", "50", "150", "400")
THRESHOLD = ("1/13", "1/24", "1/36", "1/40", "1/45", "1/50", "1/80", "1/200")
TOPK = ("2", "8", "24", "72")
TREATMENTS = ("ghost", "none", "renormalize", "uniform", "label")


@dataclass(frozen=True)
class Arm:
    """One signal with one setting, through one treatment of what it leaves out.

    Attributes:
        bytes_per_token: of the signal's own arrays in the zarr container.
        ids: mean entries a position trains with.
        error: mean ||w - p||^2 of one draw; `standard_error` of that mean.
        expected: E||w - p||^2 in closed form, roundings included; for top-K the same as error.
        bias: root mean square over positions of ||E[w] - p||.
        relative: mean of sum_i Var(w_i) / p_i.
        angle, norm: degrees and norm ratio of the student's gradient against full KD's.
    """

    signal: str
    missing: str
    bytes_per_token: float
    ids: float
    error: float
    standard_error: float
    expected: float
    bias: float
    relative: float
    angle: float
    norm: float


class Rows:
    """The windows with what is known of them exactly, and their records."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        self.vocab_size = windows[0].logits.shape[1]
        self.exact = [exact_of([w]) for w in windows]

    def records(self, signal: str, seed: int = 0) -> list[Record]:
        """One per window."""
        return [
            encoded([w], [signal], self.vocab_size, first_key=i, seed=seed)[signal]
            for i, w in enumerate(self.windows)
        ]

    def lesson(self, signal: str, missing: str = "ghost", seed: int = 0) -> Lesson:
        return lesson_of(self.records(signal, seed), signal, self.vocab_size, missing)

    def mean(self, per_window: Sequence[Any]) -> tuple[float, float]:
        """Mean over counted positions, and its standard error."""
        values = np.concatenate([v[e.counted] for v, e in zip(per_window, self.exact, strict=True)])
        return float(values.mean()), float(values.std() / len(values) ** 0.5)


def lesson_of(records: Sequence[Record], signal: str, vocab_size: int, missing: Any) -> Lesson:
    header = make_header(signal, vocab_size)

    def targets(number: int) -> Targets:
        return from_records([records[number]], header)

    return Lesson(targets, missing)


def measure(rows: Rows, signal: str, student: Student, full: torch.Tensor) -> list[Arm]:
    """An arm for every treatment that applies."""
    header = make_header(signal, rows.vocab_size)
    records = rows.records(signal)
    chunks = [
        Record.concat(records[i : i + WINDOWS_A_CHUNK])
        for i in range(0, len(records), WINDOWS_A_CHUNK)
    ]
    size = stored("variance", header, chunks, 1).bytes_per_token
    targets = [from_records([record], header) for record in records]
    ids = sum(_num_ids(t) for t in targets) / sum(r.num_positions for r in records)
    spec, exact = header.signal, rows.exact
    arms = []
    for missing in TREATMENTS if spec.kind == "topk" else ("",):
        errors = [e.squared_error(t, missing) for e, t in zip(exact, targets, strict=True)]
        error, standard_error = rows.mean(errors)
        expected, bias, relative = error, error**0.5, 0.0
        if isinstance(spec, SampledSpec):
            closed = [e.rskd(spec.rounds) for e in exact]
        elif isinstance(spec, ThresholdSpec):
            assert spec.tau_value is not None
            closed = [e.threshold(spec.tau_value)[0] for e in exact]
        if spec.kind != "topk":
            expected = rows.mean([c.error + c.rounding + c.label_rounding for c in closed])[0]
            bias = rows.mean([c.label_rounding for c in closed])[0] ** 0.5
            relative = rows.mean([c.relative for c in closed])[0]
        lesson = lesson_of(records, signal, rows.vocab_size, missing or "ghost")
        angle, norm = gradient_angle(gradient_of(student, lesson, rows.windows), full)
        arms.append(
            Arm(
                signal,
                missing,
                size,
                ids,
                error,
                standard_error,
                expected,
                bias,
                relative,
                angle,
                norm,
            )
        )
    return arms


def _num_ids(targets: Targets) -> int:
    ids: torch.Tensor = targets.ids  # type: ignore[attr-defined]
    return int((ids >= 0).sum())


def unbiasedness(rows: Rows, signal: str, positions: int, draws: int) -> dict[str, float]:
    """Many draws of a few positions: does the mean of w approach p as fast as it must?

    `excess` is the squared distance of the mean from p, less what the draws' own spread explains,
    in units of RS-KD 50's error; an unbiased scheme gives 0 within its standard error.
    """
    excess = []
    rng = np.random.default_rng(0)
    places = [
        (int(rng.integers(len(rows.windows))), int(rng.integers(len(rows.windows[0].tokens) - 1)))
        for _ in range(positions)
    ]
    for key, (number, position) in enumerate(places):
        window, exact = rows.windows[number], rows.exact[number]
        row = np.broadcast_to(window.logits[position], (draws, rows.vocab_size))
        # The label of every copy is the next token's: a window of copies of one pair.
        tokens = np.full(draws, window.tokens[position + 1])
        copies = Window(window.text, tokens, row, window.hidden[:1])
        record = encoded([copies], [signal], rows.vocab_size, first_key=1000 + key)[signal]
        targets = from_records([record], make_header(signal, rows.vocab_size))
        entry = targets.position_of_entry()  # type: ignore[attr-defined]
        used = entry < draws - 1
        ids, weights = targets.ids[used].numpy(), targets.weights[used].double().numpy()  # type: ignore[attr-defined]
        p = np.exp(window.logits[position].astype(np.float64) - float(exact.lse[position]))
        count = draws - 1
        mean = np.bincount(ids, weights, rows.vocab_size) / count
        squares = np.bincount(ids, weights**2, rows.vocab_size).sum() / count
        spread = (squares - (mean**2).sum()) / (count - 1)
        one = max((1 - exact.squares[position]) / 50, 1e-12)
        excess.append((((mean - p) ** 2).sum() - spread) / one)
    return {
        "excess": float(np.mean(excess)),
        "standard_error": float(np.std(excess) / len(excess) ** 0.5),
        "positions": positions,
        "draws": draws,
    }


def rounding(rows: Rows, tau: str) -> dict[str, float]:
    """What rounding adds to a threshold record's error; ids that vary more than RS-KD's."""
    spec = parse_signal(f"threshold:tau={tau}")
    both = [e.threshold(spec.tau_value) for e in rows.exact]
    error = rows.mean([c.error for c, _ in both])[0]
    return {
        "error": error,
        "steps of 1/64, share": rows.mean([c.rounding for c, _ in both])[0] / error,
        "float16 label, share": rows.mean([c.label_rounding for c, _ in both])[0] / error,
        "ids that vary more than RS-KD's": sum(worse for _, worse in both),
    }


def at(arms: Sequence[Arm], axis: str, value: float, what: str = "expected") -> float | None:
    """Log-log interpolation of an arm family; None outside its range."""
    known = sorted((getattr(a, axis), getattr(a, what)) for a in arms)
    x, y = np.array(known).T
    if not x[0] * 0.9 <= value <= x[-1] * 1.1:
        return None
    return float(np.exp(np.interp(np.log(value), np.log(x), np.log(y))))


def train(
    rows: Rows, lessons: dict[str, Any], seeds: int, features: int, epochs: int
) -> dict[str, list[list[float]]]:
    """Held-out KL to the teacher and label loss of a student per arm and seed."""
    held_out = [i for i in range(len(rows.windows)) if i % 4 == 3]
    results: dict[str, list[list[float]]] = {name: [] for name in lessons}
    for seed in range(seeds):
        for name, make in lessons.items():
            lesson = make(seed)
            _, kl, label = train_student(
                lesson, rows.windows, held_out, features=features, epochs=epochs, seed=seed
            )
            results[name].append([kl, label])
            print(f"student {name} seed {seed}: KL {kl:.4f}, labels {label:.4f}", flush=True)
    return results


def tiny_rows() -> list[Window]:
    rng = np.random.default_rng(0)
    embedding = rng.normal(0, 1, (600, 8)).astype(np.float32)
    made = []
    for number in range(4):
        hidden = rng.normal(0, 1, (24, 8)).astype(np.float32)
        logits = hidden @ embedding.T - np.log(np.arange(1, 601)).astype(np.float32)
        made.append(Window(f"random {number}", rng.integers(0, 600, 24), logits, hidden))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--seeds", type=int, default=5, help="students per arm")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tiny = options.tiny
    rows = Rows(tiny_rows() if tiny else cached_rows("smollm2", 4, 512))
    features, epochs, seeds = (8, 2, 2) if tiny else (96, 3, options.seeds)

    half_taught, _, _ = train_student(
        Lesson(None), rows.windows, [0], features=features, epochs=1, seed=99
    )
    full = gradient_of(half_taught, full_lesson(rows.windows), rows.windows)
    arms: list[Arm] = []
    settings = [f"sampled:{n}" for n in RSKD]
    settings += [f"threshold:tau={tau}" for tau in THRESHOLD]
    settings += [f"topk:{k}" for k in TOPK]
    for signal in settings:
        arms += measure(rows, signal, half_taught, full)
        print(
            f"{signal}: {arms[-1].bytes_per_token:.2f} B, {arms[-1].ids:.2f} ids, "
            f"error {arms[-1].error:.6f}, expected {arms[-1].expected:.6f}",
            flush=True,
        )

    rskd = next(a for a in arms if a.signal == "sampled:50")
    family = [a for a in arms if a.signal.startswith("threshold")]
    equal_bytes = at(family, "bytes_per_token", rskd.bytes_per_token)
    equal_ids = at(family, "ids", rskd.ids)
    draws = (6, 40) if tiny else (32, 256)
    checks = {
        "unbiased": {
            s: unbiasedness(rows, s, *draws) for s in ("sampled:50", "threshold:tau=1/40")
        },
        "rounding": {tau: rounding(rows, tau) for tau in ("1/40", "1/50")},
        "at RS-KD 50's bytes": equal_bytes and equal_bytes / rskd.expected,
        "at RS-KD 50's ids": equal_ids and equal_ids / rskd.expected,
    }
    # Of the arms measured, those that come nearest to RS-KD 50's bytes.
    nearest = {
        kind: min(
            (a for a in arms if a.signal.startswith(kind)),
            key=lambda a: abs(a.bytes_per_token - rskd.bytes_per_token),
        )
        for kind in ("sampled:50", "threshold", "topk")
    }
    lessons: dict[str, Any] = {
        "labels alone": lambda seed: Lesson(None),
        "full KD": lambda seed: full_lesson(rows.windows),
    }
    for arm in nearest.values():
        for missing in ("ghost", "renormalize") if arm.signal.startswith("topk") else ("ghost",):
            name = f"{arm.signal}, {missing}" if arm.signal.startswith("topk") else arm.signal
            lessons[f"{name} ({arm.bytes_per_token:.1f} B)"] = partial(
                lambda seed, signal, missing: rows.lesson(signal, missing, seed),
                signal=arm.signal,
                missing=missing,
            )
    students = train(rows, lessons, seeds, features, epochs)
    result = {
        "environment": environment(),
        "positions": int(sum(e.counted.sum() for e in rows.exact)),
        "arms": [asdict(a) for a in arms],
        "checks": checks,
        "students": students,
        "student": {"features": features, "epochs": epochs, "seeds": seeds},
    }
    plot(arms, options.out / "variance.png")
    write_report(options.out, "variance", result, page(result, arms, at))


if __name__ == "__main__":
    main()
