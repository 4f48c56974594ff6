"""A classifier over examples: one row of logits a sample, no tokens, labels where there are any."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from logitstore.capture.pilot import run_pilot
from logitstore.capture.planning import scan_corpus, shard_tokens_for
from logitstore.capture.settings import CaptureSettings
from logitstore.capture.setup import Look, Note, Setup, Slice
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
from logitstore.record.thumbnails import thumbnail_factor
from logitstore.spec.errors import CorpusError, UsageError
from logitstore.spec.header import Augmentation, Header, Images
from logitstore.spec.plan import CorpusInfo
from logitstore.spec.signals import parse_signal
from logitstore.teachers import Classifier, load_classifier

__all__ = ["ClassificationSetup", "classification_header"]


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
            _refuse(settings, "views", "the corpus holds rows of text")
            _refuse(settings, "keep_thumbnails", "the corpus holds rows of text")
            images = None
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
            images = images_of(settings, inputs)
            self.corpus = ArrayExamples(inputs, labels, classes=classes, images=images)
        self.header = classification_header(
            settings, signal, self.teacher, labelled=self.corpus.labelled, images=images
        )
        self.tables: dict[str, bytes] = {}

    def look(self, pilot_tokens: int) -> Look:
        settings = self._settings
        self._note(f"reading {len(self.corpus.files)} corpus files")
        info, total, chosen = self._read(pilot_tokens)
        self._note(f"running the teacher over {len(chosen)} samples")
        pilot = run_pilot(self.teacher, self.header, chosen, settings.micro_batch)
        if "thumbnail" in pilot.column_bytes:
            pictures = pilot.column_bytes["thumbnail"] / pilot.tokens
            self._note(
                f"thumbnails take {pictures:.1f} of {pilot.bytes_per_token:.1f} bytes a sample"
            )
        wanted = settings.shard_samples or shard_tokens_for(
            total, pilot.seconds_per_token, settings.workers
        )
        return Look(info, total, True, pilot, self._units(wanted))

    def slice(self, samples: int) -> Slice:
        """About `samples` of them, for measurements; the teacher does not run."""
        self._note(f"reading {len(self.corpus.files)} corpus files")
        info, total, chosen = self._read(samples)

        def header_of(signal: str) -> Header:
            return classification_header(
                replace(self._settings, signal=signal),
                parse_signal(signal),
                self.teacher,
                labelled=self.corpus.labelled,
                images=self.header.images,
            )

        return Slice(
            teacher=self.teacher,
            samples=chosen,
            documents=info.documents,
            tokens=total,
            exact_tokens=True,
            header_of=header_of,
        )

    def _read(self, pilot_samples: int) -> tuple[CorpusInfo, int, list[Example]]:
        """Check every row; the corpus, how many samples will be captured, and some of them."""
        limit = self._settings.max_samples
        corpus = self.corpus
        if isinstance(corpus, ArrayExamples):
            corpus.check()
            total = corpus.count(limit)
            return corpus.describe(corpus.rows), total, corpus.spread(pilot_samples, limit)
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


def images_of(settings: CaptureSettings, inputs: ArrayFiles) -> Images | None:
    """What a capture keeps of images; None when neither views nor thumbnails are asked for.

    Raises: CorpusError corpus-malformed for arrays that are no images; what reading them raises.
    """
    if settings.views is None and not settings.keep_thumbnails:
        return None
    array = inputs.array(0)
    shape = array.shape[1:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] > 4) or 0 in shape:
        channels_first = len(shape) == 3 and shape[0] <= 4
        raise CorpusError(
            "corpus-malformed",
            "views and thumbnails are of images, and these are none",
            where=inputs.files[0].path,
            got=f"samples of shape {shape}",
            expected="(height, width) or (height, width, channels), at most 4 channels",
            hint="move the channels to the end: array.transpose(0, 2, 3, 1)"
            if channels_first
            else None,
        )
    if settings.keep_thumbnails and array.dtype != np.uint8:
        raise CorpusError(
            "corpus-malformed",
            "thumbnails are kept of 8-bit images only",
            where=inputs.files[0].path,
            got=array.dtype,
            expected="uint8",
            hint="leave out --keep-thumbnails",
        )
    height, width = shape[:2]
    augmentation = None
    if settings.views is not None:
        augmentation = Augmentation(
            seed=settings.seed,
            views=settings.views,
            padding=settings.crop_padding,
            flip=settings.flip,
        )
    return Images(
        height=height,
        width=width,
        channels=shape[2] if len(shape) == 3 else None,
        thumbnail_factor=thumbnail_factor(height, width) if settings.keep_thumbnails else None,
        augmentation=augmentation,
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


def classification_header(
    settings: CaptureSettings,
    signal: Any,
    teacher: Classifier,
    *,
    labelled: bool,
    images: Images | None,
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
        images=images,
    )
