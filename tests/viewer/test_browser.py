"""Pages in a real browser: heat map, keyboard, hostile content, accessibility, narrow screens."""

from __future__ import annotations

from importlib import resources
from urllib.parse import quote

import pytest

from tests.viewer.conftest import HOSTILE_NAME, SETTLED, until

HOSTILE = quote(HOSTILE_NAME, safe="")
PAGES = [
    "/",
    "/stores/captured/overview",
    "/stores/captured/samples/0?position=5",
    "/stores/threshold/samples/1",
    "/stores/graph/samples/1",
    "/stores/captured/shards/0001-000000?check=1",
    "/stores/captured/find?text=the",
    "/compare?a=captured&b=narrow",
    "/compare/samples/0?a=captured&b=narrow",
    f"/stores/{HOSTILE}/samples/0",
    "/stores/none/overview",
]
# Tokens that the heat map keeps in the page at once, and all elements of the page.
MOST_TOKENS = 4_000
MOST_ELEMENTS = 9_000


def _axe() -> str:
    package = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    return resources.files(package).joinpath("axe.min.js").read_text(encoding="utf-8")


def test_axe_finds_nothing_serious_and_no_width_scrolls_sideways(look):
    """Each page in light and dark, then at 640 pixels (1280 at a zoom of 200 %) and at 360."""
    axe = _axe()
    seen = look(viewport={"width": 1280, "height": 800}, color_scheme="light")
    found, wide = [], []
    for path in PAGES:
        page = seen.open(path)
        page.evaluate(axe)
        for scheme, rules in (("light", ""), ("dark", "runOnly: ['color-contrast'], ")):
            page.emulate_media(color_scheme=scheme)
            result = page.evaluate(f"axe.run({{{rules}resultTypes: ['violations']}})")
            found += [
                (path, scheme, v["id"], v["impact"], v["nodes"][0]["html"][:200])
                for v in result["violations"]
                if v["impact"] in ("serious", "critical")
            ]
        for width in (640, 360):
            page.set_viewport_size({"width": width, "height": 780})
            if not page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
                wide.append((path, width))
        page.set_viewport_size({"width": 1280, "height": 800})
        page.emulate_media(color_scheme="light")
    seen.complaints = [c for c in seen.complaints if "404" not in c]
    assert found == []
    assert wide == []


def test_all_measures_can_be_chosen_and_are_in_the_address(look):
    page = look().open("/stores/captured/samples/0")
    for name in ("top1_prob", "label_logprob", "label_rank", "kept_mass", "entropy"):
        page.check(f"input[value={name}]", force=True)
        assert f"measure={name}" in page.url
        title = page.evaluate("document.querySelector('#measure-how').textContent")
        assert any(source in title for source in ("stored", "derived"))
        levels = page.evaluate(
            "new Set([...document.querySelectorAll('.tk')].map(t => t.className)).size"
        )
        assert levels > 1


def test_a_walk_by_keyboard_alone(look):
    seen = look()
    page = seen.open("/stores/captured/samples/0")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tk')"):
            break
    else:
        pytest.fail("Tab never reaches the heat map")
    for key, position in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)):
        page.keyboard.press(key)
        until(page, f"document.activeElement.dataset.p === '{position}'")
    page.keyboard.press("ArrowDown")
    until(page, "Number(document.activeElement.dataset.p) > 3")
    page.keyboard.press("End")
    until(page, "document.activeElement.dataset.p === '127'")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#panel').dataset.position === '1'")
    told = page.request.get(f"{seen.site}/stores/captured/samples/0/kept.json?count=2").json()
    kept = told["positions"][1]
    bars = page.locator("#panel .top-k li")
    assert bars.count() == len(kept["entries"]) == 16
    for number in (0, 1, 15):
        entry, text = kept["entries"][number], bars.nth(number).inner_text()
        for part in (f"id {entry['id']}", f"log-prob {entry['logprob']:.3f}", f"rank {number}"):
            assert part in text
        assert f"{entry['value']:.3f}"[:4] in text
    marked = page.locator("#panel .top-k .label").count()
    assert marked == sum(entry["label"] for entry in kept["entries"])
    assert "(exact)" in page.locator("#panel .outside").first.inner_text()
    for level, needed in kept["mass"]["needed"].items():
        share = f"{round(100 * float(level))} %"
        number = page.locator("#panel .mass div", has_text=share).locator("dd").inner_text()
        assert number == ("> 16" if needed is None else str(needed))
    page.keyboard.press("3")
    until(page, "location.search.includes('measure=label_logprob')")
    page.keyboard.press("u")
    until(page, "Number(document.activeElement.dataset.p) > 1")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    page.wait_for_url("**/samples/1*")


