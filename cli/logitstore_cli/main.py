"""The entry point: finds the command, runs it, and turns failures into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 partly done (the same command continues),
4 verification failed, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys

import click
from click.shell_completion import CompletionItem

from logitstore_cli.command import HELP_FLAGS, shared_options, write_docs, write_example

__all__ = ["COMMANDS", "cli", "main"]

# name -> one line for the overview, in the order of use. The module is `commands/NAME.py`; the line
# stands here so that the overview loads none of them.
COMMANDS = {
    "estimate": "Compare signals on your own corpus and teacher before a capture.",
    "precompute": "Run a teacher over a corpus and keep its distributions in a store.",
    "inspect": "Show a store's header, shards and one decoded sample.",
    "stats": "Print what a store holds and what it costs per token.",
    "view": "Show stores in the browser, token by token.",
    "serve": "Serve stores over HTTP, read-only.",
    "keys": "Create, list and revoke keys of the service.",
    "config": "Show the service's settings as they take effect.",
    "verify": "Check a store's documents and objects against their checksums.",
    "seal": "Close a finished store and write its index.",
    "gc": "Remove objects that no commit refers to.",
    "audit": "Run the teacher again on random samples and compare.",
    "copy": "Bring a store to another place, checked and resumable.",
    "convert": "Copy a store with another signal or container, where that is exact.",
}

EXAMPLE = """\
logitstore precompute --teacher hf:FOLDER --corpus FILE --signal topk:64 --out STORE
logitstore inspect STORE"""


class LazyGroup(click.Group):
    """A group that imports a command's module only to run that command or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if importlib.util.find_spec(_module(name))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(_module(cmd_name)).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in (known := self.list_commands(ctx)):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else " See 'logitstore --help'."
            ctx.fail(f"No such command '{name}'.{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, EXAMPLE)
        super().format_help(ctx, formatter)
        write_docs(formatter, "commands")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if names := self.list_commands(ctx):
            with formatter.section("Commands"):
                formatter.write_dl([(name, COMMANDS[name]) for name in names])


def _module(command_name: str) -> str:
    return f"logitstore_cli.commands.{command_name.replace('-', '_')}"


@click.group(cls=LazyGroup, context_settings=HELP_FLAGS)
@click.version_option(package_name="logitstore", message="%(prog)s %(version)s")
@shared_options
def cli() -> None:
    """Keep a teacher's distributions once; train any number of students from them."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit the process."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run the command line and return its exit code; a failure is a message on stderr."""
    try:
        code = cli.main(args, prog_name="logitstore", standalone_mode=False)
        if sys.stdout is not None:  # None: started with a closed stdout
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:  # what click makes of KeyboardInterrupt
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from logitstore.spec.errors import LogitstoreError

        if os.environ.get("LOGITSTORE_TRACEBACK") == "1":
            raise
        if isinstance(error, LogitstoreError):
            click.echo(f"Error: {error.message}", err=True)
            return error.exit_code
        if isinstance(error, OSError):
            click.echo(f"Error: {error}", err=True)
            return 1
        raise
