"""tables/tokenizer.json: one encoding per table, strict reading."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.spec.errors import FormatError
from logitstore.spec.tokenizer_table import TokenizerTable

TABLE = TokenizerTable((b"<s>", b" the", None, b"\xe2\x82", b"\xac"), frozenset({0}))
BYTES = (
    b'{"format":"logitstore-tokenizer","special":[0],'
    b'"tokens":["3c733e","20746865",null,"e282","ac"],"version":1}\n'
)


def test_the_encoding_is_exactly_this():
    assert TABLE.encode() == BYTES
    assert TABLE.fingerprint == hashlib.sha256(BYTES).hexdigest()


@given(
    st.lists(st.one_of(st.none(), st.binary(max_size=6)), min_size=1, max_size=20).flatmap(
        lambda tokens: st.tuples(
            st.just(tuple(tokens)), st.frozensets(st.integers(0, len(tokens) - 1))
        )
    )
)
def test_round_trip(tokens_and_special):
    table = TokenizerTable(*tokens_and_special)
    assert TokenizerTable.decode(table.encode(), where="t") == table


@pytest.mark.parametrize(
    "data",
    [
        BYTES[:-1],
        BYTES.replace(b'"version":1', b'"version":2'),
        BYTES.replace(b"20746865", b"2074686"),
        BYTES.replace(b'"ac"', b'"AC"'),
        BYTES.replace(b'"ac"', b"5"),
        BYTES.replace(b'"e282"', b'"e2 82"'),
        BYTES.replace(b"[0]", b"[9]"),
        BYTES.replace(b"[0]", b"[0,0]"),
        BYTES.replace(b"[0]", b"[false]"),
        BYTES.replace(b":", b": "),
        b"[]",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(data):
    with pytest.raises(FormatError) as caught:
        TokenizerTable.decode(data, where="tables/tokenizer.json")
    assert caught.value.kind == "document-invalid"


def test_text_joins_bytes_across_tokens_and_survives_bad_ones():
    assert TABLE.text([1, 3, 4]) == " the€"
    assert TABLE.text([3]) == "�"
    assert TABLE.text([2, 99]) == ""


def test_a_table_that_only_adds_ids_extends():
    longer = TokenizerTable((*TABLE.tokens, b"new"), frozenset({0, 5}))
    assert TABLE.is_prefix_of(longer)
    assert not longer.is_prefix_of(TABLE)
    assert not TABLE.is_prefix_of(TokenizerTable(TABLE.tokens, frozenset({0, 1})))
    assert not TABLE.is_prefix_of(TokenizerTable((b"<x>", *TABLE.tokens[1:]), frozenset({0})))
