"""Options that commands share which plan a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["Separator", "more_files", "record_options"]


class CommaList(click.ParamType[tuple[Any, ...]]):
    """`a,b,c`, or a list in a configuration file."""

    def __init__(self, item: type, metavar: str) -> None:
        self._item = item
        self.name = metavar

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            parts = [parts]
        try:
            return tuple(self._item(p.strip() if isinstance(p, str) else p) for p in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list of {self.name}", param, ctx)


class Separator(click.ParamType[str]):
    r"""Text in which \n, \t, \\ and \xNN stand for characters."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.isascii():
            return text
        try:
            return text.encode("ascii").decode("unicode_escape")
        except UnicodeDecodeError as error:
            self.fail(f"{text!r}: {error.reason}", param, ctx)


# As a shell expands a pattern behind --corpus.
more_files = click.argument("more_files", metavar="[FILE]...", nargs=-1)

_RECORD = (
    click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens of a window."),
    click.option(
        "--aux",
        type=CommaList(str, "NAMES"),
        help="Fields beside the signal; default: the signal's.",
    ),
    click.option(
        "--lse-at",
        type=CommaList(float, "NUMBERS"),
        default=(),
        help="Temperatures, such as 2.0,4.0.",
    ),
    click.option(
        "--always-ids",
        type=CommaList(int, "NUMBERS"),
        default=(),
        help="Token ids whose log-prob is kept at every position.",
    ),
    click.option("--text-key", help="Field of a row that holds the text; default: text."),
    click.option(
        "--document-separator",
        type=Separator(),
        help=r"Splits text files into documents, such as '\n\n'; default: a file is one.",
    ),
)


def record_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a record is made of: windows, fields beside the signal, documents."""
    for option in reversed(_RECORD):
        function = option(function)
    return function
