"""`logitstore config`: the service's settings as they take effect."""

from __future__ import annotations

from pathlib import Path

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output


@form.group("config", example="logitstore config show --config server.toml")
def command() -> None:
    """Look at the settings of the service."""


@form.command("show", example="logitstore config show --config server.toml --json")
@click.option("--config", type=click.Path(path_type=Path), help="TOML or YAML file of settings.")
@form.json_option
@pass_output
def show(out: Output, config: Path | None, as_json: bool) -> None:
    """Print every setting of `logitstore serve`, its value and where that comes from.

    The one secret, which signs logins, is shown as asterisks. Keys stand in a file of their own,
    which is not read, and locations with a password are refused.
    """
    from logitstore_server.settings import ServerSettings, load_settings

    loaded = load_settings(file=config)
    values = loaded.settings.model_dump(mode="json")
    fields = ServerSettings.model_fields
    rows = [
        {
            "name": name,
            "value": value,
            "from": loaded.origins[name],
            "meaning": fields[name].description or "",
        }
        for name, value in values.items()
    ]
    if as_json:
        out.json("config", {"settings": rows})
        return
    out.table(
        ["setting", "value", "from"],
        [[row["name"], out.printable(str(row["value"])), row["from"]] for row in rows],
    )


command.add_command(show)
