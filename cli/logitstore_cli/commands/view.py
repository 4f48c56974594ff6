"""`logitstore view`: stores as pages in a browser, on this machine alone."""

from __future__ import annotations

import shlex
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from logitstore_cli import command as form
from logitstore_cli.output import Output, pass_output

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from logitstore.store import Store

# How old the list of shards of an unsealed store may be.
MAX_AGE_S = 5.0


@form.command(
    "view",
    example="logitstore view STORE\n"
    "logitstore view STORE-A STORE-B --port 8641\n"
    "logitstore view STORE --get /stores/STORE/samples/0.json\n"
    "logitstore view STORE --bundle DIR --samples 8",
)
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8641, show_default=True, help="0: any."
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--get",
    metavar="PATH",
    help="Print one answer, such as /stores/NAME/samples/0.json, and end; exit code 1 if it fails.",
)
@click.option(
    "--bundle",
    metavar="DIR",
    help="Write a static sample into a new folder, to open or to serve, and end.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 10_000),
    default=8,
    show_default=True,
    help="Of --bundle: the first so many of each store.",
)
@pass_output
def command(
    out: Output,
    stores: tuple[str, ...],
    port: int,
    no_browser: bool,
    get: str | None,
    bundle: str | None,
    samples: int,
) -> int:
    """Show stores in the browser: text as a heat map, what the teacher expected, statistics.

    Listens on 127.0.0.1 alone and writes nothing. A store that a capture still fills is read again
    while one looks.
    """
    from logitstore.spec.errors import UsageError

    try:
        import uvicorn

        from logitstore_server.viewer import viewer_app
    except ImportError as error:
        raise UsageError(
            "missing-dependency",
            "the viewer needs a package that is not installed",
            got=str(error.name),
            hint='pip install "logitstore[serve]"',
        ) from None
    opened = OpenedStores(stores)
    if get is not None:
        return _print_answer(out, viewer_app(opened), get)
    if bundle is not None:
        return _write_bundle(out, opened, bundle, samples)
    with _listen(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        if len(opened) == 1:
            address += f"stores/{quote(next(iter(opened)), safe='')}/overview"
        # The one line of data, so that scripts find the port.
        out.data(address)
        out.note("Ctrl-C ends it")
        if not no_browser:
            threading.Timer(0.3, webbrowser.open, [address]).start()
        config = uvicorn.Config(viewer_app(opened), log_level="warning", server_header=False)
        uvicorn.Server(config).run([listener])
    opened.close()
    return 0


def _print_answer(out: Output, app: ASGIApp, address: str) -> int:
    from logitstore.spec.errors import UsageError
    from logitstore_server.viewer.ask import ask

    if not address.startswith("/"):
        raise UsageError(
            "bad-argument", "not a path of the viewer", where="--get", got=address, expected="/..."
        )
    answer = ask(app, address)
    click.echo(answer.body, nl=False)
    if answer.status != 200:
        out.warn(f"{address}: status {answer.status}")
    return 0 if answer.status == 200 else 1


def _write_bundle(out: Output, stores: OpenedStores, folder: str, samples: int) -> int:
    from logitstore_server.viewer.bundle import write_bundle

    told = write_bundle(Path(folder), stores, samples)
    every = sum(len(stores[name]) for name in stores)
    out.data(str(Path(folder, "index.html")))
    size = f"{told['files']:,} files, {told['bytes'] / 1e6:.1f} MB"
    out.note(f"{told['samples']:,} of {every:,} samples in {size}. Open it, or serve the folder:")
    out.note(f"python -m http.server -d {shlex.quote(folder)}")
    stores.close()
    return 0


class OpenedStores(Mapping[str, "Store"]):
    """Stores by a name for their address; unsealed ones are read again now and then.

    Raises: what `store.open` raises, at once for every location.
    """

    def __init__(self, locations: tuple[str, ...]) -> None:
        from logitstore import store

        self._stores: dict[str, Store] = {}
        self._read_s: dict[str, float] = {}
        self._lock = threading.Lock()
        for location in locations:
            opened = store.open(location, tolerant=True)
            name = _name(location, self._stores)
            self._stores[name] = opened
            self._read_s[name] = time.monotonic()

    def __getitem__(self, name: str) -> Store:
        with self._lock:
            held = self._stores[name]
            if not held.sealed and time.monotonic() - self._read_s[name] > MAX_AGE_S:
                self._read_s[name] = time.monotonic()
                fresh = held.refresh()
                if fresh.sealed or fresh.snapshot != held.snapshot:
                    # The old one stays open: a page may still be reading from it.
                    self._stores[name] = held = fresh
                else:
                    fresh.close()
            return held

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._stores))

    def __len__(self) -> int:
        return len(self._stores)

    def close(self) -> None:
        """Release files and connections."""
        for held in self._stores.values():
            held.close()


def _name(location: str, taken: Mapping[str, object]) -> str:
    """The last part of a location, with a number when it is taken."""
    base = location.rstrip("/").rpartition("/")[2]
    if base in ("", ".", ".."):
        # Browsers take these out of addresses.
        base = Path(location).resolve().name or "store"
    # Nor can an address hold bytes of a folder's name that are no UTF-8.
    base = base.encode("utf-8", "replace").decode()
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def _listen(port: int) -> socket.socket:
    """A listening socket on the loopback address.

    Raises: StorageError storage-failed when the port is taken.
    """
    from logitstore.spec.errors import StorageError

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        # Now, so that a browser that comes before the server has started waits.
        listener.listen()
    except OSError as error:
        listener.close()
        raise StorageError(
            "storage-failed",
            "the port cannot be listened on",
            where=f"127.0.0.1:{port}",
            got=error.strerror,
            hint="choose another with --port, or --port 0 for any",
        ) from None
    return listener
