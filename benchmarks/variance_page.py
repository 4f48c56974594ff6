"""The page and the figure of `variance.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import table

__all__ = ["page", "plot"]

BUDGETS = (8, 16, 24, 36, 64, 128)
FAMILIES = {
    "RS-KD": ("sampled", ""),
    "threshold": ("threshold", ""),
    "top-K, ghost or none": ("topk", "ghost"),
    "top-K, renormalize": ("topk", "renormalize"),
    "top-K, uniform": ("topk", "uniform"),
    "top-K, label": ("topk", "label"),
}

HEAD = """\
# Error of the training target per stored byte

How far is what a student is trained with from the teacher's own distribution, for the bytes it
takes?

Real logits: SmolLM2-135M (V = 49,152), half King James Bible, half Python documentation, every arm
through the product's own encoder, zarr container (chunks of 2,048 positions) and targets. B/token
counts the signal's arrays; tokens and `label_logprob`, which every store of sequences has, come on
top for all arms alike (threshold draws the label's probability from there). Error is the mean of
||w - p||^2: for RS-KD and threshold pure noise, which averages out over positions, for top-K pure
bias, which does not; the two must not be compared by size. "ghost" and "none" keep p on the stored
ids and differ in what they ask of the student elsewhere.
"""


BIAS = """\
Bias: the mean of {draws} draws at {positions} positions against p, less what the draws' own spread
explains, in units of RS-KD 50's error; ± one standard error. The variance of every id is compared
in closed form, roundings included.
"""

ROUNDING = """\
The steps are rounded at random so that probabilities are right on average; float16 of the label's
log-prob is a fixed rounding, the only bias there is.
"""

SETTINGS = """\
Angle and norm ratio: gradient of a half-taught student's weights over half of the positions against
full KD's; for the unbiased signals this is noise that falls with the square root of the number of
positions. Sum Var/p weighs the far tail, where theory promises threshold sampling no gain. RS-KD
with 50 draws takes {size:.2f} bytes.
"""

STUDENTS = """\
A linear layer over {features} fixed projections of the teacher's last hidden state, {epochs} epochs
over three quarters of the windows, held out the rest; mean ± standard deviation over {seeds} seeds
(draws of the record and order of the windows).
"""


def family(arms: Sequence[Any], name: str) -> list[Any]:
    kind, missing = FAMILIES[name]
    return [a for a in arms if a.signal.startswith(kind) and a.missing == missing]


def plot(arms: Sequence[Any], path: Path) -> None:
    """Error against bytes, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "RS-KD": ("#c2410c", "-", "o"),
        "threshold": ("#1d4ed8", "-", "o"),
        "top-K, renormalize": ("#6b7280", "--", "s"),
        "top-K, ghost or none": ("#6b7280", ":", "^"),
        "top-K, label": ("#9ca3af", "-.", "v"),
    }
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    for name, (color, line, marker) in styles.items():
        points = sorted((a.bytes_per_token, a.expected) for a in family(arms, name))
        kind = "noise, unbiased" if name in ("RS-KD", "threshold") else "bias"
        x, y = np.array(points).T
        axes.plot(x, y, line, color=color, marker=marker, markersize=4, label=f"{name} ({kind})")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [4, 8, 16, 24, 36, 64, 128]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("stored bytes per token")
    axes.set_ylabel("mean squared error of the target, ||w − p||²")
    axes.set_title("What a stored byte buys (SmolLM2-135M, real text)")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def page(result: dict[str, Any], arms: Sequence[Any], at: Callable[..., float | None]) -> str:
    checks = result["checks"]
    rskd = next(a for a in arms if a.signal == "sampled:50")
    out = [HEAD, f"{result['positions']:,} positions.", "", "![error against bytes](variance.png)"]
    out += ["", "## Targets", ""]
    lines = []
    for where in ("bytes", "ids"):
        value = checks[f"at RS-KD 50's {where}"]
        met = "" if value is None else "met" if value <= 0.38 else "MISSED"
        shown = "out of range" if value is None else f"{value:.3f}"
        lines.append([f"threshold / RS-KD N = 50, equal {where}", shown, "0.38", met])
    for signal, found in checks["unbiased"].items():
        shown = f"{found['excess']:+.5f} ± {found['standard_error']:.5f}"
        inside = abs(found["excess"]) <= 3 * found["standard_error"]
        lines.append([f"bias^2 / error of {signal}", shown, "0", "met" if inside else "MISSED"])
    for tau, found in checks["rounding"].items():
        worse = found["ids that vary more than RS-KD's"]
        name = f"ids that vary more at tau = {tau} than under RS-KD({tau[2:]})"
        lines.append([name, str(worse), "0", "met" if worse == 0 else "MISSED"])
    out += table(["what", "measured", "required", ""], lines)
    first = next(iter(checks["unbiased"].values()))
    out += ["", BIAS.format(draws=first["draws"], positions=first["positions"])]
    out += ["", "## What rounding adds to threshold records", ""]
    keys = ("error", "steps of 1/64, share", "float16 label, share")
    lines = [
        [tau, f"{f[keys[0]]:.6f}", f"{100 * f[keys[1]]:.2f} %", f"{100 * f[keys[2]]:.4f} %"]
        for tau, f in checks["rounding"].items()
    ]
    out += table(["tau", "error without rounding", "steps of 1/64 nat", "float16 label"], lines)
    out += ["", ROUNDING]
    out += [
        "",
        "## Error at equal bytes",
        "",
        "Interpolated between the settings measured; empty where none is near.",
        "",
    ]
    lines = []
    for name in FAMILIES:
        values = [at(family(arms, name), "bytes_per_token", b) for b in BUDGETS]
        lines.append([name, *("" if v is None else f"{v:.5f}" for v in values)])
    noise, ours = (family(arms, name) for name in ("RS-KD", "threshold"))
    ratio = []
    for budget in BUDGETS:
        pair = [at(f, "bytes_per_token", budget) for f in (ours, noise)]
        ratio.append("" if None in pair else f"**{pair[0] / pair[1]:.2f}**")  # type: ignore[operator]
    lines.append(["threshold / RS-KD", *ratio])
    out += table(["B/token", *map(str, BUDGETS)], lines)
    out += ["", "## Every setting", "", SETTINGS.format(size=rskd.bytes_per_token)]
    lines = [
        [
            a.signal + (f", {a.missing}" if a.missing else ""),
            f"{a.bytes_per_token:.2f}",
            f"{a.ids:.2f}",
            f"{a.error:.6f} ± {a.standard_error:.6f}",
            f"{a.expected:.6f}",
            f"{a.bias:.5f}",
            f"{a.relative:.0f}" if a.relative else "",
            f"{a.angle:.1f}",
            f"{a.norm:.2f}",
        ]
        for a in arms
    ]
    head = ["signal", "B/token", "ids", "error of one draw", "expected", "bias norm"]
    out += table([*head, "sum Var/p", "angle, deg", "norm ratio"], lines)
    out += ["", "## What it is worth: a student per arm", "", STUDENTS.format(**result["student"])]
    lines = []
    for name, found in result["students"].items():
        values = np.array(found)
        mean, spread = values.mean(0), values.std(0, ddof=1)
        lines.append([name, *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, spread, strict=True))])
    out += table(["taught by", "KL(teacher, student), nats", "label log-loss, nats"], lines)
    return "\n".join(out) + "\n"
