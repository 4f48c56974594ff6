"""Corpora of classifiers: one input and, if there are labels, one label a sample.

Rows of JSONL, Parquet and text files are read as the documents they are elsewhere; `arrays` reads
arrays. A sample is called after its place, "<file name>#<row>", so that a training loop finds its
input again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.corpora.documents import Corpus
from logitstore.corpora.files import SourceFile
from logitstore.record.views import Views
from logitstore.spec.errors import CorpusError
from logitstore.spec.plan import Span

__all__ = ["Classes", "Example", "TextExamples"]


@dataclass(frozen=True)
class Example:
    """One classification sample: it has one position.

    Attributes:
        key: "<file name>#<row>": stable, and unique in a store.
        input: an array without batch axis, or a text.
        label: id of its class; None in a corpus without labels.
        view: which view of its image the input is; None where there are no views.
        picture: a thumbnail to keep, uint8 [h, w, C], or None.
    """

    key: str
    input: NDArray[Any] | str
    label: int | None
    view: Views | None = None
    picture: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return 1

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [1]: the label, or -1."""
        return np.array([-1 if self.label is None else self.label], np.int64)


@dataclass(frozen=True)
class Classes:
    """The classes of a teacher, which labels of a corpus name by number or by name.

    Attributes:
        number: of classes.
        names: of all of them, or empty.
    """

    number: int
    names: tuple[str, ...] = ()

    def id_of(self, label: Any, where: str) -> int:
        """The class that a label means.

        Raises: CorpusError corpus-label.
        """
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < self.number:
            return label
        raise self.unknown(label, where)

    def unknown(self, label: Any, where: str) -> CorpusError:
        """The error for a label that names no class."""
        names = f", or one of {', '.join(self.names[:8])}" if self.names else ""
        return CorpusError(
            "corpus-label",
            "the label is no class of the teacher",
            where=where,
            got=repr(label),
            expected=f"a number from 0 to {self.number - 1}{names}",
            hint="labels and teacher must count classes alike",
        )


class TextExamples(Corpus):
    """Rows of text as examples.

    Args:
        files, text_key, document_separator: as for `Corpus`.
        label_key: field of a row with its label; None: the corpus has no labels.
        classes: of the teacher.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        *,
        classes: Classes,
        text_key: str | None = None,
        label_key: str | None = None,
        document_separator: str | None = None,
    ) -> None:
        super().__init__(
            files,
            text_key=text_key,
            label_key=label_key,
            document_separator=document_separator,
        )
        self._classes = classes

    @property
    def labelled(self) -> bool:
        """Whether examples have labels."""
        return self.label_key is not None

    def examples(self, span: Span | None = None) -> Iterator[Example]:
        """Examples of a span, or all; blank texts are left out.

        Raises: as `Corpus.documents`; CorpusError corpus-label.
        """
        for document in self.documents() if span is None else self.span(span):
            if document.is_blank:
                continue
            label = None
            if self.labelled:
                label = self._classes.id_of(document.label, document.key)
            yield Example(document.key, document.text, label)
