"""Every token can be seen, whatever its bytes are."""

from __future__ import annotations

import pytest

from logitstore.display.glyphs import token_glyphs, visible
from tests.viewer.viewed import HOSTILE_TABLE, VOCAB


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", "·the"),
        (b"\n\n", "⏎⏎"),
        (b"\t\x00\x7f", "⇥␀␡"),
        (b"\xe2\x82", "‹E2 82›"),
        (b"a\xffb", "a‹FF›b"),
        ("\u202e\u200b\u00a0".encode(), "‹U+202E›‹U+200B›‹U+00A0›"),
        ("\u0301".encode(), "◌\u0301"),
        ("हिन्दी".encode(), "हिन्दी"),
        (("Z" + "\u0301" * 6).encode(), "Z" + "\u0301" * 4 + "‹+2 marks›"),
        ("שלום €".encode(), "שלום·€"),
    ],
)
def test_every_character_has_a_glyph(data, shown):
    assert visible(data) == shown


def test_long_tokens_are_cut_and_counted():
    text = visible(b"W" * 10_240)
    assert len(text) < 80
    assert text.endswith("…(10,240 bytes)")
    assert visible("é".encode() * 48) == "é" * 48
    assert token_glyphs(HOSTILE_TABLE)(5).kind == "partial"
    assert token_glyphs(HOSTILE_TABLE)(VOCAB + 5) == ("#45", "id")
