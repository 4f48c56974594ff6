"""The viewer as the service shows it: a person with a key in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.conftest import Keys
from tests.server_security.live import running
from tests.viewer.conftest import Look
from tests.viewer.viewed import push


def test_a_person_logs_in_sees_their_store_and_logs_out(browser: Any, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    stores = [
        StoreEntry(name=name, location=str(push(tmp_path / name, "topk:4")))
        for name in ("alpha", "beta")
    ]
    settings = ServerSettings(stores=stores, keys_file=keys.file, port=0, shutdown_delay_s=0)
    with running(settings, toy=False) as live:
        seen = Look(browser, live.url)
        try:
            page = seen.open("/stores/alpha/samples/1?position=2")
            page.fill("#key", "ls_aaaaaaaa_wrong")
            page.press("#key", "Enter")
            page.wait_for_url("**/login")
            assert "no valid key" in page.inner_text("[role=alert]")
            seen.open("/stores/alpha/samples/1?position=2")
            page.fill("#key", keys.alpha)
            page.click("main button")
            page.wait_for_url("**/stores/alpha/samples/1?position=2")
            page.wait_for_selector("[data-p='2'].now")
            page.wait_for_selector("#panel .top-k li")
            # A key stands in no address that a reader may pass on, and in no page.
            assert keys.alpha not in page.url + page.content()
            seen.open("/")
            assert page.locator(".card").count() == 1
            assert seen.context.cookies()[0]["httpOnly"]
            assert page.evaluate("document.cookie") == ""
            answer = page.goto(f"{live.url}/stores/beta/overview")
            assert answer.status == 404
            assert "beta" not in page.inner_text("main")
            seen.open("/")
            page.click("text=Log out")
            page.wait_for_selector("#key")
            assert page.goto(f"{live.url}/stores/alpha/overview").status == 401
            assert seen.context.cookies() == []
        finally:
            seen.context.close()
        unexpected = [text for text in seen.complaints if "40" not in text]
        assert unexpected == []
        log = live.log.read_text()
    assert keys.alpha not in log
