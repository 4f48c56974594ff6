"""From a corpus to a plan: one pass checks and samples every document, one groups them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from logitstore.corpora import Corpus, Document, Tokenizer, Unit, plan_units
from logitstore.record.new_header import now
from logitstore.record.random import bits
from logitstore.spec.errors import CorpusError
from logitstore.spec.header import Header
from logitstore.spec.plan import CorpusInfo, Plan, ShardPlan, Span, plan_fingerprint, shard_name

__all__ = ["Scan", "Sizing", "make_plan", "scan_corpus", "shard_tokens_for"]

# Up to so much text every document is tokenised for the plan; beyond, so much of a random choice.
_EXACT_BYTES = 2 << 20
_SAMPLED_DOCUMENTS = 512

# The default shard: about two minutes of one worker's time, so that a crash costs little.
_SHARD_S = 120.0
_SHARDS_PER_WORKER = 4


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus found.

    Attributes:
        info: files and their digests, number of documents with text.
        text_bytes: UTF-8 bytes of all text.
        chosen: places of a random choice of documents, in random order.
    """

    info: CorpusInfo
    text_bytes: int
    chosen: tuple[Span, ...]


def scan_corpus(corpus: Corpus) -> Scan:
    """Read every document once.

    Raises: CorpusError corpus-empty and what `Corpus.documents` raises.
    """
    documents = text_bytes = 0
    chosen: list[tuple[int, int, Span]] = []
    for document in corpus.documents():
        if document.is_blank:
            continue
        text_bytes += len(document.text.encode())
        span = Span(
            file=document.file,
            first_document=document.number,
            documents=1,
            offset=document.offset,
            bytes=document.size_bytes,
        )
        # A heap of the lowest random numbers: a fixed-size random choice in one pass.
        item = (-int(bits(0, 0, documents, 0)), documents, span)
        if len(chosen) < _SAMPLED_DOCUMENTS:
            heapq.heappush(chosen, item)
        else:
            heapq.heappushpop(chosen, item)
        documents += 1
    if not documents:
        raise CorpusError(
            "corpus-empty",
            "the corpus holds no document with text",
            where=", ".join(str(f.path) for f in corpus.files[:4]),
            got=f"{len(corpus.files)} files, {sum(f.size_bytes for f in corpus.files)} bytes",
            expected="at least one document that is not blank",
        )
    places = tuple(span for _, _, span in sorted(chosen, reverse=True))
    return Scan(corpus.describe(documents), text_bytes, places)


class Sizing:
    """Tokens of a corpus: counted where that is cheap or exactness is asked for, else estimated.

    Attributes:
        exact: whether `tokens_of` counts.
        tokens_total: of the part to be captured.
    """

    def __init__(
        self,
        corpus: Corpus,
        scan: Scan,
        tokenizer: Tokenizer,
        *,
        bos: bool,
        max_tokens: int | None,
    ) -> None:
        self._corpus = corpus
        self._scan = scan
        self._tokenizer = tokenizer
        self._bos = int(bos)
        self.exact = max_tokens is not None or scan.text_bytes <= _EXACT_BYTES
        if not self.exact:
            sample = list(self.sample(_EXACT_BYTES))
            tokens = sum(self._count(d) - self._bos for d in sample)
            self._ratio = tokens / sum(len(d.text.encode()) for d in sample)
        units = self.units(float("inf"), max_tokens)
        self.tokens_total = round(sum(unit.tokens for unit in units))

    def tokens_of(self, document: Document) -> float:
        """Tokens of a document, BOS included."""
        if self.exact:
            return self._count(document)
        return len(document.text.encode()) * self._ratio + self._bos

    def units(self, unit_tokens: float, max_tokens: int | None) -> Iterator[Unit]:
        """The corpus in units of about `unit_tokens`."""
        return plan_units(
            self._corpus.documents(),
            unit_tokens=unit_tokens,
            tokens_of=self.tokens_of,
            max_tokens=max_tokens,
        )

    def sample(self, limit_bytes: int) -> Iterator[Document]:
        """Documents of the random choice, until they hold `limit_bytes` of text."""
        read = 0
        for span in self._scan.chosen:
            for document in self._corpus.span(span):
                yield document
                read += len(document.text.encode())
            if read >= limit_bytes:
                return

    def _count(self, document: Document) -> int:
        ids = self._tokenizer.encode(document.text).ids
        return len(ids) + self._bos if len(ids) else 0


def shard_tokens_for(tokens_total: int, seconds_per_token: float, workers: int) -> int:
    """Default size of a shard in tokens.

    About two minutes of the teacher's time, but small enough that every worker gets a few.
    """
    by_time = _SHARD_S / max(seconds_per_token, 1e-9)
    by_share = tokens_total / (workers * _SHARDS_PER_WORKER) if workers > 1 else by_time
    return max(1, round(min(by_time, by_share)))


def make_plan(
    header: Header,
    info: CorpusInfo,
    units: Iterator[Unit],
    *,
    on_unit: Callable[[Unit], None] | None = None,
) -> Plan:
    """The plan of a corpus capture."""
    shards = []
    for index, unit in enumerate(units):
        if on_unit is not None:
            on_unit(unit)
        shards.append(
            ShardPlan(shard=shard_name(1, index), spans=unit.spans, max_tokens=unit.max_tokens)
        )
    return Plan(
        store_uuid=header.store_uuid,
        number=1,
        kind="corpus",
        created=now(),
        configuration_sha256=header.configuration_sha256,
        corpus=info,
        shards=tuple(shards),
        fingerprint=plan_fingerprint(header.configuration_sha256, 1, info, tuple(shards)),
    )
