"""How a running capture is shown: a live line on a terminal, or JSON lines for schedulers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from logitstore_cli.output import Output

if TYPE_CHECKING:
    from logitstore.capture import Progress

__all__ = ["readable_bytes", "show_progress"]


@contextlib.contextmanager
def show_progress(
    out: Output, mode: str, noun: str = "tokens"
) -> Iterator[Callable[[Progress], None] | None]:
    """A callback that displays progress on stderr; None when nothing is to be shown.

    `mode`: "json", "none", "bar", or "auto": a bar on a terminal and nothing elsewhere.
    `noun`: what is counted.
    """
    if mode == "json":
        yield _json_line
    elif mode == "bar" or (mode == "auto" and out.shows_progress):
        with _bar(out, noun) as update:
            yield update
    else:
        yield None


def _json_line(progress: Progress) -> None:
    body = {"schema": "logitstore.progress/1", **dataclasses.asdict(progress)}
    click.echo(json.dumps(body), err=True)


@contextlib.contextmanager
def _bar(out: Output, noun: str) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [
        TextColumn("{task.fields[shard]}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    ]
    with Bar(*columns, console=out.console, transient=True) as bar:
        task = bar.add_task("capture", total=None, shard="", state="starting")

        def update(progress: Progress) -> None:
            retries = f", {progress.retries} retries" if progress.retries else ""
            bar.update(
                task,
                completed=progress.tokens,
                total=progress.tokens_total,
                shard=f"shard {progress.shards}/{progress.shards_total}",
                state=(
                    f"{progress.tokens:,} {noun}, {progress.tokens_per_s:,.0f} {noun}/s, "
                    f"{readable_bytes(progress.stored_bytes)}{retries}"
                ),
            )

        yield update


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 KB"; powers of 1,000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
