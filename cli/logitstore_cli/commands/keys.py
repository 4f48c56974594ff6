"""`logitstore keys`: who may read from the service."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output

file_option = click.option(
    "--keys-file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    envvar="LOGITSTORE_SERVER_KEYS_FILE",
    help="File of hashed keys, the one `logitstore serve` is given.",
)


@form.group(
    "keys",
    example="logitstore keys create --keys-file KEYS --store NAME --label 'training cluster'\n"
    "logitstore keys list --keys-file KEYS\n"
    "logitstore keys revoke --keys-file KEYS ID",
)
def command() -> None:
    """Create, list and revoke the keys that may read from the service.

    The file holds digests only. Running services see a change at their next request.
    """


@form.command("create", example="logitstore keys create --keys-file KEYS --store NAME --days 90")
@file_option
@click.option("--store", "stores", multiple=True, help="Store it may read; repeat; `*` for all.")
@click.option("--metrics", is_flag=True, help="It may read /metrics.")
@click.option("--label", default="", help="Whose it is, for `keys list`.")
@click.option("--days", type=click.IntRange(1), help="Expires after so many; default: never.")
@form.json_option
@pass_output
def create(
    out: Output,
    keys_file: Path,
    stores: tuple[str, ...],
    metrics: bool,
    label: str,
    days: int | None,
    as_json: bool,
) -> None:
    """Create a key and print it, once."""
    from logitstore_server.keys import create_key

    if not stores and not metrics:
        raise click.UsageError("say what the key may read: --store NAME, --store '*' or --metrics")
    expires = None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    text, key = create_key(keys_file, label=label, stores=stores, metrics=metrics, expires=expires)
    if as_json:
        out.json("key", {"key": text, "id": key.id})
        return
    out.data(text)
    out.note(f"key {key.id}: this is the only time it is shown; {keys_file} holds its digest")


@form.command("list", example="logitstore keys list --keys-file KEYS --json")
@file_option
@form.json_option
@pass_output
def list_keys(out: Output, keys_file: Path, as_json: bool) -> None:
    """List keys by id: what they may read, and whether they are valid."""
    from logitstore_server.keys import read_keys

    now = dt.datetime.now(dt.UTC)
    rows: list[dict[str, Any]] = [
        {
            "id": key.id,
            "label": key.label,
            "stores": list(key.stores),
            "metrics": key.metrics,
            "state": key.state(now),
            "created": key.created.isoformat(timespec="seconds"),
            "expires": None if key.expires is None else key.expires.isoformat(timespec="seconds"),
        }
        for key in read_keys(keys_file)
    ]
    if as_json:
        out.json("keys", {"keys": rows})
        return
    out.table(
        ["id", "state", "stores", "metrics", "expires", "label"],
        [
            [
                row["id"],
                row["state"],
                " ".join(row["stores"]) or "-",
                "yes" if row["metrics"] else "-",
                row["expires"] or "never",
                out.printable(str(row["label"])),
            ]
            for row in rows
        ],
    )


@form.command("revoke", example="logitstore keys revoke --keys-file KEYS ID")
@file_option
@click.argument("key_id", metavar="ID")
@pass_output
def revoke(out: Output, keys_file: Path, key_id: str) -> None:
    """Revoke a key for good; running services refuse it from their next request on."""
    from logitstore_server.keys import revoke_key

    key = revoke_key(keys_file, key_id)
    out.data(f"{key.id} revoked")


command.add_command(create)
command.add_command(list_keys)
command.add_command(revoke)
