"""`logitstore audit`: run the teacher again on a slice of a store and compare."""

from __future__ import annotations

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.command(
    "audit",
    example="logitstore audit STORE --teacher hf:FOLDER --samples 16\n"
    "logitstore audit STORE --teacher py:MODULE:FUNCTION --corpus images.npy",
)
@click.argument("store")
@click.option("--teacher", required=True, help="hf:FOLDER_OR_ID or py:module:function.")
@click.option(
    "--corpus",
    multiple=True,
    metavar="FILE",
    help="Classification: what the store was captured from; it keeps no inputs.",
)
@click.option(
    "--samples", type=click.IntRange(1), help="Default: 8 sequences, or 256 of a classifier."
)
@click.option(
    "--sample",
    "chosen",
    type=click.IntRange(0),
    multiple=True,
    metavar="NUMBER",
    help="This one, as the viewer counts, in place of random ones; can be repeated.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which samples.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    default=0.25,
    show_default=True,
    help="Mean difference that passes, nats.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="auto: as at the capture.")
@form.json_option
@pass_output
def command(
    out: Output,
    store: str,
    teacher: str,
    corpus: tuple[str, ...],
    samples: int | None,
    chosen: tuple[int, ...],
    seed: int,
    tolerance: float,
    device: str,
    dtype: str,
    as_json: bool,
) -> int:
    """Run TEACHER over random samples of STORE and report how far its record is from a fresh run.

    Exactly stored log-probs are compared one by one; sampled ids by their hit rates, whose z-score
    is standard normal for an honest store. Exit code 4 when either speaks against it.
    """
    from logitstore.analysis.audit import audit
    from logitstore.teachers import TeacherOptions

    found = audit(
        store,
        teacher,
        samples=samples,
        chosen=chosen,
        corpus=corpus,
        seed=seed,
        options=TeacherOptions(dtype=dtype, device=device),
        tolerance=tolerance,
    )
    if found.same_weights is False:
        out.warn("these are not the weights that the store recorded")
    if as_json:
        out.json("audit", found.as_dict())
        return 0 if found.ok else form.FAILED
    out.data(f"{found.samples} samples, {found.positions:,} positions run again")
    rows = []
    if found.logprobs.count:
        rows.append(("log-probs", found.logprobs))
    rows += sorted(found.aux.items())
    out.table(
        ["compared", "values", "mean |difference|", "max"],
        [[name, f"{d.count:,}", f"{d.mean:.2e}", f"{d.largest:.2e}"] for name, d in rows],
    )
    if found.hit_rates:
        out.table(
            ["drawn ids", "hits", "expected", "z"],
            [
                [name, f"{h.hits:,}", f"{h.expected:,.1f}", f"{h.z:+.2f}"]
                for name, h in found.hit_rates.items()
            ],
        )
    for doubt in found.doubts:
        out.data(out.printable(doubt))
    out.data("no doubts" if found.ok else "this teacher does not give what the store holds")
    return 0 if found.ok else form.FAILED
