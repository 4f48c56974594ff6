"""`logitstore copy`: bring a store to another disk or bucket, or down from a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from logitstore_cli import command as form
from logitstore_cli.interrupt import interruptible
from logitstore_cli.output import Output, pass_output


@form.command(
    "copy",
    example="logitstore copy https://host/v1/stores/NAME STORE\n"
    "logitstore copy STORE s3://bucket/STORE",
)
@click.argument("source")
@click.argument("target")
@form.json_option
@pass_output
def command(out: Output, source: str, target: str, as_json: bool) -> int:
    """Bring to TARGET what it lacks of the store SOURCE, every byte checked.

    SOURCE is a folder or a URL; TARGET a folder or an s3, gs or az URL, empty or an earlier copy.
    Stopped, the same command goes on. A damaged shard is left out and named; the exit code is
    then 4, and TARGET has no index.
    """
    from logitstore.store import copy

    again = "interrupted; what arrived is kept, and the same command goes on"
    with interruptible(again), _progress(out) as progress:
        done = copy(source, target, progress=progress)
    if as_json:
        out.json("copy", done.as_dict())
        return 0 if done.ok else form.FAILED
    for problem in done.problems:
        parts = [f"{problem['shard']}: [{problem['kind']}] {problem['what']}"]
        parts += [f"{n} {problem[n]}" for n in ("where", "got", "expected") if problem[n]]
        out.data(out.printable("; ".join(parts)))
    speed = f", {done.bytes / 1e6 / done.seconds:,.0f} MB/s" if done.seconds and done.bytes else ""
    out.data(
        f"{done.copied:,} of {done.shards:,} shards copied ({done.bytes:,} bytes{speed}), "
        f"{done.present:,} there already"
    )
    if not done.ok:
        out.data(f"{len(done.problems):,} shards of the source are damaged and were not copied")
    elif not done.sealed:
        out.note("the source is not sealed; copy again to bring what it gets later")
    return 0 if done.ok else form.FAILED


@contextmanager
def _progress(out: Output) -> Iterator[Callable[[int, int], None] | None]:
    if not out.shows_progress:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=out.console, transient=True
    ) as bar:
        task = bar.add_task("copy", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
