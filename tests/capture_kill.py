"""Kills `logitstore precompute` after each of its write steps, runs it again, and looks.

    python tests/capture_kill.py FOLDER ARGUMENT...

ARGUMENT... are those of `logitstore precompute` without --out. Prints one JSON line for each kill:
the step, what a reader saw after the kill, and whether the store equals that of an uninterrupted
run after the same command was given again. Processes are forked, so that the libraries are imported
once. KILL_STEPS=a,b in the environment kills only after the first occurrence of these steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

import logitstore.capture.run
import logitstore.teachers.causal_lm
import logitstore.teachers.function  # noqa: F401  (imported once, for all children)
from logitstore import store as stores
from logitstore.spec.errors import NotFoundError
from logitstore.store import steps
from logitstore_cli.main import run


def capture(arguments: list[str], out: Path, hook=None) -> int:
    """Run the command in a forked child; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        steps.hook = hook
        code = 1
        with contextlib.suppress(BaseException):
            code = run(["--quiet", "precompute", *arguments, "--out", str(out)])
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out: Path) -> dict[str, object]:
    """What a reader sees."""
    try:
        with stores.open(out) as store:
            return {
                "shards": {
                    v.shard: store.commit(i).object.sha256 for i, v in enumerate(store.shards)
                },
                "samples": len(store),
                "positions": store.num_positions,
            }
    except NotFoundError:
        return {"shards": {}, "samples": 0, "positions": 0}


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    trace = folder / "steps"

    def record(name: str) -> None:
        with trace.open("a") as file:
            file.write(name + "\n")

    if code := capture(arguments, folder / "whole", record):
        sys.exit(f"the uninterrupted run ended with {code}")
    whole = state(folder / "whole")
    seen: Counter[str] = Counter()
    only = os.environ.get("KILL_STEPS")
    for number, name in enumerate(trace.read_text().split()):
        seen[name] += 1
        if only and (name not in only.split(",") or seen[name] > 1):
            continue
        out = folder / f"kill-{number}"
        # By name and occurrence: the next attempt opens while the last one is being committed, so
        # that the steps of two shards interleave as they like.
        left = [seen[name]]

        def kill(step: str, name: str = name, left: list[int] = left) -> None:
            left[0] -= step == name
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = capture(arguments, out, kill)
        after_kill = state(out)
        again = capture(arguments, out)
        after = state(out)
        line = {
            "step": name,
            "occurrence": seen[name],
            "killed": killed == -signal.SIGKILL,
            "committed_after_kill": len(after_kill["shards"]),
            "exit_code_again": again,
            "same_as_uninterrupted": after == whole,
            "problems": len(stores.verify(out, full=True).problems),
        }
        print(json.dumps(line), flush=True)


main()
