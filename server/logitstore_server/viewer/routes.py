"""The viewer's routes: each page, and its data as JSON at the same address with `.json` added.

Every route answers GET and HEAD alone, and none writes. What pages contain goes through Jinja2's
autoescape; what scripts add goes in as text. The content security policy allows no inline script or
style, no other host and no frame.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from logitstore.spec.errors import (
    AlignmentError,
    FormatError,
    IntegrityError,
    LogitstoreError,
    NotFoundError,
    StorageError,
    UsageError,
)
from logitstore.store import Store
from logitstore.store.lru import ProcessLRU
from logitstore_server.metrics import count_damage
from logitstore_server.viewer import formats
from logitstore_server.viewer.answers import JsonData, Page
from logitstore_server.viewer.compare import ComparedSample, compare_stores
from logitstore_server.viewer.find import find
from logitstore_server.viewer.image_panel import png
from logitstore_server.viewer.links import Links
from logitstore_server.viewer.sample_page import MAX_TOKENS, TOP_SHOWN, ViewedSample
from logitstore_server.viewer.snippets import again, snippets
from logitstore_server.viewer.store_page import overview, shard_page
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["SECURITY_HEADERS", "static_files", "viewer_app", "viewer_routes"]

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

STATIC = Path(__file__).parent / "static"
THEMES = ("light", "dark")
THEME_COOKIE = "logitstore-theme"
# What one reader may see, another may not.
_PRIVATE = {"Cache-Control": "private, no-cache"}
# Positions of samples whose measures are held.
_HELD_POSITIONS = 1 << 17

_STATUS: tuple[tuple[type[LogitstoreError], int], ...] = (
    (NotFoundError, 404),
    (UsageError, 422),
    (AlignmentError, 422),
    (StorageError, 503),
    (IntegrityError, 500),
)

Data = dict[str, Any]
LinksFor = Callable[[Request], Links]


def _links(request: Request) -> Links:
    return Links(request.scope.get("root_path", ""))


class _NumberConvertor(IntegerConvertor):
    """Of a sample. Nothing longer is one, and int() fails at thousands of digits."""

    regex = "[0-9]{1,12}"


register_url_convertor("number", _NumberConvertor())


class _Viewer:
    """Stores by name, and what is held about each."""

    def __init__(
        self,
        stores: Mapping[str, Store],
        *,
        show_locations: bool,
        locations: Mapping[str, str] | None = None,
        links_for: LinksFor | None = None,
    ) -> None:
        self.stores = stores
        self.links_for = links_for or _links
        self.show_locations = show_locations
        self._locations = locations
        self._viewed: dict[str, ViewedStore] = {}
        self._samples: ProcessLRU[tuple[str, int], ViewedSample] = ProcessLRU(
            _HELD_POSITIONS, _positions_held
        )
        self._pairs: ProcessLRU[tuple[str, str, int], ComparedSample] = ProcessLRU(
            _HELD_POSITIONS, lambda pair: len(pair.rows) + 1
        )
        self._pages = Environment(
            loader=PackageLoader("logitstore_server.viewer"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._pages.filters.update(formats.FILTERS)

    def viewed(self, name: str) -> ViewedStore:
        """The store of that name.

        Raises: NotFoundError store-not-found.
        """
        store = self.stores.get(name)
        if store is None:
            raise NotFoundError("store-not-found", "there is no store of that name")
        held = self._viewed.get(name)
        if held is None or held.store is not store:
            held = self._viewed[name] = ViewedStore(name, store)
        return held

    def sample(self, name: str, number: int) -> ViewedSample:
        """A sample; held for a while, since a page asks for it piece by piece."""
        viewed = self.viewed(name)
        held = self._samples.get((name, number))
        if held is not None and held.viewed is viewed:
            return held
        sample = ViewedSample(viewed, number)
        if held is not None:
            # Of a store that was read again since; the number may mean another sample now.
            self._samples.clear()
        return self._samples.put((name, number), sample)

    def compared(self, a: str, b: str, number: int) -> ComparedSample:
        """A sample of two stores; held for a while."""
        stores = self.viewed(a), self.viewed(b)
        held = self._pairs.get((a, b, number))
        if held is not None and (held.one.viewed, held.other.viewed) == stores:
            return held
        if held is not None:
            self._pairs.clear()
        return self._pairs.put((a, b, number), ComparedSample(*stores, number))

    def render(self, request: Request, template: str, status: int = 200, **data: Any) -> Response:
        """A page."""
        theme = request.cookies.get(THEME_COOKIE)
        links = self.links_for(request)
        # A page that says no does not repeat what it was asked for.
        beside = self._beside(links, request) if status < 400 else None
        page = self._pages.get_template(template).render(
            **data,
            links=links,
            theme=theme if theme in THEMES else None,
            json_address=beside,
            show_locations=self.show_locations,
            num_stores=len(self.stores),
            # Put there by the check of keys, for whoever has logged in.
            has_session=request.scope.get("state", {}).get("has_session", False),
        )
        return Page(page, status_code=status, headers=_PRIVATE)

    @staticmethod
    def _beside(links: Links, request: Request) -> str:
        """Where a page's data is."""
        # Quoted again: a name may hold anything.
        path, query = quote(request.url.path), request.url.query
        if path == f"{links.root}/":
            path = f"{links.root}/stores"
        return links.json(path + (f"?{query}" if query else ""))

    def page(self, template: str, build: Callable[[Request], Data]) -> tuple[Any, Any]:
        """Endpoints for a page and for its data."""

        def show(request: Request) -> Response:
            try:
                return self.render(request, template, **build(request))
            except LogitstoreError as error:
                return self.failed(request, error)

        def tell(request: Request) -> Response:
            return self.json(request, build)

        return show, tell

    def json(self, request: Request, build: Callable[[Request], Data]) -> Response:
        """An answer for programs; failures are problem documents."""
        try:
            return JsonData(self.public(build(request)), headers=_PRIVATE)
        except LogitstoreError as error:
            problem = self.told(error)
            status = _status(error)
            hidden = problem["where"] is None and not self.show_locations
            body = {
                "type": f"/errors/{error.kind}",
                "title": problem["what"],
                "status": status,
                "detail": problem["what"] if hidden else self.public(error.message),
                "kind": error.kind,
            }
            return JsonData(
                body, status_code=status, headers={"Content-Type": "application/problem+json"}
            )

    def failed(self, request: Request, error: LogitstoreError) -> Response:
        """The page of a failure, with its status."""
        damaged = isinstance(error, IntegrityError | FormatError)
        name = request.path_params.get("store", "")
        place = str(self.stores[name].location) if self.show_locations and damaged and name else ""
        return self.render(
            request,
            "error.html",
            _status(error),
            problem=self.told(error),
            damaged=damaged,
            place=place or "STORE",
            # Of a store that is here; what else was asked for is not repeated.
            store=name if name in self.stores else None,
        )

    def public(self, value: Any) -> Any:
        """Data for readers who may not know where stores are: names instead of locations."""
        if self.show_locations:
            return value
        if isinstance(value, dict):
            return {k: self.public(v) for k, v in value.items() if k != "location"}
        if isinstance(value, list):
            return [self.public(v) for v in value]
        if isinstance(value, str):
            locations = self._locations
            if locations is None:
                locations = {name: str(self.stores[name].location) for name in self.stores}
            for name, location in locations.items():
                value = value.replace(location, name)
        return value

    def told(self, error: LogitstoreError) -> Data:
        """An error's parts; of storage that fails, readers learn no address and no host."""
        count_damage(error)
        told: Data = self.public(error.as_dict())
        if isinstance(error, StorageError) and not self.show_locations:
            told |= _NOTHING
        return told


