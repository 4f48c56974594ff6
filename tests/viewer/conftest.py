"""A Chromium that reaches loopback alone, and a viewer of stores from a real capture and a hostile
push."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from logitstore import store
from logitstore_cli.main import run
from logitstore_server.viewer import viewer_app
from tests.viewer.viewed import HOSTILE_STORE, HOSTILE_TABLE, SIGNALS, VOCAB, push, serving

# Besides what a sandbox needs: nothing that would look for the network by itself.
ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE_NAME = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, or the one that LOGITSTORE_CHROMIUM names."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("LOGITSTORE_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: install it, or name one in LOGITSTORE_CHROMIUM")
    # The sandbox needs privileges that root in a container does not have.
    arguments = [*ARGUMENTS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> Path:
    """A folder of six stores."""
    from tests.conftest import TRAINING_TEXT

    folder = tmp_path_factory.mktemp("viewed")
    corpus = folder / "corpus.txt"
    corpus.write_text(TRAINING_TEXT * 3, encoding="utf-8")
    for name, signal in (("captured", "topk:16"), ("narrow", "topk:4")):
        arguments = ["precompute", "--teacher", f"hf:{tiny_lm_dir}", "--corpus", str(corpus)]
        arguments += ["--signal", signal, "--out", str(folder / name), "--seq-len", "128"]
        assert run([*arguments, "--progress", "none", "--no-bos-check", "--quiet"]) == 0
    push(folder / HOSTILE_NAME, "topk:8", table=HOSTILE_TABLE, lengths=(60, 60), key="<b>{}</b>")
    push(folder / "graph", "graph:k=3,form=vocab")
    push(folder / "threshold", "threshold:tau=1/10")
    push(
        folder / "long", "topk:2", lengths=(32_768,), chunk_positions=2048, shard_positions=1 << 16
    )
    return folder


@pytest.fixture(scope="session")
def site(site_folder: Path) -> Iterator[str]:
    """The address of a viewer of six stores."""
    folder = site_folder
    stores = {place.name: store.open(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    assert stores["long"].header.vocab_size == VOCAB
    with serving(stores) as address:
        yield address
    for each in stores.values():
        each.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stores")
    for name, signal in SIGNALS.items():
        push(place / name, signal)
    push(place / "other", "dense:dtype=float32", noise=0.7)
    push(place / "other-topk", "topk:8", noise=0.7)
    push(place / HOSTILE_STORE, "topk:8", table=HOSTILE_TABLE)
    push(place / "no-table", "topk:8", table=None)
    return place


@pytest.fixture(scope="session")
def stores(folder: Path) -> Iterator[dict[str, store.Store]]:
    opened = {place.name: store.open(place) for place in sorted(folder.iterdir())}
    yield opened
    for each in opened.values():
        each.close()


@pytest.fixture(scope="session")
def client(stores: dict[str, store.Store]) -> TestClient:
    return TestClient(viewer_app(stores))


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds. The driver's own wait would need unsafe-eval in the page."""
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never true: {expression}")


# Charts are drawn before a page has loaded; what a position keeps comes a moment later.
SETTLED = (
    "(p => !p || p.dataset.position !== undefined || p.querySelector('.problem') !== null)"
    "(document.querySelector('#panel'))"
)


class Look:
    """A page of a fresh profile. Anything that a script logs as an error, or asks of another host,
    is collected."""

    def __init__(self, browser: Any, site: str, **options: Any) -> None:
        self.failed: list[str] = []
        self.scripts = options.get("java_script_enabled", True)
        self.context = browser.new_context(**options)
        self.site = site
        self.complaints: list[str] = []
        self.context.route("**/*", self._only_loopback)
        self.page = self.context.new_page()
        self.page.on("console", self._console)
        self.page.on("requestfailed", self._request_failed)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))

    def open(self, path: str) -> Any:
        """The page at the path, once everything it shows at first is there."""
        answer = self.page.goto(self.site + path)
        assert answer is not None
        if self.scripts:
            until(self.page, SETTLED)
        return self.page

    def _request_failed(self, request: Any) -> None:
        # A page that is left gives up what it was still asking for, such as its icon.
        if request.failure != "net::ERR_ABORTED":
            self.failed.append(f"{request.url}: {request.failure}")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _only_loopback(self, route: Any) -> None:
        if route.request.url.startswith(self.site):
            route.continue_()
        else:
            self.complaints.append(f"asked for {route.request.url}")
            route.abort()


@pytest.fixture
def look(browser: Any, site: str) -> Iterator[Any]:
    """Opens profiles; at the end none may have complained."""
    opened: list[Look] = []

    def start(**options: Any) -> Look:
        opened.append(Look(browser, site, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.context.close()
    assert [complaint for each in opened for complaint in each.complaints] == []
