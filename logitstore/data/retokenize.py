"""The text of a batch in another tokenizer's tokens, for students that do not share the teacher's.

Letters: B samples, T positions of the student's tokens, U positions of the store's, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.data.collate import Batch
from logitstore.record.sequences import IGNORE
from logitstore.spec.errors import AlignmentError, TargetsError, UsageError
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["StudentBatch", "retokenizer"]

Ints = NDArray[np.int64]


class _Encoded(Protocol):
    @property
    def ids(self) -> Ints: ...

    @property
    def byte_ends(self) -> Ints: ...


class StudentTokenizer(Protocol):
    """What is needed of the student's tokenizer; `logitstore.corpora.tokenizer.FastTokenizer` has
    it."""

    bos_id: int | None

    def encode(self, text: str) -> Any:
        """`ids` int64 [n] and `byte_ends` int64 [n], no special token added."""
        ...


@dataclass(frozen=True, kw_only=True)
class StudentBatch(Batch):
    """A batch whose [B, T] fields are the student's and whose `targets` are the store's.

    `loss_mask` is True where the next token covers only bytes that the teacher predicted in
    positions that count. Row t of the student and row t of the targets do not meet: only losses
    that align them may be used (`gold`, `uld`).

    Attributes:
        byte_end: int64 [B, T], byte offset in the sample's text where each of the student's tokens
            ends.
        target_labels, target_mask, target_segment_ids: [B, U], `labels`, `loss_mask` and
            `segment_ids` of the store's own tokens.
    """

    byte_end: Tensor
    target_labels: Tensor
    target_mask: Tensor
    target_segment_ids: Tensor


def retokenizer(store: Store, tokenizer: StudentTokenizer) -> Callable[[Batch], StudentBatch]:
    """A function from the store's batches to batches of the same text in the student's tokens.

    The text comes from the tokens and the store's tokenizer table; nothing else is read. Segments
    stay segments. Where the teacher's began with a token without text (a BOS), the student's begins
    with `tokenizer.bos_id`, if there is one. A window may begin or end inside a character, whose
    bytes are then left out.

    Args:
        store: made with `--aux byte_end`.
        tokenizer: the student's.

    Raises: TargetsError aux-missing without byte_end or table; the returned function raises
        AlignmentError tokenizer-mismatch when a token's bytes are not what the table says, because
        the teacher's tokenizer rewrites text (lower-casing, normalisation).
    """
    info = store.header.tokenizer
    if info is None or info.table is None or "byte_end" not in store.header.stored_fields:
        raise TargetsError(
            "aux-missing",
            "text can be recovered from a store with a tokenizer table and byte offsets only",
            where=str(store.location),
            hint="capture with --aux byte_end",
        )
    where = f"{store.location}/tables/{info.table}"
    table = TokenizerTable.decode(store.table(info.table), where=where)

    def retokenized(batch: Batch) -> StudentBatch:
        lengths_B, byte_end_N = batch.targets.lengths, batch.targets.byte_end
        if batch.tokens is None or lengths_B is None or byte_end_N is None:
            raise UsageError(
                "bad-argument",
                "this batch does not hold what its text is recovered from",
                where="retokenizer",
                expected="a batch of token sequences as the loader gives it, with column byte_end",
            )
        assert batch.segment_ids is not None
        assert batch.loss_mask is not None
        lengths = lengths_B.tolist()
        samples = [
            _Sample.of(
                _bytes_of(tokens_U[:length], byte_end.cpu(), table, where),
                *(x_U[:length].cpu().numpy() for x_U in (segments_U, counts_U)),
            )
            for tokens_U, segments_U, counts_U, byte_end, length in zip(
                batch.tokens.cpu(),
                batch.segment_ids,
                batch.loss_mask,
                byte_end_N.split(lengths),
                lengths,
                strict=True,
            )
        ]
        own = [sample.encoded(tokenizer, batch.block_diagonal) for sample in samples]

        def padded(name: str, fill: int) -> Tensor:
            rows = [torch.from_numpy(getattr(x, name)) for x in own]
            padded_BT = torch.nn.utils.rnn.pad_sequence(rows, True, fill)
            return padded_BT.to(batch.labels.device)

        return StudentBatch(
            labels=padded("labels", -100),
            targets=batch.targets,
            sample_keys=batch.sample_keys,
            sample_ids=batch.sample_ids,
            tokens=padded("tokens", 0),
            loss_mask=padded("counts", 0).bool(),
            segment_ids=padded("segment_ids", -1),
            position_ids=padded("position_ids", 0),
            block_diagonal=batch.block_diagonal,
            state=batch.state,
            byte_end=padded("byte_end", 0),
            target_labels=batch.labels,
            target_mask=batch.loss_mask,
            target_segment_ids=batch.segment_ids,
        )

    return retokenized


def _bytes_of(
    tokens_U: Tensor, byte_end_U: Tensor, table: TokenizerTable, where: str
) -> list[bytes]:
    """The text of each token; b"" for control tokens that stand outside the text."""
    sizes = torch.diff(byte_end_U, prepend=byte_end_U.new_zeros(1)).tolist()
    pieces: list[bytes] = []
    for number, size in zip(tokens_U.tolist(), sizes, strict=True):
        piece = (table.tokens[number] or b"") if size else b""
        if len(piece) != size:
            raise AlignmentError(
                "tokenizer-mismatch",
                "a token covers other bytes of the text than its own: the teacher's tokenizer "
                "rewrites text, which cannot be recovered from its tokens",
                where=where,
                got=f"{size} bytes for id {number}",
                expected=f"{len(piece)} bytes, {piece!r}",
                hint="encode the corpus itself with the student's tokenizer",
            )
        pieces.append(piece)
    return pieces


@dataclass(frozen=True)
class _Own:
    """A sample in the student's tokens, each int64 [T]; `counts` is 0 or 1."""

    tokens: Ints
    byte_end: Ints
    segment_ids: Ints
    position_ids: Ints
    labels: Ints
    counts: Ints


