"""The batch job: teacher x corpus -> store. Run again, it continues.

1. Load corpus and teacher, derive the configuration. 2. First time: read the whole corpus once, run
a pilot, refuse what cannot work, create store and plan. Later: compare configuration and corpus
with what the store was begun with. 3. Capture the shards of the plan that have no commit yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logitstore.capture.classification import ClassificationSetup
from logitstore.capture.pilot import check_bos, run_pilot, spread
from logitstore.capture.planning import Scan, Sizing, scan_corpus, shard_tokens_for
from logitstore.capture.progress import Progress, ProgressMeter
from logitstore.capture.settings import CaptureSettings
from logitstore.capture.setup import Look, Note, Setup, Slice
from logitstore.corpora import Corpus, Document, find_files, pack
from logitstore.record import aux_fields
from logitstore.record.new_header import new_header
from logitstore.spec.commit import Quarantined
from logitstore.spec.errors import PartialError, UsageError
from logitstore.spec.header import Header, Packing, TokenizerInfo
from logitstore.spec.plan import Plan
from logitstore.spec.signals import parse_signal
from logitstore.spec.tokenizer_table import TOKENIZER_TABLE
from logitstore.store import parse_location
from logitstore.teachers import Teacher, load_teacher

__all__ = ["CaptureResult", "Estimate", "Slice", "estimate", "precompute", "slice_of"]

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """What a run did. Tokens are samples, for classification.

    Attributes:
        store: where.
        shards, tokens, stored_bytes: captured by this run.
        skipped_shards: committed before.
        seconds: of capturing, without loading and planning.
        notes: such as a halved micro-batch.
    """

    store: str
    shards: int
    skipped_shards: int
    tokens: int
    stored_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a capture would be, from a pilot. Tokens are samples, for classification.

    Attributes:
        documents, tokens, shards: of the plan; tokens are counted or estimated from a sample.
        exact_tokens: whether they were counted.
        bytes_per_token, stored_bytes: of shard objects.
        tokens_per_s: of one worker.
        hours: of all workers, if they do not slow each other down.
        nll: mean -log p of the pilot's labels, nats; None where the store keeps none.
        pilot_tokens: how many tokens all this is from.
    """

    documents: int
    tokens: int
    exact_tokens: bool
    shards: int
    bytes_per_token: float
    stored_bytes: int
    tokens_per_s: float
    hours: float
    nll: float | None
    pilot_tokens: int


def precompute(
    settings: CaptureSettings,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Note = lambda text: None,
) -> CaptureResult:
    """Capture a teacher over a corpus into a store, or continue doing so.

    Args:
        on_progress: called a few times a second.
        on_note: told in words what happens.

    Raises: UsageError, NotFoundError, CorpusError, TeacherError, CommitError, StorageError before
    anything is captured; CaptureError; PartialError capture-partial at the end when samples were
    quarantined (everything else is committed).
    """
    setup = _setup(settings, on_note)
    writer = None
    if setup.present is not None:
        # Refuses another configuration before anything slow happens.
        writer = setup.open_writer()
    plan, tokens_total = setup.plan, None
    if plan is None:
        writer, plan, tokens_total = setup.begin(writer)
    else:
        setup.check_corpus(plan)
    if writer is None:
        return _nothing_to_do(settings, plan)
    with writer:
        committed = writer.committed()
        todo = [s for s in plan.shards if s.shard not in committed]
        skipped = len(plan.shards) - len(todo)
        if skipped:
            on_note(f"{skipped} of {len(plan.shards)} shards are committed already: skipped")
        if not todo:
            return _nothing_to_do(settings, plan)
        meter = ProgressMeter(
            todo,
            tokens_total=None if skipped else tokens_total,
            on_progress=on_progress,
        )
        start_s = time.monotonic()
        setup.run(writer, plan, todo, meter)
        seconds = time.monotonic() - start_s
        meter.show()
        result = CaptureResult(
            store=str(writer.location),
            shards=meter.shards,
            skipped_shards=skipped,
            tokens=meter.tokens,
            stored_bytes=meter.stored_bytes,
            seconds=seconds,
            notes=tuple(dict.fromkeys(meter.notes)),
        )
    if meter.quarantined:
        raise _partial(result, meter.quarantined)
    return result


