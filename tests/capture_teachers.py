"""Teachers for tests, named on the command line as `py:tests.capture_teachers:NAME`.

All read UTF-8 bytes (ids 0 to 255; 256 is BOS) and answer from a fixed random table, so that a test
can compute what must be stored.
"""

from __future__ import annotations

import os
import time

import torch

VOCAB_SIZE = 260
BOS = 256
POISON = ord("\a")


def table() -> torch.Tensor:
    """float32 [V, V]: logits after each id."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator) * 3


class Bigram:
    """Logits depend on the last token alone."""

    vocab_size = VOCAB_SIZE
    bos_id = BOS

    def __init__(self) -> None:
        self.table = table()

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


class Slow(Bigram):
    """Once a capture has begun its store, sleeps before each answer, so that a test can interfere.

    SLOW_TEACHER_STORE names the store.
    """

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        if os.path.exists(os.environ["SLOW_TEACHER_STORE"]):
            time.sleep(0.2)
        return super().__call__(tokens, segment_ids)


class Poisoned(Bigram):
    """NaN for samples that hold a bell."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(tokens, segment_ids)
        logits[(tokens == POISON).any(-1), -1, 7] = torch.nan
        return logits


class Crashing(Bigram):
    """Raises for batches that hold a bell."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        if (tokens == POISON).any():
            raise ValueError("cannot read a bell")
        return super().__call__(tokens, segment_ids)


class Infinite(Bigram):
    """+inf everywhere."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        return super().__call__(tokens, segment_ids) + torch.inf


class SmallMemory(Bigram):
    """Has room for two samples."""

    room = 2

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        if len(tokens) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return super().__call__(tokens, segment_ids)


class NeedsBos(Bigram):
    """Knows the next token where the segment begins with BOS, and is badly wrong elsewhere."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
        following = torch.roll(tokens, -1, 1)
        for row in range(len(tokens)):
            for segment in segment_ids[row].unique():
                inside = segment_ids[row] == segment
                sane = tokens[row][inside][0] == BOS
                sign = 4.0 if sane else -4.0
                rows = inside.nonzero()[:, 0]
                logits[row, rows, following[row, rows]] = sign
        return logits


class Wide(Bigram):
    """One column too many."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, VOCAB_SIZE + 1)


class Dying(Bigram):
    """Ends its process without a word."""

    def __call__(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        import multiprocessing

        if multiprocessing.parent_process() is not None:
            os._exit(7)
        return super().__call__(tokens, segment_ids)


bigram = Bigram
slow = Slow
poisoned = Poisoned
crashing = Crashing
infinite = Infinite
small_memory = SmallMemory
needs_bos = NeedsBos
wide = Wide
dying = Dying


def no_memory() -> Bigram:
    """Has no room at all."""
    teacher = SmallMemory()
    teacher.room = 0
    return teacher
