"""Worker processes on this machine, fed shard by shard.

Workers are forked by a server process that has imported the libraries and used none of them: a fork
of this process would bear neither torch nor object stores, and a fresh interpreter for each would
import torch and transformers again. Each loads its own teacher and asks for a shard whenever it has
run the teacher over the last one. A worker that loses its parent ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from logitstore.capture.progress import Event
from logitstore.capture.settings import Task
from logitstore.capture.worker import Source, Work, capture_shards
from logitstore.spec.errors import CaptureError
from logitstore.spec.plan import Plan, ShardPlan
from logitstore.teachers import TeacherOptions, load_classifier, load_teacher

__all__ = ["Job", "run_local"]

# Workers that are told to end are killed after so long; Ctrl-C promises two seconds in all.
_GRACE_S = 0.7

# Kind of teacher -> what its workers share instead of importing it each.
_HEAVY = {"hf": ("logitstore.teachers.causal_lm", "transformers.models.auto.modeling_auto")}


@dataclass(frozen=True)
class Job:
    """What a worker process needs to begin.

    Attributes:
        location: of the store.
        task, teacher, options: what to load.
        corpus: the plan's files.
        plan: of the store.
        micro_batch: full windows, or examples, of one forward pass.
    """

    location: str
    task: Task
    teacher: str
    options: TeacherOptions
    corpus: Source
    plan: Plan
    micro_batch: int


def run_local(
    job: Job, shards: Sequence[ShardPlan], workers: int, report: Callable[[Event], None]
) -> None:
    """Capture shards with `workers` processes.

    Raises: what a worker raised; CaptureError capture-failed when one died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_HEAVY.get(job.teacher.partition(":")[0], ())])
    # `python -m logitstore_cli` and the like must not run again in the children.
    with _main_module_hidden():
        pool = []
        for number in range(min(workers, len(shards))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker_main, args=(theirs, job), name=f"worker {number}", daemon=True
            )
            process.start()
            theirs.close()
            pool.append((process, ours))
    try:
        _feed(pool, iter(shards), report)
    finally:
        _end(pool)


def _feed(
    pool: Sequence[tuple[BaseProcess, Connection]],
    shards: Iterator[ShardPlan],
    report: Callable[[Event], None],
) -> None:
    open_: dict[Any, tuple[BaseProcess, Connection]] = {conn: (p, conn) for p, conn in pool}
    while open_:
        for ready in wait(list(open_)):
            process, conn = open_[ready]
            try:
                message = conn.recv()
            except EOFError:
                process.join()
                raise _died(process) from None
            if message == "next":
                conn.send(next(shards, None))
            elif message == "done":
                del open_[conn]
            elif isinstance(message, Event):
                report(message)
            else:
                raise message


def _died(process: BaseProcess) -> CaptureError:
    code = process.exitcode
    hint = "the same command continues"
    if code == -signal.SIGKILL:
        hint = "probably out of memory: use fewer --workers; " + hint
    return CaptureError(
        "capture-failed",
        "a worker process died",
        where=process.name,
        got=f"signal {-code}" if code is not None and code < 0 else f"exit code {code}",
        expected="a worker that finishes or tells its error",
        hint=hint,
    )


def _end(pool: Sequence[tuple[BaseProcess, Connection]]) -> None:
    for process, _ in pool:
        if process.is_alive():
            process.terminate()
    until_s = time.monotonic() + _GRACE_S
    for process, _ in pool:
        process.join(max(0.0, until_s - time.monotonic()))
    for process, conn in pool:
        if process.is_alive():
            process.kill()
        process.join()
        conn.close()


def _worker_main(conn: Connection, job: Job) -> None:
    """A worker process: ask, capture, tell; an error is sent and raised by the parent."""
    # The terminal sends Ctrl-C to every process of the group; only the parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(message: object) -> None:
        with lock:
            conn.send(message)

    def shards() -> Iterator[ShardPlan]:
        while True:
            send("next")
            shard = conn.recv()
            if shard is None:
                return
            yield shard

    try:
        from logitstore.store import append

        load = load_classifier if job.task == "classification" else load_teacher
        teacher = load(job.teacher, job.options)
        with append(job.location) as writer:
            work = Work(writer, job.plan, job.corpus, teacher, job.micro_batch)
            capture_shards(work, shards(), send)
        # Everything is committed; from here on an end by the parent needs no clearing up.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        send("done")
    except Exception as error:
        send(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error itself where it is ours, else one that any process can rebuild."""
    if hasattr(error, "kind"):
        return error
    return CaptureError("capture-failed", f"a worker failed: {type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    main = sys.modules["__main__"]
    held = {name: getattr(main, name, None) for name in ("__spec__", "__file__")}
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = held["__spec__"]
        if held["__file__"] is not None:
            main.__file__ = held["__file__"]
