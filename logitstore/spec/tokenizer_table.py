"""tables/tokenizer.json: the bytes of every token id, so that text can be shown without a model.

The table is canonical JSON (sorted keys, no spaces, one newline at the end):

    {"format":"logitstore-tokenizer","special":[0],"tokens":["3c733e",null,"20746865"],"version":1}

`tokens[i]` is the lower-case hexadecimal of the bytes that id i stands for, null for an id the
tokenizer does not use. `special` lists the ids of control tokens in ascending order; their bytes
are their name. A table has exactly one encoding, so the tokenizer's fingerprint is the file's
SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.errors import FormatError

__all__ = ["TOKENIZER_TABLE", "TokenizerTable"]

TOKENIZER_TABLE = "tokenizer.json"

_FORMAT = "logitstore-tokenizer"
_VERSION = 1


@dataclass(frozen=True)
class TokenizerTable:
    """A tokenizer by content.

    Attributes:
        tokens: bytes of each id, None for an unused id.
        special: ids of control tokens; they lie inside `tokens`.
    """

    tokens: tuple[bytes | None, ...]
    special: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        outside = [i for i in self.special if not 0 <= i < len(self.tokens)]
        if outside:
            raise ValueError(f"special ids {sorted(outside)[:8]} are not in the table")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self) -> bytes:
        """The file's bytes; equal tables have equal bytes."""
        return _encode(
            [None if token is None else token.hex() for token in self.tokens], sorted(self.special)
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `encode()`, hexadecimal."""
        return sha256_hex(self.encode())

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> TokenizerTable:
        """Read a table; anything but its one canonical encoding is refused.

        Raises: FormatError document-invalid.
        """
        try:
            value = json.loads(data)
            tokens, special = value["tokens"], value["special"]
            if any(type(i) is not int for i in special):
                raise ValueError("special ids must be integers")
            raw = tuple(None if t is None else bytes.fromhex(t) for t in tokens)
            table = cls(raw, frozenset(special))
            if table.encode() != bytes(data):
                raise ValueError("not in canonical form, or of another version")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(
                "document-invalid",
                f"not a tokenizer table: {error}",
                where=where,
                got=repr(bytes(data[:40])),
                expected=f"canonical JSON of format {_FORMAT!r}, version {_VERSION}",
            ) from None
        return table

    def is_prefix_of(self, other: TokenizerTable) -> bool:
        """Whether `other` gives every id of this table the same meaning, and perhaps adds ids."""
        size = len(self)
        return (
            other.tokens[:size] == self.tokens
            and frozenset(i for i in other.special if i < size) == self.special
        )

    def text(self, ids: Iterable[int]) -> str:
        """The ids' text; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        size = len(self.tokens)
        parts = (self.tokens[i] for i in map(int, ids) if 0 <= i < size)
        return b"".join(part or b"" for part in parts).decode("utf-8", "replace")


def _encode(tokens: list[str | None], special: list[int]) -> bytes:
    body = {"format": _FORMAT, "special": special, "tokens": tokens, "version": _VERSION}
    return canonical_json(body) + b"\n"
