"""Where words go: data to stdout, messages and progress to stderr.

A command receives the `Output` of its run through `pass_output`:

    @pass_output
    def command(out: Output, store: str, as_json: bool) -> None:
        out.note("reading the index")              # stderr; silent with --quiet
        out.json("stats", {"tokens": 50_000})      # stdout
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Output", "pass_output"]


class Output:
    """Writes a command's data and messages, as `--quiet`, `--verbose` and `--no-color` ask."""

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.no_color = False

    def data(self, text: str) -> None:
        """Print what the user asked for, on stdout."""
        click.echo(text)

    def json(self, schema: str, body: Mapping[str, Any]) -> None:
        """Print `body` as one JSON document that names its form: `"schema": "logitstore.NAME/1"`.

        NaN and infinities are refused, since JSON has none.
        """
        document = {"schema": f"logitstore.{schema}/1", **body}
        click.echo(json.dumps(document, indent=2, allow_nan=False))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print columns on stdout: the first aligned left, the others right."""
        cells = [list(header), *([str(value) for value in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        for row in cells:
            first = row[0].ljust(widths[0])
            rest = [value.rjust(width) for value, width in zip(row[1:], widths[1:], strict=True)]
            click.echo("  ".join([first, *rest]).rstrip())

    @staticmethod
    def printable(text: str) -> str:
        """Text of a store for a terminal: control characters, such as escapes, shown as codes."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def note(self, text: str) -> None:
        """Tell what happens, on stderr; silent with `--quiet`."""
        if not self.quiet:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """Tell more, on stderr, with `--verbose` only."""
        if self.verbose:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Warn on stderr, also with `--quiet`."""
        click.echo(f"warning: {text}", err=True)

    @cached_property
    def console(self) -> Console:
        """A rich console on stderr, for progress displays; colourless with `NO_COLOR`."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet, no_color=self.no_color or None)

    @property
    def shows_progress(self) -> bool:
        """Whether a live progress display is wanted: stderr is a terminal and not `--quiet`."""
        return not self.quiet and sys.stderr.isatty()


pass_output = click.make_pass_decorator(Output, ensure=True)
