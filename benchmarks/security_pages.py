"""F21: payloads as tokens, names, keys, addresses and searches, in Chromium, on every kind of page.

*Executed* is a payload that set the title, opened a dialog or asked another host; *blocked* one
that only the Content-Security-Policy stopped. As a control each payload is also put into a page
that protects nothing, and how many run there is told. Needs Chromium; LOGITSTORE_CHROMIUM names one
that is not on the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from security_stores import forged, push

__all__ = ["pages", "payloads"]

_CODES = ("document.title='owned'", "alert('owned')", "fetch('http://owned.invalid/')")
_FORMS = """\
<script>{c}</script>
</script><script>{c}</script>
<img src=x onerror={q}{c}{q}>
<svg onload={q}{c}{q}>
<svg/onload={q}{c}{q}//
<body onload={q}{c}{q}>
<iframe srcdoc='<script>parent.{c}</script>'>
<details open ontoggle={q}{c}{q}>x</details>
<video><source onerror={q}{c}{q}></video>
<input autofocus onfocus={q}{c}{q}>
{q}><script>{c}</script>
'><script>{c}</script>
{q} onmouseover={q}{c}{q} x={q}
' onfocus='{c}' autofocus x='
--><script>{c}</script>
]]><script>{c}</script>
</textarea><script>{c}</script>
</title><script>{c}</script>
</style><script>{c}</script>
<scr<script>ipt>{c}</script>
<ScRiPt>{c}</sCrIpT>
<script\t>{c}</script\t>
<a href=javascript:{c}>x</a>
<a href={q}java\tscript:{c}{q}>x</a>
javascript:{c}
<math><mtext></mtext><mglyph><style></math><img src onerror={q}{c}{q}>
';{c};//
{q};{c};//
`;{c};//
\\u003cscript\\u003e{c}\\u003c/script\\u003e
&lt;script&gt;{c}
<script>{c}//
{{{{ {c} }}}}
${{{c}}}
<%= {c} %>
<object data=javascript:{c}>
<meta http-equiv=refresh content='0;url=javascript:{c}'>
<form><button formaction=javascript:{c}>x
<base href=//owned.invalid/><script>{c}</script>
<link rel=stylesheet href=//owned.invalid/>
""".splitlines()


def payloads() -> list[str]:
    return [form.format(c=code, q='"') for form, code in product(_FORMS, _CODES)]


class _Watch:
    """One profile, and what happens in it that must not."""

    def __init__(self, browser: Any, site: str) -> None:
        self.site, self.executed, self.blocked, self.errors = site, 0, 0, 0
        self.found: list[str] = []
        self._place = ""
        context = browser.new_context()
        context.route("**/*", self._only_site)
        self.page = context.new_page()
        self.page.on("dialog", self._dialog)
        self.page.on("console", self._console)

    def visit(self, path: str) -> None:
        self._place = path
        answer = self.page.goto(self.site + path, wait_until="load")
        assert answer is not None
        if answer.status >= 500:
            self.errors += 1
        if self.page.title() == "owned":
            self._owned("title")

    def control(self, payload: str) -> bool:
        """Whether a payload runs in a page that puts it in as it is."""
        before = self.executed
        self.page.goto("about:blank")
        self.page.set_content(
            f"<html><title>x</title><body>{payload}</body></html>", wait_until="load"
        )
        self.page.wait_for_timeout(20)
        ran = self.executed > before or self.page.title() == "owned"
        self.executed, self.blocked, self.found = 0, 0, []
        return ran

    def _owned(self, how: str) -> None:
        self.executed += 1
        self.found.append(f"{how}: {self._place}")

    def _dialog(self, dialog: Any) -> None:
        self._owned("dialog")
        dialog.dismiss()

    def _console(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.blocked += 1
            self.found.append(f"blocked: {self._place}: {message.text[:120]}")

    def _only_site(self, route: Any) -> None:
        url = route.request.url
        if url.startswith((self.site, "about:", "data:", "blob:")):
            route.continue_()
            return
        self._owned("request")
        route.abort()


@contextmanager
def _viewing(folder: Path, names: list[str]) -> Iterator[str]:
    code = "from logitstore_cli.main import main; main()"
    command = [sys.executable, "-c", code, "view", *names, "--port", "0", "--no-browser", "--quiet"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        try:
            yield viewer.stdout.readline().strip().rstrip("/")
        finally:
            viewer.terminate()


def pages(folder: Path, *, tiny: bool) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    tried = payloads()[:: 12 if tiny else 1]
    name = "<img src=x onerror=document.title='owned'>"
    words = tuple(each.encode() for each in tried)
    keys = tuple(tried)
    push(folder / name, tokens=words, keys=keys, samples=len(tried) if tiny else 40)
    push(folder / "plain")
    forged(folder / "plain", header=lambda body: body["teacher"].update(name=tried[0] + tried[1]))
    push(folder / "broken", tokens=words)
    for path in (folder / "broken" / "shards").iterdir():
        path.rename(path.with_name(path.name + "." + name.replace("/", "")))
    rows = []
    with (
        _viewing(folder, [f"./{name}", "plain", "broken"]) as site,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("LOGITSTORE_CHROMIUM") or shutil.which("chromium"),
            args=["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])],
        )
        watch = _Watch(browser, site)
        runs = sum(watch.control(payload) for payload in tried)
        for place, visits in _visits(tried, name, tiny=tiny).items():
            before = (watch.executed, watch.blocked, watch.errors)
            for path in visits:
                watch.visit(path)
            rows.append(
                {
                    "place": place,
                    "visits": len(visits),
                    "executed": watch.executed - before[0],
                    "blocked": watch.blocked - before[1],
                    "server_errors": watch.errors - before[2],
                }
            )
        browser.close()
        found = watch.found
    return {
        "payloads": len(tried),
        "run_without_protection": runs,
        "visits": sum(row["visits"] for row in rows),
        "executed": sum(row["executed"] for row in rows),
        "blocked": sum(row["blocked"] for row in rows),
        "found": found[:20],
        "rows": rows,
    }


def _visits(tried: list[str], name: str, *, tiny: bool) -> dict[str, list[str]]:
    """Place of the payload -> addresses."""
    own = quote(name, safe="")
    store = f"/stores/{own}"
    each = [quote(payload, safe="") for payload in tried]
    positions = range(0, len(tried), 1 if not tiny else 5)
    samples = range(40 if not tiny else 2)
    return {
        "tokens, kept tokens": [f"{store}/samples/0?position={p}" for p in positions],
        "tokens, sample keys, store's name": [
            *("/", f"{store}/overview", f"{store}/find", f"{store}/find?text=w", "/plain"),
            *(f"{store}/samples/{n}" for n in samples),
            *(f"{store}/find?order=corpus&skip={n}" for n in range(4)),
            *(f"/compare?a={own}&b=plain", f"/compare?a=plain&b={own}"),
            f"/compare/samples/0?a={own}&b=broken",
        ],
        "teacher's name": ["/stores/plain/overview", "/stores/plain/samples/0", "/"],
        "errors of damaged stores": ["/stores/broken/overview", "/stores/broken/samples/0"],
        "search for text": [f"{store}/find?text={p}" for p in each],
        "search for a key": [f"{store}/find?key={p}" for p in each],
        "parameters that are refused": [f"{store}/find?measure={p}&order={p}" for p in each],
        "stores to compare": [f"/compare?a={p}&b=plain" for p in each],
        "paths that are not there": [f"{root}/{p}" for p in each for root in ("", "/stores")],
    }  # fmt: skip
