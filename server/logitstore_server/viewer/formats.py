"""How pages write numbers."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from logitstore.display.glyphs import readable

__all__ = ["FILTERS"]


def count(value: Any) -> str:
    """12345 -> 12,345."""
    return "–" if value is None else f"{value:,}"


def size(value: Any) -> str:
    """Bytes in powers of ten, three digits: 1,363,771 -> 1.36 MB."""
    if value is None:
        return "–"
    number = float(value)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def decimal(value: Any, digits: int = 2) -> str:
    """A number with so many digits after the point; a dash for none."""
    if value is None:
        return "–"
    # What rounds to nothing is no negative zero.
    return f"{value if abs(value) >= 0.5 * 10**-digits else 0.0:,.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """0.123 -> 12.3 %."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def probability(value: Any) -> str:
    """Three significant digits, however small."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value else "0"


def amount(value: Any) -> str:
    """Three significant digits; thousands whole."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shell(value: Any) -> str:
    """One word of a command line."""
    return shlex.quote(str(value))


def name(value: Any, limit: int = 160) -> str:
    """A name that somebody chose: nothing invisible, nothing that turns the text around."""
    return readable(str(value), limit)


def short(value: Any, length: int = 12) -> str:
    """The start of a digest."""
    text = str(value)
    return text if len(text) <= length else text[:length] + "…"


FILTERS: dict[str, Callable[..., Any]] = {
    "amount": amount,
    "count": count,
    "decimal": decimal,
    "name": name,
    "percent": percent,
    "probability": probability,
    "shell": shell,
    "short": short,
    "size": size,
}