def estimate(settings: CaptureSettings, *, on_note: Note = lambda text: None) -> Estimate:
    """What `precompute` would do, from a pilot of about 4,096 tokens; writes nothing.

    Raises: as `precompute` before anything is captured.
    """
    setup = _setup(settings, on_note)
    look = setup.look(setup.dry_run_tokens)
    pilot = look.pilot
    stored_bytes = round(look.tokens * pilot.bytes_per_token + len(look.units) * pilot.shard_bytes)
    seconds = look.tokens * pilot.seconds_per_token
    return Estimate(
        documents=look.info.documents,
        tokens=look.tokens,
        exact_tokens=look.exact,
        shards=len(look.units),
        bytes_per_token=stored_bytes / look.tokens,
        stored_bytes=stored_bytes,
        tokens_per_s=1 / pilot.seconds_per_token,
        hours=seconds / 3600 / min(settings.workers, len(look.units)),
        nll=None if math.isnan(pilot.nll) else pilot.nll,
        pilot_tokens=pilot.tokens,
    )


def slice_of(settings: CaptureSettings, tokens: int, *, on_note: Note = lambda text: None) -> Slice:
    """About `tokens` tokens of the corpus as samples, and the teacher, without running it.

    Raises: as `precompute` before anything is captured.
    """
    if settings.task == "classification":
        return ClassificationSetup(settings, on_note).slice(tokens)
    setup = _TextSetup(settings, on_note)
    teacher = setup.teacher
    scan, sizing, documents, bos = setup.read_corpus()
    samples = list(pack(documents, teacher.tokenizer, seq_len=settings.seq_len, bos=bos))

    def header_of(signal: str) -> Header:
        return header_for(replace(settings, signal=signal), parse_signal(signal), teacher)[0]

    return Slice(
        teacher=teacher,
        samples=spread(samples, tokens),
        documents=scan.info.documents,
        tokens=sizing.tokens_total,
        exact_tokens=sizing.exact,
        header_of=header_of,
    )


def _setup(settings: CaptureSettings, note: Note) -> Setup:
    if settings.task == "classification":
        return ClassificationSetup(settings, note)
    return _TextSetup(settings, note)


class _TextSetup(Setup):
    """A language model over packed text."""

    corpus: Corpus
    teacher: Teacher

    def __init__(self, settings: CaptureSettings, note: Note) -> None:
        signal = parse_signal(settings.signal)
        self.corpus = Corpus(
            find_files(settings.corpus),
            text_key=settings.text_key,
            document_separator=settings.document_separator,
        )
        super().__init__(settings, note)
        self.teacher = load_teacher(settings.teacher, self.options)
        self.header, self.tables = header_for(settings, signal, self.teacher)
        if settings.rank_ids:
            self.pilot_tokens = self.dry_run_tokens

    def read_corpus(self) -> tuple[Scan, Sizing, list[Document], bool]:
        """Read the whole corpus once and size it; some of its documents; whether BOS is put."""
        assert self.header.tokenizer is not None
        bos = self.header.tokenizer.bos == "document"
        self._note(f"reading {len(self.corpus.files)} corpus files")
        scan = scan_corpus(self.corpus)
        limit = self._settings.max_tokens
        sizing = Sizing(self.corpus, scan, self.teacher.tokenizer, bos=bos, max_tokens=limit)
        return scan, sizing, list(sizing.sample(_PROBE_BYTES)), bos

    def look(self, pilot_tokens: int) -> Look:
        """Read the corpus, size it, run the pilot and check the BOS choice."""
        settings, header, teacher = self._settings, self.header, self.teacher
        scan, sizing, documents, bos = self.read_corpus()
        samples = list(pack(documents, teacher.tokenizer, seq_len=settings.seq_len, bos=bos))
        chosen = spread(samples, pilot_tokens)
        self._note(f"running the teacher over {sum(len(s) for s in chosen)} tokens")
        pilot = run_pilot(teacher, header, chosen, settings.micro_batch)
        if settings.check_bos and settings.bos == "auto" and teacher.tokenizer.bos_id is not None:
            tokens = min(pilot_tokens, self.pilot_tokens)
            check_bos(teacher, header, documents, settings.micro_batch, tokens, pilot)
        unit_tokens = settings.shard_tokens or shard_tokens_for(
            sizing.tokens_total, pilot.seconds_per_token, settings.workers
        )
        units = tuple(sizing.units(unit_tokens, settings.max_tokens))
        longest = max(unit.tokens for unit in units)
        if longest > 2 * unit_tokens:
            self._note(
                f"one document alone makes a shard of {longest:,.0f} tokens (others have "
                f"{unit_tokens:,}): what it holds is kept only when all of it is done; "
                "--document-separator splits text files"
            )
        return Look(scan.info, sizing.tokens_total, sizing.exact, pilot, units)


