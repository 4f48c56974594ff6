"""How far a capture is: events from workers, summed up for people and schedulers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from logitstore.spec.commit import Quarantined
from logitstore.spec.plan import ShardPlan

__all__ = ["Event", "Progress", "ProgressMeter", "weight_of"]

_INTERVAL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a worker tells: tokens that were encoded, or a shard that was committed.

    Attributes:
        shard: name of the shard concerned.
        tokens: encoded since the last event.
        stored_bytes: size of the object; given exactly when the shard is committed by this worker.
        skipped: another worker had committed the shard first.
        retries: samples that had to be tried again.
        quarantined: samples given up.
        notes: what else a reader may want to know.
    """

    shard: str
    tokens: int = 0
    stored_bytes: int | None = None
    skipped: bool = False
    retries: int = 0
    quarantined: tuple[Quarantined, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One look at a running capture. Counts are of this run, without what was committed before.

    Attributes:
        tokens, tokens_total: encoded, and expected in all (None while unknown).
        shards, shards_total: committed, and to do.
        stored_bytes: of the committed objects.
        shard: the one last worked on.
        tokens_per_s: since the start, so that it includes the time that workers need to load.
        eta_s: seconds left at that pace; None while unknown.
        retries: samples that had to be tried again.
        elapsed_s: since the start.
    """

    tokens: int
    tokens_total: int | None
    shards: int
    shards_total: int
    stored_bytes: int
    shard: str | None
    tokens_per_s: float
    eta_s: float | None
    retries: int
    elapsed_s: float


class ProgressMeter:
    """Sums events up and calls `on_progress` a few times a second, and at the end. Thread-safe."""

    def __init__(
        self,
        shards: Sequence[ShardPlan],
        *,
        tokens_total: float | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._weights = {s.shard: weight_of(s) for s in shards}
        self._tokens_total = tokens_total
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        self._tokens_of: dict[str, int] = {}
        self._weight_done = 0
        self._tokens_done = 0
        self._shard: str | None = None
        self._retries = 0
        self.tokens = 0
        self.shards = 0
        self.stored_bytes = 0
        self.quarantined: list[Quarantined] = []
        self.notes: list[str] = []

    def add(self, event: Event) -> None:
        """Take an event."""
        with self._lock:
            self._shard = event.shard
            self.tokens += event.tokens
            self._retries += event.retries
            self.quarantined += event.quarantined
            self.notes += event.notes
            held = self._tokens_of.get(event.shard, 0) + event.tokens
            self._tokens_of[event.shard] = held
            if event.stored_bytes is not None or event.skipped:
                self.shards += 1
                self.stored_bytes += event.stored_bytes or 0
                self._tokens_done += self._tokens_of.pop(event.shard)
                self._weight_done += self._weights[event.shard]
            if time.monotonic() - self._last < _INTERVAL_S:
                return
            self._last = time.monotonic()
        self.show()

    def show(self) -> None:
        """Call `on_progress` now."""
        if self._on_progress is not None:
            self._on_progress(self.progress())

    def progress(self) -> Progress:
        """The present state."""
        elapsed_s = time.monotonic() - self._start
        total = self._tokens_total
        if total is None and self._weight_done:
            total = self._tokens_done / self._weight_done * sum(self._weights.values())
        pace = self.tokens / elapsed_s if elapsed_s > 0 else 0.0
        left_s = None if total is None or not pace else max(0.0, total - self.tokens) / pace
        return Progress(
            tokens=self.tokens,
            tokens_total=None if total is None else round(total),
            shards=self.shards,
            shards_total=len(self._weights),
            stored_bytes=self.stored_bytes,
            shard=self._shard,
            tokens_per_s=pace,
            eta_s=left_s,
            retries=self._retries,
            elapsed_s=elapsed_s,
        )


def weight_of(shard: ShardPlan) -> int:
    """Relative amount of work: bytes where the corpus has byte ranges, else documents."""
    return sum(s.documents if s.bytes is None else s.bytes for s in shard.spans)
