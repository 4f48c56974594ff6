"""`logitstore stats`: what a store holds and what it costs, from its commits alone."""

from __future__ import annotations

import math
from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command("stats", example="logitstore stats STORE\nlogitstore stats STORE --json")
@click.argument("store")
@form.json_option
@pass_output
def command(out: Output, store: str, as_json: bool) -> None:
    """Print tokens, bytes per token by column, and statistics of STORE's distributions.

    Nothing is scanned: every shard's commit carries its share. Logarithms are natural: entropies,
    log-probs and the negative log-likelihood (nll) of the labels are in nats.
    """
    from logitstore import store as stores

    with stores.open(store) as opened:
        body = summary(opened)
    if as_json:
        out.json("stats", body)
        return
    out.data(
        f"{body['positions']:,} positions ({body['labels']:,} with a label) in "
        f"{body['samples']:,} samples, {body['shards']:,} shards"
    )
    per = body["bytes_per_position"]
    out.data(f"{body['bytes']:,} bytes" + ("" if per is None else f", {per:.2f} per position"))
    if body["nll"] is not None:
        out.data(f"nll of labels {body['nll']:.4f}, perplexity {body['perplexity']:.3f}")
    out.data("")
    out.table(
        ["column", "bytes", "per position", "share"],
        [
            [c["name"], f"{c['bytes']:,}", _number(c["bytes_per_position"]), f"{c['share']:.1%}"]
            for c in body["columns"]
        ],
    )
    if body["measures"]:
        out.data("")
        out.table(
            ["measure", "positions", "mean", "std", "least", "greatest"],
            [
                [name, f"{m['count']:,}", *(_number(m[k]) for k in _SHOWN)]
                for name, m in body["measures"].items()
            ],
        )


_SHOWN = ("mean", "std", "least", "greatest")


def summary(opened: Any) -> dict[str, Any]:
    """The JSON body of `stats`."""
    positions = opened.num_positions
    total = sum(view.object_bytes for view in opened.shards)
    statistics = opened.statistics()
    logprob = statistics.measures.get("label_logprob")
    nll = -logprob.mean if logprob is not None and logprob.count else None
    reliability = statistics.reliability
    judged = sum(reliability.counts) if reliability is not None else 0
    columns = sorted(opened.column_bytes().items(), key=lambda item: (-item[1], item[0]))
    return {
        "location": str(opened.location),
        "signal": str(opened.header.signal),
        "sealed": opened.sealed,
        "shards": len(opened.shards),
        "samples": opened.num_samples,
        "positions": positions,
        "labels": statistics.labels,
        "bytes": total,
        "bytes_per_position": total / positions if positions else None,
        "columns": [
            {
                "name": name,
                "bytes": size,
                "bytes_per_position": size / positions if positions else None,
                "share": size / total if total else 0.0,
            }
            for name, size in columns
        ],
        "nll": nll,
        "perplexity": None if nll is None else math.exp(min(nll, 700.0)),
        "top1_accuracy": sum(reliability.correct) / judged if reliability and judged else None,
        "measures": {
            name: {
                "count": measure.count,
                "mean": measure.mean,
                "std": _std(measure),
                "least": measure.least,
                "greatest": measure.greatest,
            }
            for name, measure in statistics.measures.items()
        },
    }


def _std(measure: Any) -> float:
    if not measure.count:
        return 0.0
    return math.sqrt(max(0.0, measure.total_squares / measure.count - measure.mean**2))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
