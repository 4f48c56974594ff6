"""`logitstore serve`: stores over HTTP."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output

_LOOK_PATIENCE_S = 5.0


@form.command(
    "serve",
    example="logitstore serve STORE\n"
    "logitstore serve /data/a s3://bucket/b --name one --name two --workers 4\n"
    "logitstore serve --config server.toml",
)
@click.argument("stores", nargs=-1, metavar="STORE...")
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Of each STORE in turn, for its URL; default: its last part.",
)
@click.option("--config", type=click.Path(path_type=Path), help="TOML or YAML file of settings.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Default 8640; 0: any that is free.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes; default 1.")
@click.option("--public", is_flag=True, help="Let anybody who can connect read the STOREs.")
@click.option("--keys-file", type=click.Path(path_type=Path), help="File of keys that may read.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, help="A name the service is reached by."
)
@click.option(
    "--allow-public-without-keys", is_flag=True, help="Listen on a network without a file of keys."
)
@pass_output
def command(
    out: Output,
    stores: tuple[str, ...],
    names: tuple[str, ...],
    config: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    public: bool,
    keys_file: Path | None,
    allow_hosts: tuple[str, ...],
    allow_public_without_keys: bool,
) -> None:
    """Serve stores read-only over HTTP: ls.open("http://HOST:PORT/v1/stores/NAME").

    The pages of `logitstore view` are at http://HOST:PORT/, behind the same keys. Flags win over
    LOGITSTORE_SERVER_* in the environment, these over --config. Stores that are still being
    captured are served as they grow. SIGTERM lets requests in flight finish.
    """
    from logitstore.spec.errors import UsageError

    try:
        from logitstore_server.serving import serve
        from logitstore_server.settings import load_settings
    except ImportError as error:
        raise UsageError(
            "missing-dependency",
            "the service needs a package that is not installed",
            got=str(error.name),
            hint='pip install "logitstore[serve]"',
        ) from None
    if names and len(names) != len(stores):
        raise UsageError(
            "bad-argument",
            "every STORE needs a --name if one has it",
            got=f"{len(names)} names for {len(stores)} stores",
        )
    entries = [
        {"name": name, "location": location, "public": public}
        for name, location in zip(names or map(_last_part, stores), stores, strict=True)
    ]
    settings = load_settings(
        {
            "stores": entries or None,
            "host": host,
            "port": port,
            "workers": workers,
            "keys_file": keys_file,
            "allow_hosts": allow_hosts or None,
            "allow_public_without_keys": allow_public_without_keys or None,
        },
        file=config,
    ).settings
    if not settings.stores:
        raise UsageError(
            "bad-argument", "no store to serve", expected="STORE, or `stores` in the settings"
        )
    _check_stores(out, [(entry.name, entry.location) for entry in settings.stores])

    def say(url: str) -> None:
        for entry in settings.stores:
            out.data(f"{url}/v1/stores/{entry.name}")
        out.note(f"pages for people at {url}/; Ctrl-C ends it")

    serve(settings, on_bound=say)


def _last_part(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _check_stores(out: Output, stores: list[tuple[str, str]]) -> None:
    """Refuse to start where no location has a store; say which has none where others may have."""
    from logitstore.spec.errors import LogitstoreError
    from logitstore.store.connect import connect
    from logitstore.store.documents import load_header

    found: dict[str, LogitstoreError | None] = {}

    def look(name: str, location: str) -> None:
        backend = connect(location)
        try:
            load_header(backend)
            found[name] = None
        except LogitstoreError as error:
            found[name] = error
        finally:
            backend.close()

    # Not awaited by anything: storage without an answer must not keep the others waiting.
    looks = [threading.Thread(target=look, args=store, daemon=True) for store in stores]
    until_s = time.monotonic() + _LOOK_PATIENCE_S
    for each in looks:
        each.start()
    for each in looks:
        each.join(max(0.0, until_s - time.monotonic()))
    known = dict(found)
    problems = {name: error for name, error in known.items() if error is not None}
    if len(problems) == len(stores):
        raise next(problems[name] for name, _ in stores)
    for name, _ in stores:
        if name not in known:
            out.warn(f"{name} has not answered within {_LOOK_PATIENCE_S:g} s")
        elif name in problems:
            message = problems[name].message
            out.warn(f"{name} cannot be served until this is mended: {message}")
