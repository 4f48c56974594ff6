"""A static sample behind a plain file server, in a real browser; and answers without a server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitstore_cli.main import run
from tests.viewer.conftest import HOSTILE_NAME, SETTLED, Look, until
from tests.viewer.viewed import push


@pytest.fixture(scope="module")
def bundle(site_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of one corpus, and the comparison of both."""
    place = tmp_path_factory.mktemp("bundle") / "deep" / "sample"
    stores = [str(site_folder / name) for name in ("captured", "narrow")]
    assert run(["view", *stores, "--bundle", str(place), "--samples", "2", "--quiet"]) == 0
    return place


@pytest.fixture
def served(bundle: Path) -> Iterator[str]:
    """The address of Python's own file server, which serves the bundle below a path."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=bundle.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        port = re.search(r"port (\d+)", server.stdout.readline())
        assert port
        yield f"http://127.0.0.1:{port[1]}"
        server.terminate()


def test_every_page_works_from_a_file_server(browser, served, bundle):
    seen = Look(browser, served)
    asked: list[tuple[int, str]] = []
    seen.page.on("response", lambda answer: asked.append((answer.status, answer.url)))
    waiting, visited = ["/sample/index.html"], set()
    while waiting:
        path = waiting.pop()
        visited.add(path)
        page = seen.open(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        hrefs = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
        for href in hrefs:
            assert href.startswith(served), href
            target = href.removeprefix(served).partition("#")[0].partition("?")[0]
            if target.endswith(".html") and target not in {*visited, *waiting}:
                waiting.append(target)
            elif target.endswith(".json"):
                assert (bundle.parent / target.lstrip("/")).is_file()
    written = {f"/sample/{f.relative_to(bundle)}" for f in bundle.rglob("*.html")}
    assert visited == written
    page = seen.open("/sample/captured/samples/0.html?measure=label_rank&position=70")
    assert page.is_checked("input[value=label_rank]")
    until(page, "document.querySelector('#panel').dataset.position === '70'")
    assert page.locator("#panel .top-k li").count() == 16
    page.keyboard.press("n")
    page.wait_for_url("**/samples/1.html*")
    until(page, SETTLED)
    page.keyboard.press("t")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page = seen.open("/sample/compare/0.html?measure=missed")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.locator("#panel .two section").count() == 2
    assert "static sample: at most 2 samples" in page.inner_text("main")
    assert [one for one in asked if one[0] >= 400] == []
    # A browser gives up loading the icon of a page that is left.
    assert [one for one in seen.failed if not one.endswith("icon.svg")] == []
    assert seen.complaints == []
    seen.context.close()


def test_nothing_in_a_bundle_names_this_machine(bundle, site_folder):
    for file in bundle.rglob("*"):
        if file.suffix in (".html", ".json", ".css") and "vendor" not in file.parts:
            text = file.read_text(encoding="utf-8")
            assert str(site_folder) not in text
            assert "http://" not in text
            assert "127.0.0.1" not in text


def test_a_bundle_of_a_hostile_store_keeps_to_its_folder(browser, site_folder, tmp_path, capsys):
    place = tmp_path / "out"
    arguments = ["view", str(site_folder / HOSTILE_NAME), "--bundle", str(place)]
    assert run(arguments) == 0
    assert "2 of 2 samples" in capsys.readouterr().err
    assert {f.name for f in place.iterdir()} == {
        *("index.html", "index.json", "not-included.html", "samples", "static")
    }
    assert "<img" not in (place / "index.html").read_text(encoding="utf-8")
    # As a double click opens it: no server, so that pages may fetch nothing.
    seen = Look(browser, place.as_uri())
    page = seen.open("/index.html")
    assert page.locator(".chart canvas").count() == page.locator(".chart").count() >= 5
    page = seen.open("/samples/0.html")
    for position in range(0, 60, 5):
        page.focus(f"[data-p='{position}']")
        until(page, f"document.querySelector('#panel').dataset.position === '{position}'")
        assert page.locator("#panel .top-k li").count() == 8
    assert "<img·src=x" in page.inner_text("#heat")
    assert page.title() != "owned"
    assert (seen.complaints, seen.failed) == ([], [])
    seen.context.close()
    assert run(arguments) == 2
    assert "not empty" in capsys.readouterr().err


def test_get_prints_an_answer_and_says_by_its_exit_code_whether_it_is_one(tmp_path, capfdbinary):
    place = str(push(tmp_path / "st", "topk:4"))
    assert run(["view", place, "--get", "/stores/st/samples/0/kept.json?count=2"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["count"] == 2
    assert run(["view", place, "--get", "/stores/st/samples/99.json"]) == 1
    printed = capfdbinary.readouterr()
    assert json.loads(printed.out)["kind"] == "sample-out-of-range"
    assert b"404" in printed.err
    assert run(["view", place, "--get", "overview"]) == 2
