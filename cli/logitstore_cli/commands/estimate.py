"""`logitstore estimate`: which signal, from a pilot over the user's own corpus and teacher."""

from __future__ import annotations

from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.capture_display import readable_bytes
from logitstore_cli.output import Output, pass_output


@form.command(
    "estimate",
    example="logitstore estimate --teacher hf:FOLDER --corpus 'texts/*.txt'\n"
    "logitstore estimate --teacher hf:FOLDER --corpus A.jsonl --signal topk:32 --signal topk:8",
)
@click.option("--teacher", required=True, help="hf:FOLDER_OR_ID or py:module:function.")
@click.option("--corpus", required=True, multiple=True, metavar="FILE", help="File or pattern.")
@click.option("--signal", "signals", multiple=True, help="Candidates; default: a usual choice.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens of a window.")
@click.option("--text-key", help="Field of a row that holds the text; default: text.")
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
    out: Output, /, signals: tuple[str, ...], pilot_tokens: int, as_json: bool, **chosen: Any
) -> None:
    """Run TEACHER over a slice of CORPUS and compare signals: bytes, hours, kept mass, error, bias.

    Error is the mean squared distance of a position's stored weights from the full distribution;
    bias is what of it no number of samples would average out.
    """
    from logitstore.analysis.estimate import DEFAULT_SIGNALS, advise
    from logitstore.capture import CaptureSettings

    candidates = signals or DEFAULT_SIGNALS
    settings = CaptureSettings(signal=candidates[0], out="", **chosen)
    advice = advise(settings, candidates, pilot_tokens=pilot_tokens, on_note=out.note)
    if as_json:
        out.json("estimate", advice.as_dict())
        return
    about = "" if advice.exact_tokens else "about "
    out.data(
        f"{advice.documents:,} documents, {about}{advice.tokens:,} tokens; "
        f"teacher {advice.teacher_tokens_per_s:,.0f} tokens/s; "
        f"measured on {advice.pilot_tokens:,} tokens"
    )
    out.table(
        ["signal", "bytes/token", "total", "hours", "kept mass", "error", "bias"],
        [
            [
                o.signal + (" *" if o.signal == advice.recommended else ""),
                f"{o.bytes_per_token:.1f}",
                readable_bytes(o.total_bytes),
                f"{o.hours:.2f}",
                "-" if o.kept_mass is None else f"{o.kept_mass:.3f}",
                f"{o.squared_error:.5f}",
                f"{o.bias:.4f}",
            ]
            for o in advice.options
        ],
    )
    out.data(f"* recommended: {advice.recommended}: {advice.reason}")
