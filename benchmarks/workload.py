"""Synthetic teacher distributions with a language model's statistics, without a model.

Storage figures need ids and probabilities that look real and come from no download:

- Token frequencies follow Zipf-Mandelbrot; an id is its frequency rank with log-normal jitter, as
  the merge order of a byte-pair vocabulary is.
- A position's candidates come half from these frequencies, half from one of its sequence's topics
  (clusters of 512 ids).
- The largest probability is Beta-distributed (U-shaped, median 0.6); the others fall as a power of
  their rank, with an exponent of the position and noise per entry. What lies beyond the candidates
  is one mass, spread over a flattened unigram.

What is not imitated: context (the same word at the same place of a phrase). Figures on real logits
stand beside these for that reason.

Letters: P positions, K candidates, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ragged", "Workload", "make_workload"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TOPICS, _TOPIC_IDS, _TOPICS_A_SEQUENCE = 2048, 512, 48


class Categorical:
    """Draws from a fixed distribution."""

    def __init__(self, weights: Floats) -> None:
        self._cdf = np.cumsum(weights / weights.sum())
        self._cdf[-1] = 1.0

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> Ints:
        return np.searchsorted(self._cdf, rng.random(shape), side="right").astype(np.int64)


@dataclass(frozen=True)
class Ragged:
    """Entries of P positions, one position after another, ids ascending inside a position.

    Attributes:
        counts: int64 [P], entries of each position.
        ids: int64 [E].
        values: [E]: counts of draws, or log-probs.
    """

    counts: Ints
    ids: Ints
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """Distributions of `len(tokens)` positions, in sequences of `seq_len`.

    Attributes:
        tokens: int64 [P]; the label of position t is tokens[t + 1].
        ids: int64 [P, K], candidates in descending order of probability.
        probs: float64 [P, K].
        tail: float64 [P], probability outside the candidates.
        tail_ids: draws of ids of the tail.
    """

    vocab_size: int
    seq_len: int
    tokens: Ints
    ids: Ints
    probs: Floats
    tail: Floats
    tail_ids: Categorical
    id_of_rank: Ints

    def labels(self) -> Ints:
        """int64 [P], -1 on the last position of each sequence."""
        label = np.append(self.tokens[1:], -1)
        label[self.seq_len - 1 :: self.seq_len] = -1
        return label

    def label_logprobs(self) -> Floats:
        """float64 [P]; a label outside the candidates gets a typical tail probability."""
        hit = self.ids == self.labels()[:, None]
        inside = np.where(hit, self.probs, 0.0).sum(1)
        p = np.where(hit.any(1), inside, np.minimum(self.probs[:, -1], self.tail) / 4)
        return np.where(self.labels() >= 0, np.log(p), 0.0)

    def rskd(self, rounds: int, seed: int = 1) -> Ragged:
        """Unique ids of `rounds` draws with replacement, and how often each came."""
        rng = np.random.default_rng(seed)
        everything = np.concatenate([self.probs, self.tail[:, None]], 1)
        drawn = rng.multinomial(rounds, everything / everything.sum(1, keepdims=True))
        row, column = np.nonzero(drawn[:, :-1])
        tail_row = np.repeat(np.arange(len(drawn)), drawn[:, -1])
        tail = self.id_of_rank[self.tail_ids.draw(rng, len(tail_row))]
        rows = np.concatenate([row, tail_row])
        ids = np.concatenate([self.ids[row, column], tail])
        times = np.concatenate([drawn[row, column], np.ones(len(tail))])
        return self._merged(rows, ids, times)

    def threshold(self, tau: float, seed: int = 1) -> tuple[Ragged, Ragged, Floats]:
        """Heads with log-probs (0 for the largest), tails, and the log of the tail's mass.

        As `logitstore.signals.threshold` stores them, but for the rounding of head log-probs, with
        the label free; drawn here because there are no logits to encode.
        """
        rng = np.random.default_rng(seed)
        p = np.where(self.ids == self.labels()[:, None], 0.0, self.probs)
        order = np.argsort(-p, axis=1, kind="stable")
        p, ids = np.take_along_axis(p, order, 1), np.take_along_axis(self.ids, order, 1)
        k = np.ceil(np.minimum(p / tau, 1).sum(1) + self.tail / tau - 1e-7).astype(np.int64)
        k = np.maximum(k, 1)
        h = np.arange(p.shape[1])
        outside = np.cumsum(p[:, ::-1], axis=1)[:, ::-1] + self.tail[:, None]
        heads = ((p * (k[:, None] - h) < outside) & (h < k[:, None])).argmax(1)
        mass = np.take_along_axis(outside, heads[:, None], 1)[:, 0]
        is_head = h < heads[:, None]
        row, column = np.nonzero(is_head)
        logprob = np.where(column == 0, 0.0, np.log(np.maximum(p[row, column], 1e-300)))
        # Systematic selection over what is no head, the mass beyond the candidates coming last.
        ends = np.cumsum(np.where(is_head, 0.0, p), axis=1) / mass[:, None]
        tails = k - heads
        owner = np.repeat(np.arange(len(k)), tails)
        index = np.arange(len(owner)) - np.repeat(np.cumsum(tails) - tails, tails)
        point = (index + rng.random(len(k))[owner]) / tails[owner]
        slot = (ends[owner] <= point[:, None]).sum(1)
        inside = slot < p.shape[1]
        drawn = np.empty(len(owner), np.int64)
        drawn[inside] = ids[owner[inside], slot[inside]]
        drawn[~inside] = self.id_of_rank[self.tail_ids.draw(rng, int((~inside).sum()))]
        return (
            self._merged(row, ids[row, column], logprob),
            self._merged(owner, drawn, np.zeros(len(drawn))),
            np.where(heads > 0, np.log(mass), 0.0),
        )

    def _merged(self, rows: Ints, ids: Ints, values: Floats) -> Ragged:
        key, place = np.unique(rows * self.vocab_size + ids, return_inverse=True)
        return Ragged(
            np.bincount(key // self.vocab_size, minlength=len(self.tokens)),
            key % self.vocab_size,
            np.bincount(place, weights=values, minlength=len(key)),
        )


def make_workload(
    vocab_size: int = 128_256, sequences: int = 32, seq_len: int = 2048, k: int = 64, seed: int = 0
) -> Workload:
    """Distributions of sequences * seq_len positions."""
    rng = np.random.default_rng(seed)
    rank = np.arange(vocab_size)
    frequency = (rank + 2.7) ** -1.05
    id_of_rank = np.empty(vocab_size, np.int64)
    id_of_rank[np.argsort(np.log(rank + 1) + rng.normal(0, 0.6, vocab_size))] = rank
    unigram = Categorical(frequency)
    tail_ids = Categorical(frequency**0.75)
    topics = Categorical(frequency**0.85).draw(rng, (_TOPICS, _TOPIC_IDS))
    inside_topic = Categorical((np.arange(_TOPIC_IDS) + 1.5) ** -0.9)
    parts = []
    for _ in range(sequences):
        own_topics = rng.integers(0, _TOPICS, _TOPICS_A_SEQUENCE)
        topic = own_topics[rng.integers(0, _TOPICS_A_SEQUENCE, seq_len)]
        shape = (seq_len, k + 3 * k // 4)
        from_topic = topics[topic[:, None], inside_topic.draw(rng, shape)]
        candidates = np.where(rng.random(shape) < 0.5, from_topic, unigram.draw(rng, shape))
        # Enough spare ranks at the end that every position has k different ones.
        candidates = np.concatenate([candidates, tail_ids.draw(rng, (seq_len, 2 * k))], 1)
        ids = id_of_rank[_first_distinct(candidates, k)]
        probs, tail = _curve(rng, seq_len, k)
        point = rng.random(seq_len)
        slot = (np.cumsum(probs, axis=1) <= point[:, None]).sum(1)
        spare = id_of_rank[tail_ids.draw(rng, seq_len)]
        realised = np.where(slot < k, ids[np.arange(seq_len), np.minimum(slot, k - 1)], spare)
        parts.append((np.roll(realised, 1), ids, probs, tail))
    tokens, ids, probs, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Workload(vocab_size, seq_len, tokens, ids, probs, tail, tail_ids, id_of_rank)


def _curve(rng: np.random.Generator, positions: int, k: int) -> tuple[Floats, Floats]:
    """Descending probabilities [P, K] and the mass beyond them [P]."""
    exponent = rng.gamma(18, 1.33 / 18, positions) + 0.25
    top = rng.beta(0.80, 0.62, positions).clip(1e-3, 0.99999)
    log_rank = np.log(np.arange(1, k + 1))
    shape = np.exp(-exponent[:, None] * log_rank + rng.normal(0, 0.25, (positions, k)))
    others = -np.sort(-shape[:, 1:], axis=1)
    # The integral of the power law beyond rank k.
    beyond = others[:, -1] * k / np.maximum(exponent - 1, 0.15) * 0.6
    rest = others.sum(1) + beyond
    top = np.maximum(top, others[:, 0] / (others[:, 0] + rest))
    scale = (1 - top) / rest
    return np.concatenate([top[:, None], others * scale[:, None]], 1), beyond * scale


def _first_distinct(values: Ints, k: int) -> Ints:
    """The first k different values of each row, in order."""
    order = np.argsort(values, axis=1, kind="stable")
    ascending = np.take_along_axis(values, order, 1)
    repeated = np.zeros(values.shape, np.bool_)
    again = np.concatenate(
        [np.zeros((len(values), 1), np.bool_), ascending[:, 1:] == ascending[:, :-1]], 1
    )
    np.put_along_axis(repeated, order, again, 1)
    keep = np.argsort(repeated, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, keep, 1)
