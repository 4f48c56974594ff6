"""`logitstore precompute`: a teacher's distributions over a corpus, into a store."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from logitstore_cli.capture_display import readable_bytes, show_progress
from logitstore_cli.capture_options import Separator, more_files, record_options
from logitstore_cli.command import HELP_FLAGS, command, json_option
from logitstore_cli.config_file import config_option
from logitstore_cli.interrupt import interruptible
from logitstore_cli.output import Output

if TYPE_CHECKING:
    from logitstore.capture import CaptureResult, CaptureSettings, Estimate

EXAMPLE = """\
logitstore precompute --teacher hf:FOLDER --corpus 'texts/*.txt' --signal topk:64 --out STORE
logitstore precompute --config capture.toml --dry-run
logitstore precompute --task classification --teacher py:MODULE:FUNCTION --corpus images.npy \
  --labels labels.npy --signal dense --out STORE"""


@command(
    "precompute",
    example=EXAMPLE,
    context_settings={**HELP_FLAGS, "auto_envvar_prefix": "LOGITSTORE_PRECOMPUTE"},
)
@more_files
@click.option("--teacher", required=True, help="hf:FOLDER_OR_ID or py:module:function.")
@click.option(
    "--corpus",
    required=True,
    multiple=True,
    metavar="FILE...",
    help="Text, JSONL (.jsonl) or Parquet (.parquet) files, or quoted patterns; "
    "for classification also .npy, .npz and IDX (*-ubyte.gz).",
)
@click.option(
    "--task",
    type=click.Choice(["language-model", "classification"]),
    default="language-model",
    show_default=True,
    help="What the teacher is: one row of logits for every token, or one for every sample.",
)
@click.option("--signal", required=True, help="What to keep of a distribution: topk:64, ...")
@click.option("--out", required=True, metavar="STORE", help="Folder or URL of the store.")
@record_options
@click.option(
    "--labels",
    multiple=True,
    metavar="FILE",
    help="Classification: files of labels, one for each file of arrays, in the same order.",
)
@click.option("--label-key", help="Classification: field of a row, or array of an .npz, of labels.")
@click.option(
    "--input-key", help="Classification: array of an .npz of the inputs; default: inputs."
)
@click.option("--max-samples", type=int, help="Classification: capture only so many samples.")
@click.option("--shard-samples", type=int, help="Classification: samples of a shard.")
@click.option(
    "--batch-samples",
    type=int,
    default=256,
    show_default=True,
    help="Classification: of a forward pass.",
)
@click.option(
    "--views",
    type=int,
    help="Classification of images: views of each, the image as it is among them.",
)
@click.option(
    "--crop-padding",
    type=int,
    default=4,
    show_default=True,
    help="Of --views: shift by up to so many pixels.",
)
@click.option("--flip/--no-flip", default=True, help="Of --views: mirror half of them.")
@click.option(
    "--keep-thumbnails", is_flag=True, help="Classification: keep a picture of each image to view."
)
@click.option("--max-tokens", type=int, help="Capture only so many tokens of the corpus.")
@click.option("--shard-tokens", type=int, help="Tokens of a shard; default: two minutes' worth.")
@click.option(
    "--bos",
    type=click.Choice(["auto", "document", "none"]),
    default="auto",
    show_default=True,
    help="BOS before every document, or not; auto: as the tokenizer does by itself.",
)
@click.option(
    "--bos-check/--no-bos-check",
    default=True,
    help="Refuse when the other BOS choice is ten times better.",
)
@click.option(
    "--container",
    type=click.Choice(["zarr", "arrow"]),
    default="zarr",
    show_default=True,
    help="zarr: small; arrow: fast to read.",
)
@click.option(
    "--rank-ids",
    is_flag=True,
    help="Keep frequency ranks for ids, from a longer pilot: 2 to 7 % smaller, reads slower.",
)
@click.option(
    "--batch-tokens", type=int, default=2048, show_default=True, help="Of a forward pass."
)
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes.")
@click.option(
    "--threads-per-worker", type=int, help="CPU threads of each; default: cores / workers."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random function.")
@click.option("--dry-run", is_flag=True, help="Run a pilot and print what a capture would take.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "bar", "json", "none"]),
    default="auto",
    show_default=True,
    help="Live display, or JSON lines, on stderr.",
)
@config_option
@json_option
@click.pass_context
def precompute(
    ctx: click.Context,
    /,
    more_files: tuple[str, ...],
    dry_run: bool,
    progress: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a teacher over a corpus and keep its distributions in a store.

    The same command continues a capture that was stopped. Options can also stand in a file
    (--config) or in variables such as LOGITSTORE_PRECOMPUTE_TEACHER.
    """
    from logitstore.capture import CaptureSettings
    from logitstore.spec.errors import Interrupted

    options["corpus"] = (*options["corpus"], *more_files)
    options["check_bos"] = options.pop("bos_check")
    settings = CaptureSettings(**options)
    out = ctx.ensure_object(Output)
    stopped = Interrupted(
        "capture-interrupted",
        "stopped; what was committed is kept",
        where=settings.out,
        hint=f"continue with: {_typed(ctx)}",
    )
    with interruptible(f"Error: {stopped.message}"):
        if dry_run:
            _dry_run(out, settings, as_json)
        else:
            _capture(out, settings, progress, as_json)


