"""Write the options of every command into docs/commands.md, below each command's text.

    python docs/list_options.py

A test compares the result with the file.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from logitstore_cli.main import COMMANDS, cli

PAGE = Path(__file__).resolve().parent / "commands.md"
# Said once, at the head of the page.
SHARED = {"quiet", "verbose", "no_color", "help"}


def page_text() -> str:
    """The page with the tables that the commands give today."""
    head, *sections = re.split(r"(?m)^## ", PAGE.read_text(encoding="utf-8"))
    return head + "".join("## " + _section(text) for text in sections)


def _section(text: str) -> str:
    name = text.partition("\n")[0]
    prose = text.partition("\n| option |")[0].strip("\n")
    table = _table(name) if name in COMMANDS else []
    return "\n".join([prose, "", *table]).rstrip("\n") + "\n\n" if table else prose + "\n\n"


def _table(name: str) -> list[str]:
    with cli.make_context("logitstore", [], resilient_parsing=True) as ctx:
        command = cli.get_command(ctx, name)
        if command is None:
            return []
        rows = [
            _row(option, ctx)
            for option in command.params
            if isinstance(option, click.Option) and option.name not in SHARED
        ]
    return ["| option | meaning |", "| --- | --- |", *rows] if rows else []


def _row(option: click.Option, ctx: click.Context) -> str:
    record = option.get_help_record(ctx)
    assert record is not None
    flag, meaning = (re.sub(r"\s+", " ", part).replace("|", "\\|") for part in record)
    return f"| `{flag}` | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(page_text().rstrip("\n") + "\n", encoding="utf-8")
