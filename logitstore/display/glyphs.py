"""Token bytes as text a person can see: no invisible character, nothing that moves its neighbours.

Spaces become `·`, newlines `⏎`, tabs `⇥`, control characters their pictures, bytes that are not
UTF-8 `‹E2 82›`, format and direction characters `‹U+202E›`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from logitstore.spec.header import Header
from logitstore.spec.tokenizer_table import TokenizerTable

__all__ = [
    "MAX_SHOWN",
    "Glyphs",
    "class_glyphs",
    "class_names",
    "header_glyphs",
    "number_glyphs",
    "readable",
    "token_glyphs",
    "visible",
]

# Characters of one token that are shown; the rest is counted.
MAX_SHOWN = 48

_PICTURES = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
# Categories without a shape of their own: controls, format and direction marks, surrogates, private
# use, unassigned, separators.
_SHAPELESS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}

# Marks upon one letter that are drawn; more would reach into the lines above and below.
_MOST_MARKS = 4


class Glyphs(NamedTuple):
    """What is shown for an id.

    Attributes:
        text: at most `MAX_SHOWN` characters and what was left out.
        kind: "text", "special" (a control token, shown by its name), "partial" (holds bytes that
            are not UTF-8 alone), "newline" (ends a line), "id" (no bytes are known).
    """

    text: str
    kind: str


def visible(data: bytes, limit: int = MAX_SHOWN) -> str:
    """Text of bytes with a glyph for everything; past `limit` characters, the number of bytes."""
    # Four bytes are the most a character takes, so this decodes no more than can be shown.
    head = data[: 4 * limit + 4]
    shown: list[str] = []
    for piece in _pieces(head):
        shown.append(piece)
        if len(shown) > limit:
            break
    if len(shown) <= limit and len(head) == len(data):
        return "".join(shown)
    return "".join(shown[:limit]) + f"…({len(data):,} bytes)"


def readable(text: str, limit: int = 160) -> str:
    """A name with a glyph for everything but spaces; past `limit` characters, their number."""
    shown = "".join(_shown(text[:limit], spaces=True))
    return shown if len(text) <= limit else f"{shown}…({len(text):,} characters)"


def token_glyphs(table: TokenizerTable) -> Callable[[int], Glyphs]:
    """id -> glyphs, by a store's own table."""

    def glyphs(token: int) -> Glyphs:
        data = table.tokens[token] if 0 <= token < len(table) else None
        if data is None:
            return Glyphs(f"#{token}", "id")
        text = visible(data)
        if token in table.special:
            return Glyphs(text, "special")
        if not data:
            return Glyphs("∅", "text")
        if "\ufffd" in data.decode("utf-8", "replace") and "\ufffd".encode() not in data:
            return Glyphs(text, "partial")
        return Glyphs(text, "newline" if data.endswith(b"\n") else "text")

    return glyphs


def header_glyphs(header: Header, table: TokenizerTable | None) -> Callable[[int], Glyphs]:
    """id -> glyphs, for a store: by its tokenizer's table, its classes, or as numbers."""
    if table is not None:
        return token_glyphs(table)
    names = class_names(header)
    return class_glyphs(names) if names else number_glyphs


def class_names(header: Header) -> list[str]:
    """Names of a store's classes, none where it has none: a teacher's, or what a push gave."""
    given = header.configuration.get("given")
    for place in (header.configuration, given if isinstance(given, dict) else {}):
        names = place.get("classes")
        if isinstance(names, list) and names:
            return [str(name) for name in names]
    return []


def number_glyphs(token: int) -> Glyphs:
    """For stores without a table: the number."""
    return Glyphs(f"#{token}", "id")


def class_glyphs(names: list[str]) -> Callable[[int], Glyphs]:
    """Class number -> its name."""

    def glyphs(number: int) -> Glyphs:
        if not 0 <= number < len(names):
            return number_glyphs(number)
        return Glyphs(readable(names[number], MAX_SHOWN) or "∅", "text")

    return glyphs


def _pieces(data: bytes) -> Iterator[str]:
    """One string per character, or per run of bytes that are no character."""
    while data:
        try:
            text, broken, data = data.decode(), b"", b""
        except UnicodeDecodeError as error:
            text = data[: error.start].decode()
            broken, data = data[error.start : error.end], data[error.end :]
        yield from _shown(text)
        if broken:
            yield f"‹{broken.hex(' ').upper()}›"


def _shown(text: str, *, spaces: bool = False) -> Iterator[str]:
    """One string per character; `spaces`: these stay as they are."""
    marks, based = 0, False
    for character in text:
        category = unicodedata.category(character)
        if category.startswith("M"):
            marks += 1
            if marks <= _MOST_MARKS:
                # A mark without its letter would sit on whatever is shown before it.
                yield character if based else "◌" + character
            based = True
            continue
        if marks > _MOST_MARKS:
            yield f"‹+{marks - _MOST_MARKS} marks›"
        glyph = character if spaces and character == " " else _glyph(character, category)
        marks, based = 0, glyph == character != " "
        yield glyph
    if marks > _MOST_MARKS:
        yield f"‹+{marks - _MOST_MARKS} marks›"


def _glyph(character: str, category: str) -> str:
    picture = _PICTURES.get(character)
    if picture is not None:
        return picture
    if character < " ":
        return chr(0x2400 + ord(character))
    return f"‹U+{ord(character):04X}›" if category in _SHAPELESS else character
