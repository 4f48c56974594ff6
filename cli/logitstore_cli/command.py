"""The form every command shares: help with an example and a page, `--quiet`, `--verbose`, colours.

@command("stats", example="logitstore stats STORE --json")
@click.argument("store")
@pass_output
def command(out: Output, store: str) -> None:
    '''Print what a store holds and costs.'''
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from logitstore_cli.output import Output

__all__ = [
    "DOCS",
    "FAILED",
    "HELP_FLAGS",
    "Command",
    "Group",
    "command",
    "group",
    "json_option",
    "shared_options",
]

DOCS = "docs/commands.md"
# Exit code: what was looked at is not as it should be.
FAILED = 4
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    with formatter.section("Example"):
        for line in example.splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
    formatter.write_paragraph()


def write_docs(formatter: click.HelpFormatter, anchor: str) -> None:
    formatter.write_paragraph()
    formatter.write(f"Docs: {DOCS}#{anchor}\n")


class Command(click.Command):
    """A command whose help begins with an example and ends with the page that tells more."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP_FLAGS, **kwargs})
        self.example = example

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, self.example)
        super().format_help(ctx, formatter)
        # A subcommand is described where its group is.
        group = ctx.parent.command if ctx.parent is not None else None
        write_docs(formatter, (group if isinstance(group, Group) else self).name or "")


class Group(click.Group):
    """A command with subcommands, whose help has the form of every command's."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP_FLAGS, **kwargs})
        self.example = example

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, self.example)
        super().format_help(ctx, formatter)
        write_docs(formatter, self.name or "")


def command(name: str, *, example: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command; `example` is one or more lines that a user can type."""

    def decorate(function: Callable[..., Any]) -> Command:
        return click.command(name, cls=Command, example=example, **kwargs)(shared_options(function))

    return decorate


def group(name: str, *, example: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Group]:
    """Make a function a command with subcommands; they join it with `add_command`."""

    def decorate(function: Callable[..., Any]) -> Group:
        return click.group(name, cls=Group, example=example, **kwargs)(shared_options(function))

    return decorate


def shared_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that steer messages; they work before and after the command's name."""
    for flag, attribute, text in reversed(
        [
            ("--quiet", "quiet", "Print no messages and no progress."),
            ("--verbose", "verbose", "Print more messages."),
            ("--no-color", "no_color", "Print no colours; the same as NO_COLOR=1."),
        ]
    ):
        function = click.option(
            flag,
            attribute,
            is_flag=True,
            expose_value=False,
            callback=_set_output_attribute,
            help=text,
        )(function)
    return function


def _set_output_attribute(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and parameter.name:
        setattr(ctx.ensure_object(Output), parameter.name, True)
