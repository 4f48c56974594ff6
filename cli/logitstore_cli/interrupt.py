"""Ctrl-C that ends soon and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import click

__all__ = ["interruptible"]

EXIT_CODE = 130
_GRACE_S = 1.5


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt and the second ends the process at once.

    When clearing up takes longer than 1.5 s (a long call into C code), `message` is printed and the
    process ends as well. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end() -> None:
        click.echo(message, err=True)
        os._exit(EXIT_CODE)

    timer = threading.Timer(_GRACE_S, end)
    timer.daemon = True

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_CODE))
        timer.start()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)