def viewer_routes(
    stores: Mapping[str, Store],
    *,
    show_locations: bool = False,
    locations: Mapping[str, str] | None = None,
    links_for: LinksFor | None = None,
) -> list[BaseRoute]:
    """Routes of the viewer, for an application that mounts them at its root.

    Args:
        stores: looked at with every request, so that a mapping may open, refresh or forget stores.
            Names may hold anything but a slash.
        show_locations: tell readers the folders and URLs of stores; for a viewer on one's own
            machine.
        locations: folder or URL by name of store, to be kept from readers; default: those of
            `stores`, which are opened for it.
        links_for: other addresses than these routes, for pages that are kept as files.
    """
    viewer = _Viewer(
        stores, show_locations=show_locations, locations=locations, links_for=links_for
    )
    routes: list[BaseRoute] = []

    def page(path: str, template: str, build: Callable[[Request], Data]) -> None:
        show, tell = viewer.page(template, lambda request: viewer.public(build(request)))
        # First, since a number or a name would take the suffix.
        routes.append(Route(f"{path}.json", _guarded(tell)))
        routes.append(Route(path, _guarded(show)))

    def data(path: str, build: Callable[[Request], Data]) -> None:
        routes.append(Route(path, _guarded(lambda request: viewer.json(request, build))))

    def of(request: Request) -> ViewedStore:
        return viewer.viewed(request.path_params["store"])

    def home(request: Request) -> Data:
        return {"stores": [card(name) for name in sorted(viewer.stores)]}

    def card(name: str) -> Data:
        try:
            return _card(viewer.viewed(name))
        except LogitstoreError as error:
            return {"name": name, "problem": viewer.told(error)}

    def show_store(request: Request) -> Data:
        return overview(of(request), _integer(request, "first_shard", 0))

    def show_shard(request: Request) -> Data:
        check = request.query_params.get("check") == "1"
        return shard_page(of(request), request.path_params["shard"], check=check)

    def sample_of(request: Request) -> ViewedSample:
        return viewer.sample(request.path_params["store"], request.path_params["sample"])

    def show_sample(request: Request) -> Data:
        sample = sample_of(request)
        body = sample.page(request.query_params.get("measure"), _integer(request, "position", 0))
        base = str(request.base_url).rstrip("/")
        where = str(sample.viewed.store.location) if viewer.show_locations else None
        address = viewer.links_for(request).sample(sample.viewed.name, sample.number)
        body["copy"] = None
        if viewer.links_for(request).live:
            body["copy"] = snippets(
                where,
                base,
                sample.viewed.name,
                sample.number,
                address,
                again=again(sample.viewed),
            )
        return body

    def picture(request: Request) -> Response:
        try:
            content = png(sample_of(request), plain=request.query_params.get("plain") == "1")
        except LogitstoreError as error:
            return viewer.failed(request, error)
        return Response(content, media_type="image/png", headers=_PRIVATE)

    def tokens(request: Request) -> Data:
        return sample_of(request).tokens(
            _integer(request, "from", 0), _integer(request, "count", MAX_TOKENS)
        )

    def kept(request: Request) -> Data:
        return sample_of(request).kept(
            _integer(request, "from", 0),
            _integer(request, "count", 64),
            _integer(request, "top", TOP_SHOWN),
        )

    def search(request: Request) -> Data:
        return find(of(request), request.query_params)

    def pair(request: Request) -> tuple[ViewedStore, ViewedStore]:
        names = request.query_params.get("a", ""), request.query_params.get("b", "")
        return viewer.viewed(names[0]), viewer.viewed(names[1])

    def compare(request: Request) -> Data:
        names = sorted(viewer.stores)
        if not request.query_params.get("a") or not request.query_params.get("b"):
            return {"names": names, "result": None, "a": None, "b": None}
        a, b = pair(request)
        first = _integer(request, "from", 0)
        return {"names": names, "result": compare_stores(a, b, first), "a": a.name, "b": b.name}

    def compared(request: Request) -> ComparedSample:
        query = request.query_params
        return viewer.compared(
            query.get("a", ""), query.get("b", ""), request.path_params["sample"]
        )

    def compare_one(request: Request) -> Data:
        query = request.query_params
        position = _integer(request, "position", 0)
        return compared(request).page(query.get("order", ""), query.get("measure", ""), position)

    def compare_tokens(request: Request) -> Data:
        return compared(request).tokens(
            _integer(request, "from", 0), _integer(request, "count", MAX_TOKENS)
        )

    routes.append(Route("/stores.json", _guarded(lambda request: viewer.json(request, home))))
    routes.append(Route("/", _guarded(viewer.page("stores.html", home)[0])))
    sample_path = "/stores/{store}/samples/{sample:number}"
    data(f"{sample_path}/tokens.json", tokens)
    data(f"{sample_path}/kept.json", kept)
    routes.append(Route(f"{sample_path}/image.png", _guarded(picture)))
    page(sample_path, "sample.html", show_sample)
    page("/stores/{store}/overview", "store.html", show_store)
    page("/stores/{store}/shards/{shard}", "shard.html", show_shard)
    page("/stores/{store}/find", "find.html", search)
    data("/compare/samples/{sample:number}/tokens.json", compare_tokens)
    page("/compare/samples/{sample:number}", "compare_sample.html", compare_one)
    page("/compare", "compare.html", compare)
    routes.append(Route("/static/{file:path}", _guarded(_static)))
    return routes


