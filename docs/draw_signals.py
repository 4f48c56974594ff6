"""Draws docs/figures/signal-*.png: what each signal keeps of one real position.

    python docs/draw_signals.py

The position is a real one: SmolLM2-135M in the middle of Genesis 22:3.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from demo import fetch_assets  # noqa: E402
from logitstore.record import Record  # noqa: E402
from logitstore.record.new_header import new_header  # noqa: E402
from logitstore.signals import encoder  # noqa: E402
from logitstore.spec.header import TeacherInfo  # noqa: E402
from logitstore.spec.signals import parse_signal  # noqa: E402
from logitstore.targets import from_records  # noqa: E402

TEXT = "And Abraham rose up early in the morning, and"
LABEL = " sadd"
RANKS = 4000
INK, KEPT, DRAWN, TRUE_NEXT = "#9aa5b1", "#1b6ca8", "#c8553d", "#2a9d5c"


def one_position(folder: Path) -> tuple[torch.Tensor, int]:
    """Raw logits [V] after TEXT, and the id of LABEL."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits[0, -1]
    return logits, tokenizer(LABEL)["input_ids"][0]


def kept(signal: str, logits: torch.Tensor, label: int) -> Any:
    """Targets of this one position, by way of its record."""
    header = new_header(
        parse_signal(signal),
        vocab_size=len(logits),
        configuration={},
        teacher=TeacherInfo(name="figure"),
        sample_kind="classification",
        aux=None,
    )
    columns = encoder(header).encode(
        logits[None],
        labels_P=torch.tensor([label]),
        keys_P=torch.tensor([4]),
        positions_P=torch.tensor([0]),
    )
    given = {
        "sample_lengths": np.ones(1, np.uint32),
        "num_sample_key": np.zeros(1, np.uint16),
        "sample_key": np.zeros(0, np.uint8),
        "label": np.array([label], header.schema_.column("label").dtype),
    }
    return from_records([Record(header.schema_, {**given, **columns})], header)


def draw(name: str, title: str, p: torch.Tensor, label: int, layers: list[tuple]) -> None:
    """Probability against rank, log scales; `layers` are (ids, weights, colour, marker, text)."""
    order = torch.argsort(p, descending=True)
    rank_of = torch.empty_like(order)
    rank_of[order] = torch.arange(len(order))
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    axes.plot(np.arange(1, RANKS + 1), p[order[:RANKS]], color=INK, lw=1.6, label="teacher")
    for ids, weights, colour, marker, text in layers:
        ranks = rank_of[ids] + 1
        shown = ranks <= RANKS
        beyond = int((~shown).sum())
        note = f"{text} ({len(ids)}" + (f", {beyond} beyond rank {RANKS})" if beyond else ")")
        axes.vlines(ranks[shown], 1e-7, weights[shown], color=colour, lw=1, alpha=0.45)
        axes.plot(ranks[shown], weights[shown], marker, color=colour, ms=4.5, label=note)
    at = int(rank_of[label]) + 1
    style = {"mfc": "none", "mec": TRUE_NEXT, "ms": 9, "label": "true next token"}
    axes.plot([at], [float(p[label])], "D", **style)
    axes.set(xscale="log", yscale="log", xlim=(0.9, RANKS * 1.1), ylim=(2e-6, 20))
    axes.set_xlabel("rank of the id in the teacher's order")
    axes.set_ylabel("probability or weight")
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(REPOSITORY / "docs" / "figures" / f"signal-{name}.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Draw every figure."""
    torch.set_num_threads(1)
    logits, label = one_position(fetch_assets.smollm2())
    p = torch.softmax(logits.double(), -1)
    everything = torch.arange(len(p))
    draw("dense", "dense: every logit", p, label, [(everything, p, KEPT, ".", "stored")])
    top = kept("topk:64", logits, label)
    outside = float(top.log_tail[0].exp())
    draw(
        "topk",
        f"topk:64: the largest ids exactly; {outside:.1%} of the mass lies outside, and is stored",
        p,
        label,
        [(top.ids[0], top.logprobs[0].exp(), KEPT, "o", "stored")],
    )
    nucleus = kept("topk:64,p=0.6", logits, label)
    draw(
        "nucleus",
        "topk:64,p=0.6: the smallest prefix that reaches 60 % of the mass",
        p,
        label,
        [(nucleus.ids[0], nucleus.logprobs[0].exp(), KEPT, "o", "stored")],
    )
    rskd = kept("sampled:50", logits, label)
    draw(
        "sampled",
        "sampled:50: 50 draws, unique ids with counts; right on average, in steps of 1/50",
        p,
        label,
        [(rskd.ids, rskd.weights, DRAWN, "s", "count / 50")],
    )
    threshold = kept("threshold:tau=1/40", logits, label)
    head = threshold.head_mask()
    draw(
        "threshold",
        "threshold:tau=1/40: the head exactly, the tail by one draw with one weight",
        p,
        label,
        [
            (threshold.ids[head], threshold.weights[head], KEPT, "o", "head, exact"),
            (threshold.ids[~head], threshold.weights[~head], DRAWN, "s", "tail, sampled"),
        ],
    )
    graph(logits, p)
    candidates = torch.argsort(p, descending=True)[[0, 1, 3, 9, 30, 100, 300]]
    draw(
        "scores",
        "scores:7: raw scores of given candidates only",
        p,
        label,
        [(candidates, p[candidates], KEPT, "^", "given")],
    )


def graph(logits: torch.Tensor, p: torch.Tensor, k: int = 10) -> None:
    """The outer product that this position adds to its segment's co-activation matrix."""
    v = logits.sort(descending=True).values[:k]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(7.2, 3.2), layout="constrained", width_ratios=[1, 1.3]
    )
    extent = (0.5, k + 0.5, k + 0.5, 0.5)
    picture = left.imshow(torch.outer(v, v), cmap="cividis", extent=extent)
    figure.colorbar(picture, ax=left, shrink=0.85)
    left.set(xlabel="rank", ylabel="rank")
    left.set_title("graph:k=10: v v^T, summed per segment", loc="left", fontsize=10)
    right.bar(np.arange(1, k + 1), v * v.sum(), color=KEPT)
    right.set(xlabel="rank", ylabel="row sum f")
    right.set_title("its row sums, all that the loss needs", loc="left", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(REPOSITORY / "docs" / "figures" / "signal-graph.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
