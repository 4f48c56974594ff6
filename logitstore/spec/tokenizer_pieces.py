"""What the pieces of a `tokenizers.Tokenizer` stand for; that library need not be installed."""

from __future__ import annotations

import json
import re
from typing import Any

from logitstore.spec.tokenizer_table import TokenizerTable

__all__ = ["table_of"]


def table_of(backend: Any) -> TokenizerTable:
    """The bytes of every id of a `tokenizers.Tokenizer`.

    Byte-level pieces are exact. Pieces of a SentencePiece-like model have their blanks for "▁" and
    bytes for `<0x..>`; a WordPiece continuation loses its "##". Added tokens are their own text.
    """
    kinds = set(re.findall(r'"type":\s*"(\w+)"', json.dumps(_decoder(backend))))
    added = backend.get_added_tokens_decoder()
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    tokens: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for piece, number in vocab.items():
        tokens[number] = piece.encode() if number in added else _piece_bytes(piece, kinds)
    special = frozenset(number for number, token in added.items() if token.special)
    return TokenizerTable(tuple(tokens), special)


def _decoder(backend: Any) -> Any:
    return json.loads(backend.to_str())["decoder"]


def _piece_bytes(piece: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds and all(char in _BYTE_OF for char in piece):
        return bytes(_BYTE_OF[char] for char in piece)
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if "WordPiece" in kinds:
        return piece.removeprefix("##").encode()
    return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, the rest follows U+0100.

    Source: Radford et al. 2019 (GPT-2), the released encoder.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