def viewer_app(
    stores: Mapping[str, Store], *, links_for: LinksFor | None = None, show_locations: bool = True
) -> Starlette:
    """The viewer alone, for the machine it runs on: pages tell where stores are."""
    viewer = _Viewer(stores, show_locations=show_locations, links_for=links_for)

    def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not viewer.links_for(request).live:
            return viewer.render(request, "not_included.html", 404)
        kind = "method-not-allowed" if error.status_code == 405 else "path-not-found"
        problem = {**_NOTHING, "kind": kind, "what": _UNKNOWN[kind]}
        return _secured(viewer.render(request, "error.html", error.status_code, problem=problem))

    routes = viewer_routes(stores, show_locations=show_locations, links_for=links_for)
    return Starlette(routes=routes, exception_handlers={HTTPException: unknown})


_NOTHING: Data = {"where": None, "got": None, "expected": None, "hint": None, "data": {}}
_UNKNOWN = {
    "path-not-found": "there is no such page",
    "method-not-allowed": "pages can only be read",
}


def _guarded(endpoint: Callable[[Request], Response]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        return _secured(endpoint(request))

    return answer


def _secured(response: Response) -> Response:
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _static(request: Request) -> Response:
    """A file of the viewer's own; nothing outside its folder."""
    name = request.path_params["file"]
    if name not in static_files():
        raise HTTPException(404)
    kind = mimetypes.types_map.get(Path(name).suffix, "text/plain")
    if kind == "application/javascript":
        kind = "text/javascript"
    return Response(
        (STATIC / name).read_bytes(),
        media_type=kind,
        headers={"Cache-Control": "no-cache" if "vendor" not in name else "max-age=86400"},
    )


def static_files() -> set[str]:
    """The viewer's own files, by their path below `/static/`."""
    return {str(f.relative_to(STATIC)) for f in STATIC.rglob("*") if f.is_file()}


def _card(viewed: ViewedStore) -> Data:
    store = viewed.store
    return {
        "name": viewed.name,
        "location": str(store.location),
        "signal": str(viewed.header.signal),
        "teacher": viewed.header.teacher.name,
        "samples": store.num_samples,
        "positions": store.num_positions,
        "bytes": sum(view.object_bytes for view in store.shards),
        "sealed": store.sealed,
        "problem": None,
    }


def _status(error: LogitstoreError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def _positions_held(sample: ViewedSample) -> int:
    return sample.positions


def _integer(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise UsageError("bad-argument", "not a whole number", where=name, expected="0, 1, 2, ...")
    return int(text)
