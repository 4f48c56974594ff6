"""`logitstore verify`: is everything there, and is it what was written?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command("verify", example="logitstore verify STORE\nlogitstore verify STORE --full --json")
@click.argument("store")
@click.option("--full", is_flag=True, help="Read every byte: hashes, checksums and values.")
@form.json_option
@pass_output
def command(out: Output, store: str, full: bool, as_json: bool) -> int:
    """Check STORE and list every problem; exit code 4 when there are any.

    Without --full: every document against its digest and the others, tables, and the size of every
    object.
    """
    from logitstore.store import verify

    with _progress(out, full) as progress:
        found = verify(store, full=full, progress=progress)
    rate = found.bytes / 1e6 / found.seconds if full and found.seconds else None
    if as_json:
        out.json("verify", {**found.as_dict(), "megabytes_per_s": rate})
        return 0 if found.ok else form.FAILED
    for problem in found.problems:
        out.data(out.printable(_problem(problem)))
    checked = f"{found.documents:,} documents, {found.objects:,} objects ({found.bytes:,} bytes)"
    if full:
        checked += f", {found.chunks:,} chunks"
    speed = "" if rate is None else f", {rate:,.0f} MB/s"
    out.data(f"checked {checked} in {found.seconds:.2f} s{speed}")
    if found.uncommitted:
        out.data(f"{found.uncommitted:,} planned shards are not captured yet")
    if not full and found.ok:
        out.note("sizes and documents agree; --full also reads every object")
    out.data("no problems" if found.ok else f"{len(found.problems):,} problems")
    return 0 if found.ok else form.FAILED


def _problem(problem: dict[str, Any]) -> str:
    place = problem.get("shard") or problem.get("document")
    parts = [f"{place}: [{problem['kind']}] {problem['what']}"]
    parts += [f"{name} {problem[name]}" for name in ("got", "expected") if problem[name]]
    return "; ".join(parts)


@contextmanager
def _progress(out: Output, full: bool) -> Iterator[Callable[[int, int], None] | None]:
    if not (full and out.shows_progress):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=out.console, transient=True
    ) as bar:
        task = bar.add_task("verify", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
