"""Answers that can tell any name, also of a folder whose name is no UTF-8: with question marks."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import HTMLResponse, JSONResponse

__all__ = ["JsonData", "Page"]


class Page(HTMLResponse):
    """A page."""

    def render(self, content: Any) -> bytes:
        return str(content).encode("utf-8", "replace")


class JsonData(JSONResponse):
    """A page's data."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8", "replace")
