"""The shell around every command: help, streams, colours, exit codes."""

from __future__ import annotations

import json
import os
import pty
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import logitstore_cli.commands
from logitstore_cli import main as main_module
from logitstore_cli.command import DOCS
from logitstore_cli.main import COMMANDS, cli, run
from tests.source_tree import REPOSITORY

PROBE = '''
import os, signal, sys, time
import click
from logitstore.spec import errors
from logitstore_cli.command import command, json_option
from logitstore_cli.output import pass_output

@command("probe", example="logitstore probe ok")
@click.argument("what")
@json_option
@pass_output
def command(out, what, as_json):
    """Do what the test asks."""
    if what == "ok":
        out.detail("detail"); out.note("note"); out.warn("warning text")
        if as_json:
            out.json("probe", {"value": 1})
        else:
            out.table(["name", "bytes"], [["a", 5], ["long name", 12345]])
    elif what == "nan":
        out.json("probe", {"value": float("nan")})
    elif what == "colour":
        out.console.print("[red]coloured[/red]"); out.data(f"progress {out.shows_progress}")
    elif what == "many-lines":
        for _ in range(100_000):
            out.data("a line of data")
    elif what == "sleep":
        out.note("sleeping"); time.sleep(60)
    elif what == "interrupt":
        raise KeyboardInterrupt
    elif what == "os-error":
        open("/nonexistent/file")
    elif what == "bug":
        raise ZeroDivisionError("a mistake of ours")
    else:
        raise getattr(errors, what)("bad-argument", "it failed", where="here", hint="do this")
'''


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adds a command `probe` that lives in a folder of the test; returns the folder."""
    (tmp_path / "probe.py").write_text(PROBE)
    path = [*logitstore_cli.commands.__path__, str(tmp_path)]
    monkeypatch.setattr(logitstore_cli.commands, "__path__", path)
    monkeypatch.setitem(main_module.COMMANDS, "probe", "Do what the test asks.")
    monkeypatch.delitem(sys.modules, "logitstore_cli.commands.probe", raising=False)
    return tmp_path


def program(probe: Path, *args: str) -> list[str]:
    """The command line of a process that runs `logitstore ARGS` with the command `probe`."""
    code = (
        "import sys, logitstore_cli.commands as c\n"
        f"c.__path__ = [*c.__path__, {str(probe)!r}]\n"
        "from logitstore_cli import main\n"
        "main.COMMANDS['probe'] = 'Do what the test asks.'\n"
        "main.main(sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *args]


def listed_commands() -> list[str]:
    return cli.list_commands(cli.make_context("logitstore", [], resilient_parsing=True))


def test_overview_names_every_command_with_its_line() -> None:
    help_text = CliRunner().invoke(cli, ["--help"]).output
    assert help_text.startswith("Example:\n  logitstore precompute ")
    assert help_text.rstrip().endswith(f"Docs: {DOCS}#commands")
    for name in listed_commands():
        assert f"  {name} " in help_text


@pytest.mark.parametrize("name", listed_commands())
def test_help_of_a_command_begins_with_an_example_and_ends_with_its_page(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "-h"], prog_name="logitstore")
    assert result.exit_code == 0
    assert result.output.startswith(f"Example:\n  logitstore {name} ")
    assert result.output.rstrip().endswith(f"Docs: {DOCS}#{name}")


def test_every_command_has_a_heading_in_the_page() -> None:
    page = (REPOSITORY / DOCS).read_text(encoding="utf-8")
    headings = {line[3:] for line in page.splitlines() if line.startswith("## ")}
    assert headings == set(COMMANDS)


def test_the_page_lists_every_option() -> None:
    written = runpy.run_path(str(REPOSITORY / "docs" / "list_options.py"))["page_text"]()
    page = (REPOSITORY / DOCS).read_text(encoding="utf-8")
    assert page.rstrip() == written.rstrip(), "run: python docs/list_options.py"


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("LogitstoreError", 1),
        ("NotFoundError", 1),
        ("UsageError", 2),
        ("PartialError", 3),
        ("IntegrityError", 4),
        ("Interrupted", 130),
    ],
)
def test_errors_become_a_message_and_their_exit_code(
    probe: Path, capfd: pytest.CaptureFixture[str], what: str, code: int
) -> None:
    assert run(["probe", what]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "Error: [bad-argument] here: it failed\n  do this\n"


def test_traceback_on_demand(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitstore.spec.errors import UsageError

    monkeypatch.setenv("LOGITSTORE_TRACEBACK", "1")
    with pytest.raises(UsageError, match="it failed"):
        run(["probe", "UsageError"])


def test_a_mistake_of_ours_keeps_its_traceback(probe: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(["probe", "bug"])


def test_system_errors_show_no_traceback(probe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "os-error"]) == 1
    assert capfd.readouterr().err.endswith("No such file or directory: '/nonexistent/file'\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prob", "ok"], "No such command 'prob'. Did you mean 'probe'?"),
        (["xyzzy"], "No such command 'xyzzy'. See 'logitstore --help'."),
        (["probe"], "Missing argument 'WHAT'."),
        (["probe", "ok", "--jsn"], "No such option '--jsn'. Did you mean '--json'?"),
    ],
)
def test_wrong_usage_says_what_was_meant(
    probe: Path, capfd: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert run(args) == 2
    assert message in capfd.readouterr().err


def test_data_and_messages_go_separate_ways(probe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "ok"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "name       bytes\na              5\nlong name  12345\n"
    assert captured.err == "note\nwarning: warning text\n"


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["--quiet", "probe", "ok"], "warning: warning text\n"),
        (["probe", "ok", "--quiet"], "warning: warning text\n"),
        (["--verbose", "probe", "ok"], "detail\nnote\nwarning: warning text\n"),
        (["probe", "--verbose", "ok"], "detail\nnote\nwarning: warning text\n"),
    ],
)
def test_quiet_and_verbose_work_before_and_after_the_name(
    probe: Path, capfd: pytest.CaptureFixture[str], args: list[str], messages: str
) -> None:
    assert run(args) == 0
    assert capfd.readouterr().err == messages


def test_json_names_its_form(probe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "ok", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"schema": "logitstore.probe/1", "value": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(["probe", "nan"])


@pytest.mark.parametrize(
    ("args", "no_color", "coloured"),
    [([], "", True), ([], "1", False), (["--no-color"], "", False)],
)
def test_colours_on_a_terminal_only_when_wanted(
    probe: Path, args: list[str], no_color: str, coloured: bool
) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
    command = program(probe, "probe", "colour", *args)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=child, env=environment, check=True
    )
    os.close(child)
    shown = os.read(parent, 4096)
    os.close(parent)
    assert b"coloured" in shown
    assert (b"\x1b[31m" in shown) is coloured
    assert done.stdout == b"progress True\n"


def test_no_progress_where_stderr_is_not_a_terminal(probe: Path) -> None:
    done = subprocess.run(program(probe, "probe", "colour"), capture_output=True, check=True)
    assert done.stdout == b"progress False\n"
    assert b"\x1b" not in done.stderr


def test_interrupt_is_130(probe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "interrupt"]) == 130
    assert capfd.readouterr().err.endswith("interrupted\n")


def test_a_signal_from_the_keyboard_is_130_without_traceback(probe: Path) -> None:
    with subprocess.Popen(program(probe, "probe", "sleep"), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"sleeping\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_pipe_that_closes_early_is_quiet(probe: Path) -> None:
    command = program(probe, "probe", "many-lines")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_closed_stdout_is_no_mistake_of_ours(probe: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *program(probe, "probe", "ok")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "note\nwarning: warning text\n")


def test_a_full_stdout_is_said(probe: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = program(probe, "probe", "ok", "--quiet")
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_completion_offers_commands_without_loading_them(probe: Path) -> None:
    environment = {
        **os.environ,
        "_LOGITSTORE_COMPLETE": "bash_complete",
        "COMP_WORDS": "logitstore pro",
        "COMP_CWORD": "1",
    }
    (probe / "probe.py").write_text("raise AssertionError('loaded')")
    done = subprocess.run(
        program(probe), env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "plain,probe\n"