@dataclass(frozen=True)
class _Sample:
    """A sample's text, segment by segment, and which of its bytes count."""

    texts: list[bytes]
    begins_without_text: list[bool]
    segment_ids: list[int]
    counted_bytes: NDArray[np.bool_]

    @classmethod
    def of(cls, pieces: list[bytes], segments_U: Ints, counts_U: NDArray[np.bool_]) -> _Sample:
        starts = np.flatnonzero(np.diff(segments_U, prepend=-2)).tolist()
        texts = [
            b"".join(pieces[start:stop])
            for start, stop in zip(starts, [*starts[1:], len(pieces)], strict=True)
        ]
        # Row u counts for the bytes of token u + 1.
        predicted_U = np.append(False, counts_U[:-1])
        sizes = [len(piece) for piece in pieces]
        return cls(
            texts,
            [not pieces[start] for start in starts],
            segments_U[starts].tolist(),
            np.repeat(predicted_U, sizes),
        )

    def encoded(self, tokenizer: StudentTokenizer, block_diagonal: bool) -> _Own:
        tokens, ends, segments = [], [], []
        start = 0
        for text, bos, segment in zip(
            self.texts, self.begins_without_text, self.segment_ids, strict=True
        ):
            skipped, whole = _whole_characters(text)
            encoded: _Encoded = tokenizer.encode(whole)
            ids, byte_ends = encoded.ids, encoded.byte_ends + start + skipped
            if bos and tokenizer.bos_id is not None:
                ids, byte_ends = np.append(tokenizer.bos_id, ids), np.append(start, byte_ends)
            tokens.append(ids)
            ends.append(byte_ends)
            segments.append(np.full(len(ids), segment))
            start += len(text)
        tokens_T, end_T, segments_T = (
            np.concatenate(x).astype(np.int64) for x in (tokens, ends, segments)
        )
        index_T = np.arange(len(tokens_T))
        first_T = np.diff(segments_T, prepend=-2) != 0
        labels_T = np.full(len(tokens_T), IGNORE, np.int64)
        labels_T[:-1][~first_T[1:]] = tokens_T[1:][~first_T[1:]]
        # A token counts when all its bytes do.
        skipped_before = np.append(0, np.cumsum(~self.counted_bytes))
        skipped_T = skipped_before[end_T]
        counts_T = labels_T != IGNORE
        counts_T[:-1] &= skipped_T[1:] == skipped_T[:-1]
        begin_T = np.maximum.accumulate(np.where(first_T, index_T, 0))
        return _Own(
            tokens_T,
            end_T,
            segments_T,
            index_T - begin_T if block_diagonal else index_T,
            labels_T,
            counts_T.astype(np.int64),
        )


def _whole_characters(text: bytes) -> tuple[int, str]:
    """How many bytes at the beginning belong to a character cut off, and the whole ones after
    them."""
    skipped = 0
    while skipped < min(len(text), 3) and text[skipped] & 0xC0 == 0x80:
        skipped += 1
    return skipped, text[skipped:].decode("utf-8", "ignore")
