"""`store.show(i)`: the heat map of a notebook, opened in a browser that may run no script."""

from __future__ import annotations

import re

import pytest

from logitstore import store
from logitstore.display.measures import MEASURES
from logitstore.spec.errors import UsageError
from tests.viewer.conftest import HOSTILE_NAME
from tests.viewer.viewed import push


@pytest.fixture(scope="module")
def page(browser, site_folder, tmp_path_factory):
    """The HTML of two samples as one file, in a profile without script or network."""
    parts = []
    for name in ("captured", HOSTILE_NAME):
        with store.open(site_folder / name) as opened:
            parts.append(opened.show(0, measure="label_rank")._repr_html_())
    file = tmp_path_factory.mktemp("notebook") / "cell.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{''.join(parts)}", encoding="utf-8")
    context = browser.new_context(java_script_enabled=False, offline=True)
    opened_page = context.new_page()
    asked: list[str] = []
    opened_page.on("request", lambda request: asked.append(request.url))
    opened_page.goto(file.as_uri())
    assert asked == [file.as_uri()]
    yield opened_page
    context.close()


def test_colours_are_those_of_the_measure_that_is_chosen(page, site_folder):
    with store.open(site_folder / "captured") as opened:
        record = opened.sample(0)
    cell = page.locator("body > div").first
    tokens = cell.locator(".t")
    assert tokens.count() == record.num_positions == 128
    colours = {}
    for name, column in (("label_rank", "label_rank"), ("entropy", "entropy")):
        cell.locator("label", has_text=MEASURES[name].title).click()
        levels = MEASURES[name].levels(record[column].astype(float))[:-1]
        shown = [
            tokens.nth(p).evaluate("t => getComputedStyle(t).backgroundColor")
            for p in range(0, 127, 9)
        ]
        for level, colour in zip(levels[::9].tolist(), shown, strict=True):
            assert colours.setdefault(level, colour) == colour
        assert len({*shown}) > 1 or len({*levels[::9].tolist()}) == 1


def test_focus_and_pointer_open_what_a_position_keeps(page, site_folder):
    with store.open(site_folder / "captured") as opened:
        record = opened.sample(0)
    token = page.locator("body > div").first.locator(".t").nth(5)
    assert not token.locator(".tip").is_visible()
    token.focus()
    assert token.locator(".tip").is_visible()
    assert token.locator(".row").count() == 8
    text = token.locator(".tip").inner_text()
    assert f"{float(2.718281828 ** float(record['logprobs'][5, 0])):.3f}"[:4] in text
    assert f"(id {record['tokens'][6]})" in text
    assert "showing 8 of 16 ids" in text
    page.locator("body > div").first.locator(".t").nth(9).hover()
    assert page.locator("body > div").first.locator(".t").nth(9).locator(".tip").is_visible()


def test_hostile_tokens_are_text(page):
    cell = page.locator("body > div").nth(1)
    assert cell.locator("img, script").count() == 0
    text = cell.inner_text()
    assert "<img" in text
    assert "‹U+202E›" in text
    assert page.title() != "owned"


def test_html_is_self_contained_and_its_cap_is_told(site_folder, tmp_path):
    with store.open(site_folder / "long") as opened:
        shown = opened.show(0, start=100, positions=10)
        html = shown._repr_html_()
        assert "showing 10 of 32,768 positions, from 100" in html
        assert repr(shown) == "<sample 0 'docs/a<b>.txt#0@0': 32,768 positions>"
        assert html.count('class="t ') == 10
        assert not re.search(r"https?:|<script|@import|url\(", html)
        with pytest.raises(UsageError, match="no such measure"):
            opened.show(0, measure="x")
        assert opened.show(0, start=32_767)._repr_html_().count('class="t ') == 1
    for signal in ("dense", "graph:k=3", "sampled:9"):
        push(tmp_path / signal, signal, table=None)
        with store.open(tmp_path / signal) as opened:
            assert "Sample 1" in opened.show(1)._repr_html_()
