"""Documents of text, JSONL and Parquet files, streamed: one document and one block in memory.

A text file is one document, or one per piece between separators; a JSONL line or a Parquet row is
one. Documents are numbered from 0 inside their file, blank ones included, so that a number is a
line or row number. Text is taken as it stands: strict UTF-8, newlines untouched, nothing stripped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from logitstore.corpora.files import (
    CorpusFormat,
    SourceFile,
    compare,
    describe_files,
    format_of,
)
from logitstore.spec.errors import CorpusError, UsageError
from logitstore.spec.plan import CorpusInfo, Span

__all__ = ["Corpus", "Document"]

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        file: index of its file in the corpus.
        number: its number inside the file, from 0.
        key: stable name, "<file name>#<number>".
        text: what is tokenised; blank when there is nothing to capture.
        offset, size_bytes: byte range in the file; None where the format has none.
        label: what stands under the corpus's `label_key`, if it has one.
    """

    file: int
    number: int
    key: str
    text: str
    offset: int | None = None
    size_bytes: int | None = None
    label: Any = None

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space."""
        return not self.text or self.text.isspace()


class Corpus:
    """Files read as documents.

    Args:
        files: as `find_files` gave them.
        text_key: field of a JSONL or Parquet row with the text; None means "text".
        label_key: field of a row with its label, for classifiers.
        document_separator: splits a text file into documents; None: one file, one document.

    Raises: UsageError bad-argument for an option that the format does not have.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        *,
        text_key: str | None = None,
        label_key: str | None = None,
        document_separator: str | None = None,
    ) -> None:
        self.files = tuple(files)
        self.format: CorpusFormat = format_of(files)
        for option, key in (("--text-key", text_key), ("--label-key", label_key)):
            if self.format == "text" and key is not None:
                raise _useless(option, key, "text files have no fields")
        if self.format != "text" and document_separator is not None:
            raise _useless("--document-separator", repr(document_separator), "a row is a document")
        if document_separator == "":
            raise _useless("--document-separator", "''", "the empty string separates nothing")
        self.text_key = None if self.format == "text" else text_key or "text"
        self.label_key = label_key
        self.document_separator = document_separator

    def documents(self) -> Iterator[Document]:
        """All documents in order.

        Raises: CorpusError corpus-not-utf8, corpus-malformed, corpus-missing-key, corpus-changed.
        """
        for number in range(len(self.files)):
            yield from self._read(number, None)

    def span(self, span: Span) -> Iterator[Document]:
        """The documents of one span, read from its place on.

        Raises: as `documents`.
        """
        yield from self._read(span.file, span)

    def describe(self, documents: int) -> CorpusInfo:
        """The files by content; reads each once. `documents`: how many hold text."""
        return describe_files(self.files, documents, self.format)

    def check_unchanged(self, planned: CorpusInfo, found: CorpusInfo) -> None:
        """Refuse a corpus that is not the one the plan was made from, naming the files.

        Raises: CorpusError corpus-changed.
        """
        compare(planned, found)

    def _read(self, file: int, span: Span | None) -> Iterator[Document]:
        self.files[file].check_unchanged()
        readers: dict[str, Callable[[int, Span | None], Iterator[Document]]] = {
            "text": self._text,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
        }
        for document in readers[self.format](file, span):
            if span is not None and document.number >= span.first_document + span.documents:
                return
            yield document

    def _text(self, file: int, span: Span | None) -> Iterator[Document]:
        source = self.files[file]
        with source.path.open("rb") as stream:
            first, offset = _seek(stream, span)
            if self.document_separator is None:
                pieces: Iterator[tuple[int, bytes]] = iter([(offset, stream.read())])
            else:
                pieces = _pieces(stream, self.document_separator.encode(), offset)
            for number, (start, piece) in enumerate(pieces, first):
                text = _decode(piece, source, start)
                yield Document(file, number, f"{source.name}#{number}", text, start, len(piece))

    def _jsonl(self, file: int, span: Span | None) -> Iterator[Document]:
        source = self.files[file]
        with source.path.open("rb") as stream:
            number, offset = _seek(stream, span)
            for line in stream:
                text, label = "", None
                if line.strip():
                    text, label = self._row(_decode(line, source, offset), source, number)
                key = f"{source.name}#{number}"
                yield Document(file, number, key, text, offset, len(line), label)
                offset += len(line)
                number += 1

    def _row(self, line: str, source: SourceFile, number: int) -> tuple[str, Any]:
        """Text and label of a JSONL row."""
        where = f"{source.path}, line {number + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                "corpus-malformed",
                f"the line is not JSON: {error}",
                where=where,
                got=repr(line[:80]),
                expected="one JSON object a line",
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                "corpus-malformed",
                "the line is JSON but no object",
                where=where,
                got=type(row).__name__,
                expected=f'an object such as {{"{self.text_key}": "..."}}',
            )
        return self._checked(row, where, list(row))

    def _parquet(self, file: int, span: Span | None) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = self.files[file]
        try:
            with pq.ParquetFile(source.path) as table:
                names = table.schema_arrow.names
                keys = [key for key in (self.text_key, self.label_key) if key is not None]
                for key in keys:
                    if key not in names:
                        raise self._missing(f"{source.path}, row 0", key, names)
                first, groups = 0, list(range(table.num_row_groups))
                while span and groups:
                    rows = table.metadata.row_group(groups[0]).num_rows
                    if first + rows > span.first_document:
                        break
                    first += rows
                    groups.pop(0)
                number = first
                for batch in table.iter_batches(
                    batch_size=_PARQUET_ROWS, row_groups=groups, columns=keys
                ):
                    for row in range(batch.num_rows):
                        if span is None or number >= span.first_document:
                            values = {key: batch[key][row].as_py() for key in keys}
                            where = f"{source.path}, row {number}"
                            text, label = self._checked(values, where, names)
                            key = f"{source.name}#{number}"
                            yield Document(file, number, key, text, label=label)
                        number += 1
        except UnicodeDecodeError as error:
            raise CorpusError(
                "corpus-not-utf8", f"text is not UTF-8: {error.reason}", where=source.path
            ) from None
        except pa.ArrowException as error:
            raise CorpusError(
                "corpus-malformed",
                f"not a readable Parquet file: {str(error).splitlines()[0]}",
                where=source.path,
            ) from None

    def _checked(self, row: dict[str, Any], where: str, names: list[str]) -> tuple[str, Any]:
        assert self.text_key is not None
        value = row.get(self.text_key)
        if value is None:
            raise self._missing(where, self.text_key, names)
        label = None if self.label_key is None else row.get(self.label_key)
        if self.label_key is not None and label is None:
            raise self._missing(where, self.label_key, names)
        if not isinstance(value, str):
            raise CorpusError(
                "corpus-malformed",
                "the text is of another type",
                where=f"{where}, key {self.text_key!r}",
                got=type(value).__name__,
                expected="a string",
            )
        return value, label

    def _missing(self, where: str, key: str, names: list[str]) -> CorpusError:
        what = "text" if key == self.text_key else "label"
        return CorpusError(
            "corpus-missing-key",
            f"no {what} under the key {key!r}",
            where=where,
            got="keys " + (", ".join(map(str, names[:12])) or "none"),
            expected=repr(key),
            hint=f"name the field that holds the {what} with --{what}-key",
        )


def _seek(stream: BinaryIO, span: Span | None) -> tuple[int, int]:
    """Move to a span's first byte; its first document's number and that offset."""
    if span is None or span.offset is None:
        return 0, 0
    stream.seek(span.offset)
    return span.first_document, span.offset


def _pieces(stream: BinaryIO, separator: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of what stands between separators; nothing after a final separator."""
    rest = b""
    while block := stream.read(_BLOCK_BYTES):
        *whole, rest = (rest + block).split(separator)
        for piece in whole:
            yield offset, piece
            offset += len(piece) + len(separator)
    if rest:
        yield offset, rest


def _decode(data: bytes, source: SourceFile, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 8]
        raise CorpusError(
            "corpus-not-utf8",
            f"text is not UTF-8: {error.reason}",
            where=f"{source.path}, byte {offset + error.start}",
            got=" ".join(f"{byte:02x}" for byte in bad),
            expected="UTF-8",
            hint="convert the file, for example: iconv -f ISO-8859-1 -t UTF-8 FILE",
        ) from None


def _useless(option: str, value: str, why: str) -> UsageError:
    return UsageError(
        "bad-argument", f"this option cannot be used here: {why}", where=option, got=value
    )
