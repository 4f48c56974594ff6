"""Tokenizers: text to ids, and the bytes that every id stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from logitstore.spec.tokenizer_pieces import table_of
from logitstore.spec.tokenizer_table import TokenizerTable

__all__ = ["ByteTokenizer", "Encoded", "FastTokenizer", "Tokenizer", "table_of"]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text.

    Attributes:
        ids: int64 [n].
        byte_ends: int64 [n], byte offset in the UTF-8 text where each token ends. Exact for
            byte-level tokenizers, also where a token ends inside a character; a tokenizer that
            normalises text gives the end of the characters that the token came from.
    """

    ids: NDArray[np.int64]
    byte_ends: NDArray[np.int64]


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer.

    Attributes:
        name: for people.
        table: bytes of every id.
        bos_id: the token that begins a document, or None.
        adds_bos: whether the tokenizer itself, used by its own defaults, puts it there.
    """

    name: str
    table: TokenizerTable
    bos_id: int | None
    adds_bos: bool

    def encode(self, text: str) -> Encoded:
        """Tokens of the text alone, no special token added."""
        ...


class ByteTokenizer:
    """Every UTF-8 byte is a token; ids 0 to 255. For teachers over bytes, and for tests."""

    name = "bytes"
    adds_bos = False

    def __init__(self, vocab_size: int = 256, bos_id: int | None = None) -> None:
        """ids from 256 on, if any, are control tokens."""
        tokens = [bytes([i]) if i < 256 else f"<{i}>".encode() for i in range(vocab_size)]
        self.table = TokenizerTable(tuple(tokens), frozenset(range(256, vocab_size)))
        self.bos_id = bos_id

    def encode(self, text: str) -> Encoded:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        return Encoded(ids, np.arange(1, len(ids) + 1))


class FastTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        backend: a `tokenizers.Tokenizer` (`backend_tokenizer` of a transformers one). Names of
            control tokens inside a text become those tokens, as they do there.
        name, bos_id, adds_bos: see `Tokenizer`.
    """

    def __init__(self, backend: Any, *, name: str, bos_id: int | None, adds_bos: bool) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.name = name
        self.bos_id = bos_id
        self.adds_bos = adds_bos
        self.table = table_of(backend)

    def encode(self, text: str) -> Encoded:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int64)
        tokens = self.table.tokens
        pieces = [tokens[i] or b"" for i in encoding.ids]
        if b"".join(pieces) == text.encode():
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        else:
            ends = _utf8_ends(text)[[stop for _, stop in encoding.offsets]]
        return Encoded(ids, ends)


def _utf8_ends(text: str) -> NDArray[np.int64]:
    """int64 [characters + 1]: byte offset at which the first n characters end."""
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    ends = np.zeros(len(code_points) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    return ends
