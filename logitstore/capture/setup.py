"""What every capture does before and around its shards, whatever its samples are.

A task (packed text for language models, single examples for classifiers) brings corpus, teacher and
header, and looks at them once: `look`. Everything else is here.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitstore.capture.local import Job, run_local
from logitstore.capture.pilot import Pilot
from logitstore.capture.planning import make_plan
from logitstore.capture.progress import ProgressMeter
from logitstore.capture.settings import CaptureSettings
from logitstore.capture.worker import Source, Work, capture_shards
from logitstore.containers.ranked import IdRanks, uses_ranks
from logitstore.corpora import Example, Sample, Unit
from logitstore.spec.errors import CommitError, NotFoundError, StorageError
from logitstore.spec.header import Header
from logitstore.spec.id_ranks import RANKS_TABLE
from logitstore.spec.plan import CorpusInfo, Plan, ShardPlan
from logitstore.store import Store, StoreWriter, append, create, parse_location
from logitstore.store import open as open_store
from logitstore.teachers import Classifier, Teacher, TeacherOptions

__all__ = ["Look", "Note", "Setup", "Slice"]

Note = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """What one look at corpus and teacher found.

    Attributes:
        info: the corpus.
        tokens: to be captured, counted or estimated; for classification, samples.
        exact: whether they were counted.
        pilot: the real thing over a few of them.
        units: the corpus in the units that become shards.
    """

    info: CorpusInfo
    tokens: int
    exact: bool
    pilot: Pilot
    units: Sequence[Unit]


@dataclass(frozen=True)
class Slice:
    """A sample of a capture's work, for measurements that write nothing.

    Attributes:
        teacher: loaded.
        samples: evenly spaced windows, or examples.
        documents, tokens: of the whole capture; tokens are samples, for classification.
        exact_tokens: whether the tokens were counted, not estimated.
        header_of: the header that a capture with another signal would have.
    """

    teacher: Teacher | Classifier
    samples: Sequence[Sample | Example]
    documents: int
    tokens: int
    exact_tokens: bool
    header_of: Callable[[str], Header]


class Setup(ABC):
    """Corpus, teacher and header of a capture.

    Attributes:
        present: header of the store, if it was begun; `plan` is its plan, if it has one.
        corpus, teacher, header, tables: set by the task.
    """

    pilot_tokens = 1024
    dry_run_tokens = 4096
    noun = "tokens"

    corpus: Source
    teacher: Any
    header: Header
    tables: Mapping[str, bytes]

    def __init__(self, settings: CaptureSettings, note: Note) -> None:
        self._settings = settings
        self._note = note
        self.present, self.plan = _present(settings.out)
        self.options = TeacherOptions(
            dtype=settings.dtype,
            device=settings.device,
            threads=_threads(settings, self.present),
        )

    @abstractmethod
    def look(self, pilot_tokens: int) -> Look:
        """Read the corpus once, size it, run the teacher over `pilot_tokens` of it.

        Raises: what is wrong with corpus or teacher, before anything is written.
        """

    def open_writer(self) -> StoreWriter | None:
        """Create the store, or join one of the same configuration; None when it is sealed.

        Raises: CommitError configuration-changed.
        """
        try:
            return create(self._settings.out, self.header, self.tables)
        except CommitError as error:
            if error.kind == "store-sealed" and self.plan is not None:
                return None
            raise

    def begin(self, writer: StoreWriter | None) -> tuple[StoreWriter | None, Plan, float]:
        """Everything before the first shard: pilot, checks, store, plan."""
        look = self.look(self.pilot_tokens)
        self._check_space(look)
        if uses_ranks(self.header):
            order = IdRanks.by_frequency(look.pilot.id_counts)
            self.tables = {**self.tables, RANKS_TABLE: order.encode()}
            if writer is not None:
                # A store that was begun and has no plan: its table may be missing still.
                writer.close()
                writer = None
        writer = writer or create(self._settings.out, self.header, self.tables)
        plan = writer.add_plan(make_plan(writer.header, look.info, iter(look.units)))
        self._note(
            f"{look.info.documents} documents, {'' if look.exact else 'about '}"
            f"{look.tokens} {self.noun}, {len(plan.shards)} shards"
        )
        return writer, plan, look.tokens

    def check_corpus(self, plan: Plan) -> None:
        """Refuse files that are not those of the plan.

        Raises: CorpusError corpus-changed.
        """
        assert plan.corpus is not None
        self.corpus.check_unchanged(plan.corpus, self.corpus.describe(plan.corpus.documents))

    def run(
        self,
        writer: StoreWriter,
        plan: Plan,
        todo: Sequence[ShardPlan],
        meter: ProgressMeter,
    ) -> None:
        """Capture shards here or in worker processes."""
        settings = self._settings
        workers = settings.workers
        if workers > 1 and writer.commit_mode == "single-writer":
            self._note("the storage ignores conditional writes: one process captures")
            workers = 1
        if workers == 1:
            work = Work(writer, plan, self.corpus, self.teacher, settings.micro_batch)
            capture_shards(work, todo, meter.add)
            return
        del self.teacher
        job = Job(
            location=str(writer.location),
            task=settings.task,
            teacher=settings.teacher,
            options=self.options,
            corpus=self.corpus,
            plan=plan,
            micro_batch=settings.micro_batch,
        )
        run_local(job, todo, workers, meter.add)

    def _check_space(self, look: Look) -> None:
        location = parse_location(self._settings.out)
        if location.kind != "local":
            return
        folder = next(p for p in (location.path, *location.path.parents) if p.is_dir())
        free_bytes = shutil.disk_usage(folder).free
        pilot = look.pilot
        need_bytes = round(look.tokens * pilot.bytes_per_token + pilot.shard_bytes)
        if need_bytes > free_bytes:
            one = self.noun.removesuffix("s")
            raise StorageError(
                "disk-full",
                "the store would not fit on this disk",
                where=folder,
                got=f"{free_bytes:,} bytes free",
                expected=f"about {need_bytes:,} bytes ({pilot.bytes_per_token:.0f} per {one})",
                hint=f"free space, choose another disk, a smaller signal, or --max-{self.noun}",
            )


def _present(location: str) -> tuple[Header | None, Plan | None]:
    """Header and corpus plan of the store at that place, if there is one; reads no commits."""
    found: StoreWriter | Store
    if not location:
        return None, None
    try:
        found = append(location)
    except NotFoundError:
        return None, None
    except CommitError as error:
        if error.kind != "store-sealed":
            raise
        found = open_store(location)
    with found:
        plans = (plan for plan in found.plans() if plan.kind == "corpus")
        return found.header, next(plans, None)


def _threads(settings: CaptureSettings, present: Header | None) -> int:
    """As asked; as the store was begun with; or an equal share of the cores."""
    if settings.threads_per_worker is not None:
        return settings.threads_per_worker
    if present is not None and present.teacher.threads_per_worker is not None:
        return present.teacher.threads_per_worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // settings.workers)
