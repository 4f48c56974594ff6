"""A static sample of the viewer: pages, their data, scripts and styles, for any file server, or to
open from its folder.

Pages are those of the viewer, with addresses of files beside each other in place of its own. What a
sample of a store cannot show, a page says that every other address leads to.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

from starlette.requests import Request

from logitstore.spec.errors import StorageError, UsageError
from logitstore.store import Store
from logitstore_server.viewer.ask import ask
from logitstore_server.viewer.links import Links
from logitstore_server.viewer.routes import static_files, viewer_app

__all__ = ["write_bundle"]

# Positions of a sample that are written; of one file of text, of one of entries; ids of a position.
MAX_POSITIONS = 4096
PIECE, KEPT, TOP = 1024, 64, 64
_ELSEWHERE = "not-included.html"
# What a reader may still choose on a page that no server answers for.
_OWN = ("measure", "position")


class _Plan:
    """Which addresses become which files."""

    def __init__(self, stores: Mapping[str, Store], samples: int) -> None:
        live = Links()
        self.stores = stores
        self.samples = samples
        self.files: dict[str, str] = {live.home(): "index.html"}
        folders: set[str] = set()
        for name, store in stores.items():
            folder = _folder(name, folders) + "/"
            if len(stores) == 1:
                folder = ""
            self.files[live.store(name)] = f"{folder}index.html"
            for sample in range(min(samples, len(store))):
                self.files[live.sample(name, sample)] = f"{folder}samples/{sample}.html"
        if len(stores) == 2:
            a, b = sorted(stores)
            self.files[live.compare()] = "compare.html"
            for sample in range(min(samples, *map(len, stores.values()))):
                self.files[live.compare_sample(sample)] = f"compare/{sample}.html"
            self.pair = {"a": a, "b": b}

    def address(self, path: str) -> str:
        """Where the viewer answers for a file's path."""
        return f"{path}?{urlencode(self.pair)}" if path.startswith("/compare") else path


class _BundleLinks(Links):
    """Relative addresses of files, as seen from one of them."""

    live = False
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    max_positions = MAX_POSITIONS

    def __init__(self, plan: _Plan, here: str, pictures: dict[str, str]) -> None:
        super().__init__()
        self._plan = plan
        self._here = plan.files.get(here, _ELSEWHERE)
        self._pictures = pictures
        self.samples = plan.samples

    def home(self) -> str:
        return self._to("index.html")

    def static(self, name: str) -> str:
        return self._to(f"static/{name}")

    def json(self, address: str) -> str:
        return self._to(re.sub(r"html$", "json", self._here))

    def tokens(self, name: str, sample: int) -> str:
        return self._piece(Links().sample(name, sample), "tokens")

    def kept(self, name: str, sample: int) -> str:
        return self._piece(Links().sample(name, sample), "kept")

    def compared_tokens(self, sample: int, **query: object) -> str:
        return self._piece(Links().compare_sample(sample), "tokens")

    def _piece(self, page: str, kind: str) -> str:
        folder = self._plan.files[page].removesuffix(".html")
        # The script fills in {from}, which must not be quoted.
        return self._to(folder) + f"/{kind}-{{from}}.js"

    def _at(self, *parts: object, **query: object) -> str:
        path, _, _ = super()._at(*parts).partition("?")
        if path.endswith("/image.png"):
            page = self._plan.files.get(path.removesuffix("/image.png"))
            if page is None:
                return self._to(_ELSEWHERE)
            plain = "-plain" if query.get("plain") else ""
            file = f"{page.removesuffix('.html')}/image{plain}.png"
            self._pictures[super()._at(*parts, **query)] = file
            return self._to(file)
        file = self._plan.files.get(path, _ELSEWHERE)
        own = {k: v for k, v in query.items() if k in _OWN and v not in (None, "")}
        return self._to(file) + (f"?{urlencode(own)}" if own and file != _ELSEWHERE else "")

    def _to(self, file: str) -> str:
        return quote(posixpath.relpath(file, posixpath.dirname(self._here) or "."))


def write_bundle(folder: Path, stores: Mapping[str, Store], samples: int) -> dict[str, int]:
    """Write a static sample of stores: each one's page and its first samples; a comparison of two.

    Args:
        folder: new or empty.
        stores: by name.
        samples: of each store, at most.

    Returns: `files`, `bytes`, and `samples` written.

    Raises: UsageError bad-argument for a folder that holds something; StorageError; what reading
    raises.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            "bad-argument", "the folder is not empty", where=folder, expected="a new one"
        )
    plan = _Plan(stores, samples)
    pictures: dict[str, str] = {}

    def links_for(request: Request) -> Links:
        return _BundleLinks(plan, request.scope["raw_path"].decode(), pictures)

    app = viewer_app(stores, links_for=links_for, show_locations=False)
    written = {"files": 0, "bytes": 0, "samples": 0}

    def put(file: str, data: bytes) -> None:
        path = folder / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise StorageError(
                "storage-failed", "a file cannot be written", where=path, got=error.strerror
            ) from None
        written["files"] += 1
        written["bytes"] += len(data)

    def save(address: str, file: str) -> bytes:
        body = ask(app, address).body
        put(file, body)
        return body

    def save_piece(address: str, file: str) -> None:
        # Where pages are opened from a folder, they may load scripts and fetch nothing.
        put(file, b"logitstorePiece(" + ask(app, address).body + b");\n")

    for path, file in plan.files.items():
        if path == Links().home() and len(stores) == 1:
            continue
        address = plan.address(path)
        save(address, file)
        beside = "/stores" if path == Links().home() else path
        told = json.loads(save(plan.address(f"{beside}.json"), re.sub(r"html$", "json", file)))
        if "positions" not in told or "/samples/" not in path:
            continue
        base = file.removesuffix(".html")
        positions = min(told.get("mapped", told["positions"]), MAX_POSITIONS)
        for start in range(0, positions, PIECE):
            query = f"from={start}&count={min(PIECE, positions - start)}"
            save_piece(
                _with(plan.address(f"{path}/tokens.json"), query), f"{base}/tokens-{start}.js"
            )
        if path.startswith("/compare"):
            continue  # its entries are those of the two samples
        written["samples"] += 1
        for start in range(0, positions, KEPT):
            query = f"from={start}&count={min(KEPT, positions - start)}&top={TOP}"
            save_piece(f"{path}/kept.json?{query}", f"{base}/kept-{start}.js")
    for address, file in pictures.items():
        save(address, file)
    for file in static_files():
        save(f"/static/{file}", f"static/{file}")
    save("/not-included", _ELSEWHERE)
    return written


def _with(address: str, query: str) -> str:
    return address + ("&" if "?" in address else "?") + query


def _folder(name: str, taken: set[str]) -> str:
    """A folder for a store: letters, digits, points, lines; none twice on any file system."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "store"
    found, number = base, 2
    while found.lower() in taken or found in ("static", "compare"):
        found, number = f"{base}-{number}", number + 1
    taken.add(found.lower())
    return found
