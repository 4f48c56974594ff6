"""What a classification store's samples were made from: a store keeps targets, not inputs.

The user names the corpus again; files and views are those of the capture, or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logitstore.corpora import (
    ArrayFiles,
    Classes,
    Example,
    TextExamples,
    array_format,
    describe_files,
    find_files,
)
from logitstore.corpora.files import SourceFile
from logitstore.data import replay
from logitstore.record import Record
from logitstore.record.sequences import IGNORE, labels
from logitstore.record.views import views_of
from logitstore.spec.errors import CorpusError, NotFoundError, UsageError
from logitstore.store import Store

__all__ = ["examples_of"]


def examples_of(store: Store, records: Sequence[Record], corpus: Sequence[str]) -> list[Example]:
    """The examples that the samples of some records were made from, one a sample.

    Args:
        corpus: files or patterns, those of the capture.

    Raises: UsageError bad-argument without a corpus, and for pushed stores; NotFoundError
    file-not-found, sample-out-of-range; CorpusError corpus-changed for other files.
    """
    settings: Any = store.header.configuration.get("inputs")
    if not isinstance(settings, dict):
        raise UsageError(
            "bad-argument",
            "its samples were not captured from a corpus, so that there is nothing to run again",
            where=store.location,
            expected="a store that `logitstore precompute --task classification` made",
        )
    if not corpus:
        raise UsageError(
            "bad-argument",
            "a classification store keeps no inputs: name the corpus it was captured from",
            where="--corpus",
            expected=", ".join(_planned(store)),
        )
    files = find_files(corpus)
    _check_unchanged(store, files)
    keys = [record.sample_keys()[0] for record in records]
    given = [int(labels(record)[0]) for record in records]
    known = [None if label == IGNORE else label for label in given]
    if array_format(files) is None:
        inputs: Sequence[Any] = _texts(store, files, settings, keys)
    else:
        arrays = ArrayFiles(files, settings.get("input_key") or "inputs")
        seen = [
            replay(arrays, [key], views_of(record, store.header.images))[0]
            for key, record in zip(keys, records, strict=True)
        ]
        inputs = seen
    return [Example(*each) for each in zip(keys, inputs, known, strict=True)]


def _texts(
    store: Store, files: Sequence[SourceFile], settings: dict[str, Any], keys: Sequence[str]
) -> list[str]:
    rows = TextExamples(
        files,
        classes=Classes(store.header.vocab_size),
        text_key=settings.get("text_key"),
        document_separator=settings.get("document_separator"),
    )
    wanted = set(keys)
    found = {e.key: str(e.input) for e in rows.examples() if e.key in wanted}
    missing = [key for key in keys if key not in found]
    if missing:
        raise NotFoundError(
            "sample-out-of-range",
            "no such row in these files",
            got=missing[0],
            expected=", ".join(f.name for f in files[:4]),
        )
    return [found[key] for key in keys]


def _planned(store: Store) -> dict[str, str]:
    """Name and SHA-256 of the files that inputs came from."""
    return {
        file.name: file.sha256
        for plan in store.plans()
        if plan.corpus is not None
        for file in plan.corpus.files
        if not file.name.startswith("labels:")
    }


def _check_unchanged(store: Store, files: Sequence[SourceFile]) -> None:
    planned = _planned(store)
    kind = array_format(files)
    given = {file.name: file.sha256 for file in describe_files(files, 0, kind).files}
    if given == planned:
        return
    changes = [f"{name}: not named" for name in planned if name not in given]
    changes += [f"{name}: not in the plan" for name in given if name not in planned]
    changes += [
        f"{name}: content changed"
        for name in given
        if given[name] != planned.get(name, given[name])
    ]
    raise CorpusError(
        "corpus-changed",
        "the corpus is not the one this store was captured from",
        where="--corpus",
        got="; ".join(changes[:8]),
        expected=", ".join(planned),
    )
