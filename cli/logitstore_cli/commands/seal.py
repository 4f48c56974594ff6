"""`logitstore seal`: close a finished store."""

from __future__ import annotations

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command("seal", example="logitstore seal STORE")
@click.argument("store")
@form.json_option
@pass_output
def command(out: Output, store: str, as_json: bool) -> None:
    """Write the index of STORE, once every planned shard is there.

    A sealed store accepts no more shards, opens in two reads whatever its size, and can be served
    by a plain static HTTP server. Sealing again changes nothing.
    """
    from logitstore import store as stores

    with stores.open(store) as opened:
        was_sealed = opened.sealed
    if not was_sealed:
        with stores.append(store) as writer:
            writer.seal()
    with stores.open(store) as opened:
        body = {
            "location": str(opened.location),
            "already_sealed": was_sealed,
            "shards": len(opened.shards),
            "samples": opened.num_samples,
            "positions": opened.num_positions,
            "bytes": sum(view.object_bytes for view in opened.shards),
        }
    if as_json:
        out.json("seal", body)
        return
    out.data(
        f"{'already sealed' if was_sealed else 'sealed'}: {body['shards']:,} shards, "
        f"{body['samples']:,} samples, {body['positions']:,} positions, {body['bytes']:,} bytes"
    )
