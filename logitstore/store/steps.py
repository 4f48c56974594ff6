"""The write steps of a local store, by name.

The writer calls `step` after each change it makes to a disk. Tests replace `hook` to kill the
process there, one step after the other, and so prove what is left behind.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["STEPS", "hook", "step"]

# What is written, in the order of a capture.
_KINDS = ("header", "table", "plan", "object", "commit", "index")

# How one file comes to be, in order: its folder exists; the temporary file is open; a chunk was
# added (objects only); all bytes are written; they are flushed; the final name exists; the name
# is flushed too; the temporary name is gone.
_PHASES = ("folder", "open", "chunk", "filled", "synced", "linked", "durable", "done")

STEPS = tuple(
    f"{kind}:{phase}"
    for kind in _KINDS
    for phase in _PHASES
    if phase != "chunk" or kind == "object"
)

hook: Callable[[str], None] | None = None


def step(kind: str, phase: str) -> None:
    """Tell the hook, if there is one, which step was just done."""
    if hook is not None:
        hook(f"{kind}:{phase}")
