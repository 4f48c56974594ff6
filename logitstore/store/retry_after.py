"""When a busy HTTP server wants to be asked again.

obstore reports a status and no headers. So where a try has failed with 429 or 503, one HEAD request
for the same file asks for the header; it is much cheaper for the server than another try.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

from logitstore.store.credentials import bearer_token

__all__ = ["parse_retry_after", "retry_after_s"]

_TIMEOUT_S = 10.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """The token is for this host alone."""


def retry_after_s(url: str) -> float | None:
    """Seconds to wait before the next request, None when the server does not say."""
    token = bearer_token(url)
    request = urllib.request.Request(url, method="HEAD")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return parse_retry_after(error.headers.get("Retry-After"))
    except (OSError, http.client.HTTPException, ValueError):
        return None


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now that a Retry-After header means: a number or an HTTP date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
