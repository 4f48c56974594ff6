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

from logitstore.corpora.files import CorpusFormat, SourceFile, format_of
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
    """

    file: int
    number: int
    key: str
    text: str
    offset: int | None = None
    size_bytes: int | None = None

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space."""
        return not self.text or self.text.isspace()


class Corpus:
    """Files read as documents.

    Args:
        files: as `find_files` gave them.
        text_key: field of a JSONL or Parquet row with the text; None means "text".
        document_separator: splits a text file into documents; None: one file, one document.

    Raises: UsageError bad-argument for an option that the format does not have.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        *,
        text_key: str | None = None,
        document_separator: str | None = None,
    ) -> None:
        self.files = tuple(files)
        self.format: CorpusFormat = format_of(files)
        if self.format == "text" and text_key is not None:
            raise _useless("--text-key", text_key, "text files have no fields")
        if self.format != "text" and document_separator is not None:
            raise _useless("--document-separator", repr(document_separator), "a row is a document")
        if document_separator == "":
            raise _useless("--document-separator", "''", "the empty string separates nothing")
        self.text_key = None if self.format == "text" else text_key or "text"
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

    def check_unchanged(self, planned: CorpusInfo, found: CorpusInfo) -> None:
        """Refuse a corpus that is not the one the plan was made from, naming the files.

        Raises: CorpusError corpus-changed.
        """
        if planned.fingerprint == found.fingerprint:
            return
        before = {f.name: f.sha256 for f in planned.files}
        after = {f.name: f.sha256 for f in found.files}
        changes = [
            f"{name}: " + ("content changed" if name in after else "missing")
            for name, digest in before.items()
            if after.get(name) != digest
        ]
        changes += [f"{name}: not in the plan" for name in after if name not in before]
        changes = changes or ["the order of the files changed"]
        raise CorpusError(
            "corpus-changed",
            "the corpus is not the one this store's plan was made from",
            got="; ".join(changes[:8]) + (f" and {len(changes) - 8} more" if changes[8:] else ""),
            expected=f"{len(before)} files with fingerprint {planned.fingerprint[:12]}",
            hint="restore the files, or capture into another store",
            data={"changes": changes},
        )

    def _read(self, file: int, span: Span | None) -> Iterator[Document]:
        source = self.files[file]
        status = source.path.stat()
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
            raise CorpusError(
                "corpus-changed",
                "the file changed while the capture was running",
                where=source.path,
                hint="start the same command again; it compares the file with the plan",
            )
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
                text = ""
                if line.strip():
                    text = self._row_text(_decode(line, source, offset), source, number)
                yield Document(file, number, f"{source.name}#{number}", text, offset, len(line))
                offset += len(line)
                number += 1

    def _row_text(self, line: str, source: SourceFile, number: int) -> str:
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
        return self._checked(row.get(self.text_key), where, list(row))

    def _parquet(self, file: int, span: Span | None) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = self.files[file]
        try:
            with pq.ParquetFile(source.path) as table:
                names = table.schema_arrow.names
                if self.text_key not in names:
                    raise self._missing(f"{source.path}, row 0", names)
                first, groups = 0, list(range(table.num_row_groups))
                while span and groups:
                    rows = table.metadata.row_group(groups[0]).num_rows
                    if first + rows > span.first_document:
                        break
                    first += rows
                    groups.pop(0)
                number = first
                for batch in table.iter_batches(
                    batch_size=_PARQUET_ROWS, row_groups=groups, columns=[self.text_key]
                ):
                    for scalar in batch.column(0):
                        if span is None or number >= span.first_document:
                            where = f"{source.path}, row {number}"
                            text = self._checked(scalar.as_py(), where, names)
                            yield Document(file, number, f"{source.name}#{number}", text)
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

    def _checked(self, value: Any, where: str, names: list[str]) -> str:
        if value is None:
            raise self._missing(where, names)
        if not isinstance(value, str):
            raise CorpusError(
                "corpus-malformed",
                "the text is of another type",
                where=f"{where}, key {self.text_key!r}",
                got=type(value).__name__,
                expected="a string",
            )
        return value

    def _missing(self, where: str, names: list[str]) -> CorpusError:
        return CorpusError(
            "corpus-missing-key",
            f"no text under the key {self.text_key!r}",
            where=where,
            got="keys " + (", ".join(map(str, names[:12])) or "none"),
            expected=repr(self.text_key),
            hint="name the field that holds the text with --text-key",
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
