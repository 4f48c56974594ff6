"""Run the teacher once, keep a sparse, honest record, train as many students as you like.

    import logitstore as ls

    ds = ls.LogitDataset("STORE", shuffle=True, seed=0)
    for batch in ls.loader(ds, batch_size=8):
        loss = ls.losses.forward_kl(student(batch.tokens), batch.targets, mask=batch.loss_mask)

Importing this package loads neither torch, pyarrow nor zarr; names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from logitstore.spec.version import __version__

# public name -> module that defines it
_LAZY = {
    "LogitDataset": "logitstore.data",
    "collate": "logitstore.data",
    "loader": "logitstore.data",
    "open": "logitstore.store",
    "replay": "logitstore.data",
    "writer": "logitstore.capture",
}
_LAZY_MODULES = frozenset({"losses", "signals", "store", "targets"})

__all__ = [
    "LogitDataset",
    "__version__",
    "collate",
    "loader",
    "losses",
    "open",
    "replay",
    "signals",
    "store",
    "targets",
    "writer",
]

if TYPE_CHECKING:
    from logitstore import losses, signals, store, targets
    from logitstore.capture import writer
    from logitstore.data import LogitDataset, collate, loader, replay
    from logitstore.store import open


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"logitstore.{name}")
    raise AttributeError(f"module 'logitstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
