"""A classifier over examples: one row of logits a sample, no tokens, labels where there are any."""

from __future__ import annotations

from itertools import islice
from typing import Any

from logitstore.capture.pilot import run_pilot
from logitstore.capture.planning import scan_corpus, shard_tokens_for
from logitstore.capture.settings import CaptureSettings
from logitstore.capture.setup import Look, Note, Setup
from logitstore.corpora import (
    ArrayExamples,
    ArrayFiles,
    Example,
    TextExamples,
    Unit,
    array_format,
    find_files,
    plan_units,
)
from logitstore.record import aux_fields
from logitstore.record.new_header import new_header
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.spec.plan import CorpusInfo
from logitstore.spec.signals import parse_signal
from logitstore.teachers import Classifier, load_classifier

__all__ = ["ClassificationSetup"]


class ClassificationSetup(Setup):
    """Arrays or rows of text, and a classifier."""

    noun = "samples"

    corpus: ArrayExamples | TextExamples
    teacher: Classifier

    def __init__(self, settings: CaptureSettings, note: Note) -> None:
        signal = parse_signal(settings.signal)
        files = find_files(settings.corpus)
        super().__init__(settings, note)
        self.teacher = load_classifier(settings.teacher, self.options)
        classes = self.teacher.classes
        kind = array_format(files)
        if kind is None:
            _refuse(settings, "input_key", "the corpus holds rows of text")
            _refuse(settings, "labels", "the corpus holds rows of text: use --label-key")
            self.corpus = TextExamples(
                files,
                classes=classes,
                text_key=settings.text_key,
                label_key=settings.label_key,
                document_separator=settings.document_separator,
            )
        else:
            _refuse(settings, "text_key", "the corpus holds arrays")
            _refuse(settings, "document_separator", "the corpus holds arrays")
            if kind != "npz":
                _refuse(settings, "input_key", "the files hold one array each")
                _refuse(settings, "label_key", "the files hold one array each: use --labels")
            inputs = ArrayFiles(files, settings.input_key or "inputs")
            labels = None
            if settings.labels:
                labels = ArrayFiles(find_files(settings.labels), settings.label_key)
            elif settings.label_key is not None:
                labels = ArrayFiles(files, settings.label_key)
            self.corpus = ArrayExamples(inputs, labels, classes=classes)
        self.header = _header(settings, signal, self.teacher, labelled=self.corpus.labelled)
        self.tables: dict[str, bytes] = {}

    def look(self, pilot_tokens: int) -> Look:
        settings = self._settings
        self._note(f"reading {len(self.corpus.files)} corpus files")
        info, total, chosen = self._read(pilot_tokens)
        self._note(f"running the teacher over {len(chosen)} samples")
        pilot = run_pilot(self.teacher, self.header, chosen, settings.micro_batch)
        wanted = settings.shard_samples or shard_tokens_for(
            total, pilot.seconds_per_token, settings.workers
        )
        return Look(info, total, True, pilot, self._units(wanted))

    def _read(self, pilot_samples: int) -> tuple[CorpusInfo, int, list[Example]]:
        """Check every row; the corpus, how many samples will be captured, and some of them."""
        limit = self._settings.max_samples
        corpus = self.corpus
        if isinstance(corpus, ArrayExamples):
            corpus.check()
            total = min(corpus.count, limit or corpus.count)
            return corpus.describe(corpus.count), total, corpus.spread(pilot_samples, limit)
        scan = scan_corpus(corpus)
        count = sum(1 for _ in corpus.examples())  # looks at every label
        places = islice(scan.chosen, pilot_samples)
        chosen = [example for place in places for example in corpus.examples(place)]
        return scan.info, min(count, limit or count), chosen

    def _units(self, unit_samples: int) -> tuple[Unit, ...]:
        limit = self._settings.max_samples
        if isinstance(self.corpus, ArrayExamples):
            return tuple(self.corpus.units(unit_samples, limit))
        return tuple(
            plan_units(
                self.corpus.documents(),
                unit_tokens=unit_samples,
                tokens_of=lambda document: 1,
                max_tokens=limit,
            )
        )


def _refuse(settings: CaptureSettings, name: str, why: str) -> None:
    value = getattr(settings, name)
    if value:
        raise UsageError(
            "bad-argument",
            f"this option cannot be used here: {why}",
            where=f"--{name.replace('_', '-')}",
            got=value,
        )


def _header(
    settings: CaptureSettings, signal: Any, teacher: Classifier, *, labelled: bool
) -> Header:
    """The header of a capture.

    Raises: UsageError bad-argument, unknown-aux, unknown-signal, k-exceeds-vocabulary.
    """
    aux = aux_fields(
        signal,
        teacher.vocab_size,
        settings.aux,
        sample_kind="classification",
        labelled=labelled,
    )
    info = teacher.describe()
    configuration = {
        **settings.configuration(),
        "signal": str(signal),
        "aux": list(aux),
        "vocab_size": teacher.vocab_size,
        "classes": list(teacher.classes.names),
        # Not the name: a model is its content, wherever its folder is.
        "teacher": {
            **info.model_dump(mode="json", exclude={"name"}, exclude_none=True),
            **teacher.settings,
        },
    }
    return new_header(
        signal,
        vocab_size=teacher.vocab_size,
        configuration=configuration,
        teacher=info,
        container=settings.container,
        sample_kind="classification",
        aux=aux,
        lse_at=settings.lse_at,
        always_ids=settings.always_ids,
        labelled=labelled,
        chunk_positions=settings.chunk_capacity,
        seed=settings.seed,
    )
