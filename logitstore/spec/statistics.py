"""Mergeable statistics of a shard, kept in its commit so that nobody ever scans a store for
them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from logitstore.spec.document import Strict

__all__ = ["CumulativeMass", "Histogram", "Measure", "Reliability", "Statistics"]

Count = Annotated[int, Field(ge=0)]


class Histogram(Strict):
    """Counts over equal bins: bin i covers [low + i * width, low + (i + 1) * width).

    Values below the first bin fall into it, values above the last bin fall into that.
    """

    low: float
    width: Annotated[float, Field(gt=0)]
    counts: tuple[Count, ...]


class Measure(Strict):
    """One per-position quantity over the positions where it is defined."""

    count: Count
    total: float
    total_squares: float
    least: float
    greatest: float
    histogram: Histogram

    @property
    def mean(self) -> float:
        """Arithmetic mean; 0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0


class Reliability(Strict):
    """Teacher top-1 confidence against labels, in equal-width bins over [0, 1]; 1 falls in the last
    bin."""

    counts: tuple[Count, ...]
    correct: tuple[Count, ...]
    confidence: tuple[float, ...]

    @model_validator(mode="after")
    def _same_bins(self) -> Reliability:
        if not len(self.counts) == len(self.correct) == len(self.confidence):
            raise ValueError("bins must agree")
        return self


class CumulativeMass(Strict):
    """Teacher mass of the k most probable ids, summed over a fixed 1/64 of positions.

    Attributes:
        positions: how many positions were used.
        ks: the k values, ascending.
        mass: sum over positions of the mass of the k most probable ids, one per k.
        reach: for each of the mass levels 0.90, 0.95, 0.99, how many positions reach it at each k
            first.
    """

    positions: Count
    ks: tuple[Annotated[int, Field(ge=1)], ...]
    mass: tuple[float, ...]
    reach: dict[str, tuple[Count, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _same_ranks(self) -> CumulativeMass:
        lengths = {len(self.ks), len(self.mass), *map(len, self.reach.values())}
        if len(lengths) != 1 or list(self.ks) != sorted(set(self.ks)):
            raise ValueError("ks must ascend, and every list have one value for each")
        return self


class Statistics(Strict):
    """Statistics of one shard; `logitstore.record.statistics` computes and merges them.

    Attributes:
        labels: positions with a label (loss_mask 1).
        measures: name -> measure; names are entropy, top1_prob, label_logprob,
            label_rank_log2, kept_mass, num_ids.
    """

    labels: Count = 0
    measures: dict[str, Measure] = Field(default_factory=dict)
    reliability: Reliability | None = None
    cumulative_mass: CumulativeMass | None = None
