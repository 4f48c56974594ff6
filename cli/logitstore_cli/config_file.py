"""`--config FILE`: a command's options from a TOML or YAML file.

Keys are the long names of the options, with `-` or `_`. What is typed wins, then the environment
(`LOGITSTORE_<COMMAND>_<OPTION>`), then the file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from logitstore.spec.errors import UsageError

__all__ = ["config_option"]


def config_option(function: Any) -> Any:
    """Decorator: add `--config FILE` to a command."""
    return click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_load,
        help="Read options from a TOML or YAML file; what is typed here wins.",
    )(function)


def _load(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    known = {p.name for p in ctx.command.params if isinstance(p, click.Option)} - {"config"}
    given = {key.replace("-", "_"): item for key, item in _read(Path(value)).items()}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, [n for n in known if n], 1)
            raise UsageError(
                "bad-argument",
                "no such option",
                where=value,
                got=key.replace("_", "-"),
                expected=f"options of `logitstore {ctx.info_name}`",
                hint=f"did you mean {near[0].replace('_', '-')}?" if near else None,
            )
    ctx.default_map = {**(ctx.default_map or {}), **given}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError("bad-argument", f"cannot be read: {error.strerror}", where=path) from None
    try:
        if path.suffix == ".toml":
            import tomllib

            content: Any = tomllib.loads(data.decode())
        else:
            import yaml

            content = yaml.safe_load(data)
    except Exception as error:
        raise UsageError(
            "bad-argument", f"cannot be parsed: {error}", where=path, expected="TOML or YAML"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(
            "bad-argument", "holds no options", where=path, expected="lines such as `seq-len: 512`"
        )
    return content
