"""`logitstore estimate`: which signal, from a pilot over the user's own corpus and teacher."""

from __future__ import annotations

from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.capture_display import readable_bytes
from logitstore_cli.capture_options import more_files, record_options
from logitstore_cli.output import Output, pass_output


@form.command(
    "estimate",
    example="logitstore estimate --teacher hf:FOLDER --corpus 'texts/*.txt'\n"
    "logitstore estimate --teacher hf:FOLDER --corpus A.jsonl --signal topk:32 --signal topk:8\n"
    "logitstore estimate --task classification --teacher py:MODULE:FUNCTION --corpus images.npy",
)
@more_files
@click.option("--teacher", required=True, help="hf:FOLDER_OR_ID or py:module:function.")
@click.option(
    "--corpus", required=True, multiple=True, metavar="FILE...", help="Files or patterns."
)
@click.option(
    "--task",
    type=click.Choice(["language-model", "classification"]),
    default="language-model",
    show_default=True,
    help="What the teacher is.",
)
@click.option("--labels", multiple=True, metavar="FILE", help="Classification: files of labels.")
@click.option("--label-key", help="Classification: field of a row, or array of an .npz, of labels.")
@click.option("--input-key", help="Classification: array of an .npz of the inputs.")
@click.option("--views", type=int, help="Classification of images: views of each.")
@click.option("--max-samples", type=int, help="Classification: of the capture that is planned.")
@click.option("--signal", "signals", multiple=True, help="Candidates; default: a usual choice.")
@record_options
@click.option(
    "--bos", type=click.Choice(["auto", "document", "none"]), default="auto", show_default=True
)
@click.option("--max-tokens", type=int, help="Of the capture that is planned.")
@click.option(
    "--container", type=click.Choice(["zarr", "arrow"]), default="zarr", show_default=True
)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--pilot-tokens", type=click.IntRange(64), default=4096, show_default=True)
@form.json_option
@pass_output
def command(
    out: Output,
    /,
    more_files: tuple[str, ...],
    signals: tuple[str, ...],
    pilot_tokens: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Run TEACHER over a slice of CORPUS and compare signals: bytes, hours, kept mass, error, bias.

    Error is the mean squared distance of a position's stored weights from the full distribution;
    bias is what of it no number of samples would average out.
    """
    from logitstore.analysis.estimate import advise
    from logitstore.capture import CaptureSettings

    chosen["corpus"] = (*chosen["corpus"], *more_files)
    settings = CaptureSettings(signal=signals[0] if signals else "dense", out="", **chosen)
    advice = advise(settings, signals, pilot_tokens=pilot_tokens, on_note=out.note)
    noun = "sample" if settings.task == "classification" else "token"
    if as_json:
        out.json("estimate", advice.as_dict())
        return
    about = "" if advice.exact_tokens else "about "
    out.data(
        f"{advice.documents:,} documents, {about}{advice.tokens:,} {noun}s; "
        f"teacher {advice.teacher_tokens_per_s:,.0f} {noun}s/s; "
        f"measured on {advice.pilot_tokens:,} {noun}s"
    )
    out.table(
        ["signal", f"bytes/{noun}", "total", "hours", "kept mass", "error", "bias"],
        [
            [
                o.signal + (" *" if o.signal == advice.recommended else ""),
                f"{o.bytes_per_token:.1f}",
                readable_bytes(o.total_bytes),
                f"{o.hours:.2f}",
                "-" if o.kept_mass is None else f"{o.kept_mass:.3f}",
                "-" if o.squared_error is None else f"{o.squared_error:.5f}",
                "-" if o.bias is None else f"{o.bias:.4f}",
            ]
            for o in advice.options
        ],
    )
    out.data(f"* recommended: {advice.recommended}: {advice.reason}")
