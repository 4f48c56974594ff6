"""Packing: documents one after another, cut into windows of equal length.

Letters: T positions of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.corpora.documents import Document
from logitstore.corpora.tokenizer import Tokenizer

__all__ = ["Sample", "labels_of", "pack", "position_ids_of"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One window.

    Attributes:
        key: "<document key>@<token>" of its first token: stable, and unique in a store.
        tokens: int64 [T].
        segment_ids: int64 [T], 0 for the first document in the window, then 1, 2, ...
        byte_end: int64 [T], byte offset in the sample's text where each token ends; the sample's
            text is its documents' text without anything between, and a BOS has no text.
    """

    key: str
    tokens: Ints
    segment_ids: Ints
    byte_end: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def labels(self) -> Ints:
        """int64 [T]: the next token of the same segment, -1 in a segment's last row."""
        return labels_of(self.tokens, self.segment_ids)

    @property
    def position_ids(self) -> Ints:
        """int64 [T]: 0, 1, ... from the start of each segment."""
        return position_ids_of(self.segment_ids)


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    bos: bool,
    max_tokens: int | None = None,
) -> Iterator[Sample]:
    """Windows of `seq_len` tokens over documents; the last one may be shorter and is kept.

    A document that does not fit goes on in the next window, where it is the first segment and sees
    nothing of what came before. Blank documents are left out.

    Args:
        bos: put the tokenizer's BOS before every document (not again where a window continues one).
        max_tokens: end after so many tokens.
    """
    window: list[_Piece] = []
    room = seq_len
    left = max_tokens
    for document in documents:
        if document.is_blank:
            continue
        whole = _tokenised(document, tokenizer, bos)
        if left is not None:
            whole = whole.cut(0, left)
            left -= len(whole.tokens)
        start = 0
        while start < len(whole.tokens):
            window.append(whole.cut(start, start + room))
            taken = len(window[-1].tokens)
            start, room = start + taken, room - taken
            if room == 0:
                yield _sample(window)
                window, room = [], seq_len
        if left == 0:
            break
    if window:
        yield _sample(window)


def labels_of(tokens_T: NDArray[Any], segment_ids_T: NDArray[Any]) -> Ints:
    """int64 [T]: the next token of the same segment, -1 in a segment's last row."""
    labels = np.full(len(tokens_T), -1, np.int64)
    inside = segment_ids_T[1:] == segment_ids_T[:-1]
    labels[:-1][inside] = tokens_T[1:][inside]
    return labels


def position_ids_of(segment_ids_T: NDArray[Any]) -> Ints:
    """int64 [T]: 0, 1, ... from the start of each segment."""
    index = np.arange(len(segment_ids_T))
    begins = np.ones(len(segment_ids_T), bool)
    begins[1:] = segment_ids_T[1:] != segment_ids_T[:-1]
    return index - np.maximum.accumulate(np.where(begins, index, 0))


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one document; their text begins at its byte `byte_start`."""

    key: str
    start: int
    tokens: Ints
    byte_ends: Ints
    byte_start: int

    def cut(self, start: int, stop: int) -> _Piece:
        before = self.byte_start if start == 0 else int(self.byte_ends[start - 1])
        return _Piece(
            self.key,
            self.start + start,
            self.tokens[start:stop],
            self.byte_ends[start:stop],
            before,
        )


def _tokenised(document: Document, tokenizer: Tokenizer, bos: bool) -> _Piece:
    encoded = tokenizer.encode(document.text)
    ids, ends = encoded.ids, encoded.byte_ends
    if bos and len(ids):
        assert tokenizer.bos_id is not None
        ids, ends = np.append(tokenizer.bos_id, ids), np.append(0, ends)
    return _Piece(document.key, 0, ids.astype(np.int64), ends.astype(np.int64), 0)


def _sample(window: list[_Piece]) -> Sample:
    lengths = [len(piece.tokens) for piece in window]
    ends: list[Ints] = []
    text_bytes = 0
    for piece in window:
        ends.append(piece.byte_ends - piece.byte_start + text_bytes)
        text_bytes = int(ends[-1][-1])
    return Sample(
        key=f"{window[0].key}@{window[0].start}",
        tokens=np.concatenate([piece.tokens for piece in window]),
        segment_ids=np.repeat(np.arange(len(window)), lengths),
        byte_end=np.concatenate(ends),
    )
