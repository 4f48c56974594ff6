"""`logitstore convert`: a narrower or differently packed copy, without the teacher."""

from __future__ import annotations

import dataclasses
from typing import Literal

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command(
    "convert",
    example="logitstore convert STORE COPY --signal topk:32\n"
    "logitstore convert STORE COPY --container arrow",
)
@click.argument("source")
@click.argument("target")
@click.option("--signal", help="Signal of the copy, such as topk:32; default: the source's.")
@click.option("--k", type=int, help="The same as --signal topk:K for a top-K source.")
@click.option(
    "--container", type=click.Choice(["zarr", "arrow"]), help="Default: the source's container."
)
@click.option(
    "--rank-ids/--no-rank-ids",
    default=None,
    help="Keep frequency ranks for ids, 2 to 7 % smaller, or the ids; default: as the source.",
)
@form.json_option
@pass_output
def command(
    out: Output,
    source: str,
    target: str,
    signal: str | None,
    k: int | None,
    container: Literal["zarr", "arrow"] | None,
    rank_ids: bool | None,
    as_json: bool,
) -> None:
    """Copy SOURCE to TARGET with another signal or container, where that is exact.

    Fewer ids of a top-K store, another container, any signal from dense logits. Whatever would need
    numbers the teacher never gave (such as samples from a top-K store) is refused with the reason.
    Interrupted, the same command goes on.
    """
    if k is not None and signal is not None:
        raise click.UsageError("give --signal or --k, not both")
    if signal is None and container is None and k is None and rank_ids is None:
        raise click.UsageError("say what to change: --signal, --k, --container or --rank-ids")
    from logitstore.analysis.convert import convert

    done = convert(
        source,
        target,
        signal=f"topk:{k}" if k is not None else signal,
        container=container,
        rank_ids=rank_ids,
        progress=lambda shard: out.detail(f"shard {shard} written"),
    )
    if as_json:
        out.json("convert", dataclasses.asdict(done))
        return
    share = done.target_bytes / done.source_bytes if done.source_bytes else 0.0
    out.data(
        f"{target}: {done.samples:,} samples, {done.positions:,} positions, "
        f"{done.target_bytes:,} bytes ({share:.0%} of the source)"
    )
    if done.skipped:
        out.note(f"{done.skipped} shards were there already")
