"""`logitstore inspect`: look into a store without its model."""

from __future__ import annotations

from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output

_SHARDS_SHOWN = 10


@form.command(
    "inspect", example="logitstore inspect STORE\nlogitstore inspect STORE --sample 41 --rows 64"
)
@click.argument("store")
@click.option("--sample", type=int, default=0, show_default=True, help="Number of the sample.")
@click.option("--rows", type=click.IntRange(min=0), default=16, show_default=True, help="Of it.")
@form.json_option
@pass_output
def command(out: Output, store: str, sample: int, rows: int, as_json: bool) -> None:
    """Show STORE's header, snapshot and shards, and one sample decoded with its tokens' text.

    Needs no model: the text comes from the store's own table of tokens.
    """
    from logitstore import store as stores

    with stores.open(store) as opened:
        decoded = None
        if opened.num_samples:
            decoded = _decode(opened, sample, None if as_json else rows)
        elif sample:
            opened.locate(sample)
        if as_json:
            out.json(
                "inspect",
                {
                    "location": str(opened.location),
                    "sealed": opened.sealed,
                    "header": opened.header.model_dump(mode="json", exclude_none=True),
                    "snapshot": opened.snapshot.as_state(),
                    "samples": opened.num_samples,
                    "positions": opened.num_positions,
                    "shards": [view.__dict__ for view in opened.shards],
                    "sample": decoded,
                },
            )
            return
        for name, value in _header_lines(opened):
            out.data(f"{name:<12}{out.printable(value)}")
        out.data("")
        _print_shards(out, opened)
        if decoded is not None:
            out.data("")
            _print_sample(out, decoded)


def _header_lines(opened: Any) -> list[tuple[str, str]]:
    header = opened.header
    teacher = header.teacher
    lines = [
        ("store", str(opened.location)),
        ("uuid", header.store_uuid),
        ("created", f"{header.created} by {header.writer.name} {header.writer.version}"),
        ("format", f"{header.format_version}, container {header.container}"),
        ("signal", f"{header.signal} over {header.vocab_size:,} ids ({header.sample_kind})"),
        ("fields", ", ".join(header.stored_fields) or "none"),
        (
            "teacher",
            " ".join(filter(None, (teacher.name, teacher.revision, teacher.compute_dtype))),
        ),
    ]
    if header.tokenizer is not None:
        tokenizer = header.tokenizer
        lines.append(("tokenizer", f"{tokenizer.name}, sha256 {tokenizer.fingerprint[:16]}"))
    if header.packing is not None:
        lines.append(("packing", f"{header.packing.seq_len} tokens, {header.packing.attention}"))
    if header.commit_mode != "create-only":
        lines.append(("commits", header.commit_mode))
    planned = sum(len(plan.shards) for plan in opened.plans())
    state = "sealed" if opened.sealed else f"{planned:,} shards planned, not sealed"
    lines.append(("snapshot", f"{opened.snapshot.digest[:16]} ({state})"))
    size = sum(view.object_bytes for view in opened.shards)
    lines.append(
        (
            "holds",
            f"{len(opened.shards):,} shards, {opened.num_samples:,} samples, "
            f"{opened.num_positions:,} positions, {size:,} bytes",
        )
    )
    return lines


def _print_shards(out: Output, opened: Any) -> None:
    shown = opened.shards[:_SHARDS_SHOWN]
    out.table(
        ["shard", "generation", "samples", "positions", "bytes"],
        [
            [v.shard, v.generation, f"{v.samples:,}", f"{v.positions:,}", f"{v.object_bytes:,}"]
            for v in shown
        ],
    )
    if len(opened.shards) > len(shown):
        out.data(f"... and {len(opened.shards) - len(shown):,} more (--json lists all)")


def _print_sample(out: Output, decoded: dict[str, Any]) -> None:
    out.data(
        f"sample {decoded['sample']} ({out.printable(decoded['sample_key'] or 'no key')}), "
        f"{decoded['length']:,} positions, shard {decoded['shard']}, chunk {decoded['chunk']}"
    )
    fields = decoded["fields"]
    # A classification sample has one position and no tokens; without labels it has neither.
    has_token = any(row["id"] is not None for row in decoded["rows"])
    has_label = has_token or any(row["label"] is not None for row in decoded["rows"])
    names = ["token"] * has_token + ["position"] + ["label"] * has_label
    table = []
    for row in decoded["rows"]:
        kept = "  ".join(f"{_visible(out, e['text'])} {e['value']:.3g}" for e in row["kept"][:4])
        table.append(
            [
                *[_visible(out, row["text"])] * has_token,
                str(row["position"]),
                *[_visible(out, row["label_text"])] * has_label,
                *(_number(row["fields"][name]) for name in fields),
                kept,
            ]
        )
    out.table([*names, *fields, decoded["kept_value"] or ""], table)
    if decoded["length"] > len(decoded["rows"]):
        out.data(f"... and {decoded['length'] - len(decoded['rows']):,} more (--rows)")


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _visible(out: Output, token: str) -> str:
    """A token's text with its spaces to be seen."""
    return out.printable(token).replace(" ", "·")


def _decode(opened: Any, sample: int, rows: int | None) -> dict[str, Any]:
    from logitstore_cli.sample_text import decode_sample

    return decode_sample(opened, sample, rows)