def header_for(
    settings: CaptureSettings, signal: Any, teacher: Teacher
) -> tuple[Header, Mapping[str, bytes]]:
    """The header of a capture and the store's tables.

    Raises: UsageError bad-argument, unknown-aux, k-exceeds-vocabulary.
    """
    tokenizer = teacher.tokenizer
    aux = aux_fields(signal, teacher.vocab_size, settings.aux, sample_kind="sequence")
    info = teacher.describe()
    bos = settings.bos
    if bos == "auto":
        bos = "document" if tokenizer.adds_bos else "none"
    if bos == "document" and tokenizer.bos_id is None:
        raise UsageError(
            "bad-argument",
            "this tokenizer has no BOS token",
            where="--bos",
            got=settings.bos,
            expected="none",
        )
    table = tokenizer.table.encode()
    tokenizer_info = TokenizerInfo(
        name=tokenizer.name,
        fingerprint=tokenizer.table.fingerprint,
        size=len(tokenizer.table),
        bos=bos,
        bos_id=tokenizer.bos_id,
        table=TOKENIZER_TABLE,
        special_ids=tuple(sorted(tokenizer.table.special)),
    )
    configuration = {
        **settings.configuration(),
        "signal": str(signal),
        "aux": list(aux),
        "vocab_size": teacher.vocab_size,
        # Not the name: a model is its content, wherever its folder is.
        "teacher": {
            **info.model_dump(mode="json", exclude={"name"}, exclude_none=True),
            **teacher.settings,
        },
        "tokenizer": {"fingerprint": tokenizer_info.fingerprint, "bos": bos},
    }
    header = new_header(
        signal,
        vocab_size=teacher.vocab_size,
        configuration=configuration,
        teacher=info,
        container=settings.container,
        aux=aux,
        lse_at=settings.lse_at,
        always_ids=settings.always_ids,
        rank_ids=settings.rank_ids,
        chunk_positions=settings.chunk_capacity,
        seed=settings.seed,
        tokenizer=tokenizer_info,
        packing=Packing(
            seq_len=settings.seq_len,
            document_separator=settings.document_separator,
            text_key=settings.text_key,
        ),
    )
    return header, {TOKENIZER_TABLE: table}


def _nothing_to_do(settings: CaptureSettings, plan: Plan) -> CaptureResult:
    return CaptureResult(
        store=str(parse_location(settings.out)),
        shards=0,
        skipped_shards=len(plan.shards),
        tokens=0,
        stored_bytes=0,
        seconds=0.0,
    )


def _partial(result: CaptureResult, quarantined: Sequence[Quarantined]) -> PartialError:
    listed = [f"{q.sample_key}: {q.reason}" for q in quarantined]
    more = f"\n    and {len(listed) - 20} more" if len(listed) > 20 else ""
    return PartialError(
        "capture-partial",
        f"{len(listed)} samples could not be captured, the rest is committed:\n    "
        + "\n    ".join(listed[:20])
        + more,
        where=result.store,
        got=f"{result.tokens} tokens in {result.shards} shards",
        hint="the commits list them; a store without them is whole and can be trained from",
        data={
            "quarantined": [q.model_dump(mode="json") for q in quarantined],
            "tokens": result.tokens,
        },
    )
