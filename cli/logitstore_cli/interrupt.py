"""Ctrl-C that ends soon and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import click

__all__ = ["interruptible"]

EXIT_CODE = 130
_GRACE_S = 1.5


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; once that leaves the block, the process ends.

    It prints `message` and ends with code 130, at the latest 1.5 s after the key was pressed, and
    at once when it is pressed again. A thread sees to that, since Python's own handler waits for
    the main thread to leave C code; and the interpreter is not shut down, which takes seconds with
    torch on a busy machine. Does nothing outside of the main thread, or where Ctrl-C is ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(ours, message), daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    except KeyboardInterrupt:
        _end(message)
    finally:
        signal.set_wakeup_fd(previous)
        theirs.close()
        watcher.join()
        ours.close()


def _watch(signals: socket.socket, message: str) -> None:
    """Read the number of every signal as it arrives, until the other end is closed."""
    presses = 0
    while True:
        try:
            number = signals.recv(1)
        except TimeoutError:
            _end(message)
        if not number:
            return
        presses += number[0] == signal.SIGINT
        if presses == 2:
            os._exit(EXIT_CODE)
        if presses:
            signals.settimeout(_GRACE_S)


def _end(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.stdout.flush()
    os._exit(EXIT_CODE)