def test_single_letter_keys_can_be_switched_off(look):
    page = look().open("/stores/captured/samples/0")
    page.keyboard.press("?")
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    page.keyboard.press("n")
    assert page.url.endswith("/samples/0")
    assert page.evaluate("document.documentElement.dataset.theme") is None


def test_pointing_at_a_token_shows_what_was_expected(look):
    page = look().open("/stores/captured/samples/0")
    page.hover("[data-p='7']")
    until(page, "document.querySelector('#panel').dataset.position === '7'")
    page.click("[data-p='9']")
    until(page, "location.search.includes('position=9')")


# What a reader sees of a page and has chosen in it.
SCREEN = """({
  text: document.querySelector('main').innerText,
  title: document.title,
  tokens: [...document.querySelectorAll('.tk')].map(t => t.textContent + t.className),
  fields: [...document.querySelectorAll('input, select')].map(f => f.name + f.value + f.checked),
})"""


def _walk_text(page):
    page.press("[data-p='0']", "5")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#panel').dataset.position === '3'")


def _search(page):
    page.fill("input[name=text]", "the")
    page.fill("input[name=least]", "0.5")
    page.select_option("select[name=measure]", "label_rank")
    page.select_option("select[name=order]", "sure")
    with page.expect_navigation():
        page.click("main form button")


def _check_bytes(page):
    with page.expect_navigation():
        page.click("text=Compare its bytes now")
    page.wait_for_selector(".state.good")


def _compare(page):
    page.select_option("select[name=b]", "narrow")
    page.select_option("select[name=a]", "captured")
    with page.expect_navigation():
        page.click("main form button")


def _order_compared(page):
    with page.expect_navigation(url="**order=js*"):
        page.click(".orders >> text=Jensen")
    until(page, SETTLED)
    page.check("input[value=overlap]", force=True)
    page.press("[data-p='0']", "ArrowRight")
    until(page, "document.querySelector('#panel').dataset.position === '1'")


def test_every_view_has_an_address_that_shows_it_in_a_fresh_profile(look):
    """What clicks and keys lead to, its address opens again (V17)."""
    seen = look()
    for start, act in (
        ("/stores/captured/overview", None),
        ("/stores/captured/shards/0001-000000", _check_bytes),
        ("/stores/captured/samples/0", _walk_text),
        ("/stores/captured/samples/1?position=100&measure=label_rank", None),
        ("/stores/captured/find", _search),
        ("/compare", _compare),
        ("/compare/samples/0?a=captured&b=narrow", _order_compared),
    ):
        page = seen.open(start)
        if act is not None:
            act(page)
            until(page, SETTLED)
        screen = page.evaluate(SCREEN)
        fresh = look()
        again = fresh.open(page.url.removeprefix(seen.site))
        assert again.evaluate(SCREEN) == screen, page.url
        fresh.context.close()