command = precompute


def _capture(out: Output, settings: CaptureSettings, progress: str, as_json: bool) -> None:
    from logitstore.capture import precompute
    from logitstore.spec.errors import PartialError

    try:
        with show_progress(out, progress, _noun(settings)) as on_progress:
            result = precompute(settings, on_progress=on_progress, on_note=out.note)
    except PartialError as error:
        if as_json:
            out.json("precompute", {"complete": False, **error.data})
        raise
    for note in result.notes:
        out.note(note)
    if as_json:
        out.json("precompute", {"complete": True, **dataclasses.asdict(result)})
    out.note(_summary(result, _noun(settings)))


def _noun(settings: CaptureSettings) -> str:
    return "samples" if settings.task == "classification" else "tokens"


def _summary(result: CaptureResult, noun: str) -> str:
    if not result.shards:
        return f"{result.store} is complete: {result.skipped_shards} shards"
    per_token = result.stored_bytes / max(result.tokens, 1)
    return (
        f"{result.store}: {result.tokens:,} {noun} in {result.shards} shards, "
        f"{readable_bytes(result.stored_bytes)} ({per_token:.1f} bytes per {noun[:-1]}), "
        f"{result.tokens / max(result.seconds, 1e-9):,.0f} {noun}/s"
    )


def _dry_run(out: Output, settings: CaptureSettings, as_json: bool) -> None:
    from logitstore.capture import estimate

    found = estimate(settings, on_note=out.note)
    if as_json:
        out.json("precompute-dry-run", dataclasses.asdict(found))
    else:
        out.table(["", "estimate"], _rows(found, _noun(settings)))


def _rows(found: Estimate, noun: str) -> list[tuple[str, str]]:
    about = "" if found.exact_tokens else "about "
    rows = [
        ("documents", f"{found.documents:,}"),
        (noun, f"{about}{found.tokens:,}"),
        ("shards", f"{found.shards:,}"),
        (f"bytes per {noun[:-1]}", f"{found.bytes_per_token:.1f}"),
        ("bytes", f"{found.stored_bytes:,} ({readable_bytes(found.stored_bytes)})"),
        (f"{noun}/s of a worker", f"{found.tokens_per_s:,.0f}"),
        ("hours", f"{found.hours:.2f}"),
    ]
    if found.nll is not None:
        rows.append((f"nats per {noun[:-1]}", f"{found.nll:.3f}"))
    return [*rows, (f"pilot {noun}", f"{found.pilot_tokens:,}")]


def _typed(ctx: click.Context) -> str:
    """The command as the user typed it, from the options that were typed."""
    words = ["logitstore", "precompute"]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params.get(name)
        if isinstance(parameter, click.Option):
            words += _option_words(parameter, value)
    words += [str(file) for file in ctx.params.get("more_files", ())]
    return shlex.join(words)


def _option_words(option: click.Option, value: Any) -> list[str]:
    if option.is_flag:
        chosen = option.opts if value else option.secondary_opts
        return chosen[:1]
    if option.multiple:
        return [word for item in value for word in (option.opts[0], str(item))]
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(option.type, Separator):
        value = str(value).encode("unicode_escape").decode()
    return [option.opts[0], str(value)]
