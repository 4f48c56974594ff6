"""Plan units: consecutive whole documents of about a wanted number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from logitstore.corpora.documents import Document
from logitstore.spec.plan import Span

__all__ = ["Unit", "plan_units"]


@dataclass(frozen=True)
class Unit:
    """What one shard is made from.

    Attributes:
        spans: the documents.
        tokens: how many tokens they give, as estimated or counted by the caller.
        max_tokens: the unit ends after so many tokens; None: with its last document.
    """

    spans: tuple[Span, ...]
    tokens: float
    max_tokens: int | None = None


def plan_units(
    documents: Iterable[Document],
    *,
    unit_tokens: float,
    tokens_of: Callable[[Document], float],
    max_tokens: int | None = None,
) -> Iterator[Unit]:
    """Group documents; a unit is closed by the document that brings it to `unit_tokens`.

    Args:
        tokens_of: tokens of a document, BOS included; must be exact when `max_tokens` is given.
        max_tokens: stop after so many tokens, inside a document if need be.
    """
    runs: list[_Run] = []
    tokens = before = 0.0
    for document in documents:
        if not runs or runs[-1].file != document.file:
            runs.append(_Run(document))
        runs[-1].add(document)
        tokens += 0.0 if document.is_blank else tokens_of(document)
        if max_tokens is not None and before + tokens >= max_tokens:
            room = max_tokens - int(before)
            yield _unit(runs, room, room if tokens > room else None)
            return
        if tokens >= unit_tokens:
            yield _unit(runs, tokens, None)
            before, runs, tokens = before + tokens, [], 0.0
    if tokens > 0:
        yield _unit(runs, tokens, None)


class _Run:
    """A growing span."""

    def __init__(self, first: Document) -> None:
        self.file = first.file
        self.first = first.number
        self.offset = first.offset
        self.end = first.offset or 0
        self.documents = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        if document.offset is not None:
            self.end = document.offset + (document.size_bytes or 0)


def _unit(runs: list[_Run], tokens: float, max_tokens: int | None) -> Unit:
    spans = tuple(
        Span(
            file=run.file,
            first_document=run.first,
            documents=run.documents,
            offset=run.offset,
            bytes=None if run.offset is None else run.end - run.offset,
        )
        for run in runs
    )
    return Unit(spans, tokens, max_tokens)