def test_compare_colours_the_text_by_disagreement_and_shows_both_stores(look):
    seen = look()
    path = "/compare/samples/0"
    page = seen.open(f"{path}?a=captured&b=narrow&measure=missed&position=40")
    until(page, "document.querySelector('#panel').dataset.position === '40'")
    told = page.request.get(f"{seen.site}{path}/tokens.json?a=captured&b=narrow&count=128").json()
    breaks = (0.01, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5)
    levels = [sum(value >= limit for limit in breaks) for value in told["measures"]["missed"]]
    assert len(set(levels)) > 1
    shown = page.evaluate(
        "[...document.querySelectorAll('.tk')].map(t => Number(t.className.match(/ l(\\d)/)[1]))"
    )
    assert shown == levels
    sides = page.locator("#panel .two section")
    assert sides.count() == 2
    for number, (name, ids) in enumerate((("captured", 10), ("narrow", 4))):
        answer = page.request.get(f"{seen.site}/stores/{name}/samples/0/kept.json?from=40&count=1")
        first = answer.json()["positions"][0]["entries"][0]
        assert name in sides.nth(number).inner_text()
        assert f"id {first['id']} · log-prob" in sides.nth(number).inner_text()
        assert sides.nth(number).locator(".top-k li").count() == ids
    page.focus("[data-p='40']")
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#panel').dataset.position === '41'")
    page.keyboard.press("1")
    until(page, "location.search.includes('measure=kl') && location.search.includes('a=captured')")
    assert page.locator("main table tbody tr").count() > 50


def test_threshold_panels_tell_head_from_drawn_ids(look):
    page = look().open("/stores/threshold/samples/1?position=2")
    page.wait_for_selector("#panel .top-k")
    assert "drawn ids (threshold:tau=1/10)" in page.inner_text("#panel")
    assert "outside the exact head" in page.inner_text("#panel")


def test_hostile_content_is_shown_and_never_runs(look):
    seen = look(viewport={"width": 1000, "height": 800})
    for path in (
        "/",
        f"/stores/{HOSTILE}/overview",
        f"/stores/{HOSTILE}/samples/0",
        f"/stores/{HOSTILE}/find?text=%3Cimg",
        f"/compare?a={HOSTILE}&b=captured",
    ):
        page = seen.open(path)
        assert page.title() != "owned"
        assert page.evaluate("document.querySelectorAll('main img, main script[src]').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    seen.complaints = [c for c in seen.complaints if "422" not in c]
    page = seen.open(f"/stores/{HOSTILE}/samples/0")
    for position in range(60):
        page.evaluate(f"document.querySelector(\"[data-p='{position}']\").focus()")
        until(page, f"document.querySelector('#panel').dataset.position === '{position}'")
    assert page.title() != "owned"
    text = page.inner_text("#heat")
    assert "<img" in text
    assert "‹U+202E›" in text
    assert "…(10,240 bytes)" in text
    assert "\u202e" not in text


def test_a_sample_of_32768_tokens_keeps_the_page_small(look):
    page = look().open("/stores/long/samples/0")
    most = 0
    for position in (0, 8_000, 20_000, 32_700):
        page.goto(page.url.partition("?")[0] + f"?position={position}")
        page.wait_for_selector(f"[data-p='{position}'].now")
        for _ in range(6):
            page.mouse.wheel(0, 900)
            page.wait_for_timeout(40)
        tokens, elements = page.evaluate(
            "[document.querySelectorAll('.tk').length, document.querySelectorAll('*').length]"
        )
        most = max(most, tokens)
        assert 0 < tokens <= MOST_TOKENS
        assert elements <= MOST_ELEMENTS
    assert most > 0


def test_light_and_dark_follow_the_system_and_a_switch_that_stays(look):
    seen = look(color_scheme="dark")
    page = seen.open("/stores/captured/overview")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert light != dark
    page = seen.open("/stores/captured/samples/0")
    assert page.evaluate(ground) == light


def test_charts_are_drawn_and_have_tables(look):
    page = look().open("/stores/captured/overview")
    charts = page.locator(".chart").count()
    assert charts >= 5
    assert page.locator(".chart canvas").count() == charts
    assert page.locator(".chart details table").count() == charts


def test_pages_work_without_script(look):
    page = look(java_script_enabled=False).open("/stores/captured/samples/0")
    assert page.locator("#h-rows").is_visible()
    assert page.locator("table tbody tr").count() >= 32
