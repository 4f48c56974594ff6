"""`logitstore gc`: remove what no commit refers to, plan first."""

from __future__ import annotations

from dataclasses import asdict

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command("gc", example="logitstore gc STORE\nlogitstore gc STORE --grace-s 3600 --yes")
@click.argument("store")
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0),
    default=86_400.0,
    show_default=True,
    help="Spare files younger than this many seconds.",
)
@click.option(
    "--abandoned",
    is_flag=True,
    help="Also objects of shards that nobody committed. Only while no capture runs.",
)
@click.option("--yes", is_flag=True, help="Delete; without it the plan is only shown.")
@form.json_option
@pass_output
def command(
    out: Output, store: str, grace_s: float, abandoned: bool, yes: bool, as_json: bool
) -> None:
    """Show what of STORE no reader can need, and with --yes delete it.

    That is objects of attempts that lost, generations that were replaced, and temporary files
    that a killed process left. Committed data is never touched.
    """
    from logitstore.store import gc

    plan = gc(store, grace_s=grace_s, abandoned=abandoned, dry_run=not yes)
    if as_json:
        out.json(
            "gc",
            {
                "deletions": [asdict(deletion) for deletion in plan.deletions],
                "bytes": plan.bytes,
                "kept_young": plan.kept_young,
                "kept_unfinished": plan.kept_unfinished,
                "done": plan.done,
            },
        )
        return
    if plan.deletions:
        rows = [
            [out.printable(d.key), d.reason, f"{d.bytes:,}", f"{d.age_s:,.0f}"]
            for d in plan.deletions
        ]
        out.table(["file", "reason", "bytes", "age s"], rows)
    done = "deleted" if plan.done else "to delete"
    out.data(f"{len(plan.deletions):,} files, {plan.bytes:,} bytes {done}")
    if plan.kept_young:
        out.note(f"{plan.kept_young:,} files spared: younger than {grace_s:,.0f} s (--grace-s)")
    if plan.kept_unfinished:
        out.note(
            f"{plan.kept_unfinished:,} objects spared: their shards are not committed (--abandoned)"
        )
    if plan.deletions and not plan.done:
        out.note("nothing was deleted; add --yes to delete")
