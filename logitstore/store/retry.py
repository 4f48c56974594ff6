"""Trying again: how long, how often, and what a busy server asks for."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from logitstore.spec.errors import StorageError

__all__ = [
    "MAX_RETRY_AFTER_S",
    "TRAINING_PATIENCE_S",
    "patience",
    "retrying",
]

# A wrong host is to be reported soon; a server that says when to come back is known to be there.
OPENING_PATIENCE_S = 6.0
BUSY_PATIENCE_S = 60.0
# Once a store is open, a lost connection is an outage, and hours of training hang on it.
TRAINING_PATIENCE_S = 300.0

FIRST_WAIT_S = 0.1
MAX_WAIT_S = 15.0
MAX_RETRY_AFTER_S = 60.0
# What Retry-After asks for is never shortened, only stretched, so that clients told the same do not
# come back at the same moment.
_RETRY_AFTER_JITTER = 0.25
_TELL_AFTER_S = 5.0

_log = logging.getLogger("logitstore")
# Not the generators that users seed: a busy server must not change what a training run draws.
_jitter = random.SystemRandom()

_patience_s: ContextVar[float] = ContextVar("_patience_s", default=0.0)

T = TypeVar("T")


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, in this thread, reads go on for so long before they give up."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def retrying(call: Callable[[], T]) -> T:
    """The call's result, tried again while it fails with a StorageError that may pass.

    Such an error has `data["transient"]`, and `data["retry_after_s"]` where the server names a
    time. Waits double from 0.1 s to 15 s, each drawn between half of that and all of it; a time
    that the server named (at most 60 s of it) is kept, with up to a quarter added.
    """
    started = time.monotonic()
    wait_s, told = FIRST_WAIT_S, False
    while True:
        try:
            return call()
        except StorageError as error:
            if not error.data.get("transient"):
                raise
            asked_s = error.data.get("retry_after_s")
            limit_s = max(_patience_s.get(), OPENING_PATIENCE_S)
            if asked_s is None:
                pause_s = wait_s * _jitter.uniform(0.5, 1.0)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
            else:
                asked_s = min(asked_s, MAX_RETRY_AFTER_S)
                pause_s = asked_s * (1 + _jitter.uniform(0, _RETRY_AFTER_JITTER))
                limit_s = max(limit_s, BUSY_PATIENCE_S)
            elapsed_s = time.monotonic() - started
            if elapsed_s + pause_s > limit_s:
                raise
            if elapsed_s + pause_s > _TELL_AFTER_S and not told:
                told = True
                _log.warning("waiting, up to %.0f s, for %s: %s", limit_s, error.where, error.got)
            time.sleep(pause_s)
