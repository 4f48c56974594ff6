"""Stores on a disk, in an object store, or read-only over HTTP; without torch.

store = logitstore.store.open("STORE")            # what is committed now
record = store.read_chunk(0, 0)

writer = logitstore.store.create("STORE", header, tables={"tokenizer.json": table})
with writer.begin(shard, plan) as attempt:
    attempt.add(record)
    attempt.commit(statistics=statistics)
writer.seal()
"""

from logitstore.store.copy import CopyReport, copy
from logitstore.store.gc import DEFAULT_GRACE_S, Deletion, GcPlan, gc
from logitstore.store.location import Location, parse_location
from logitstore.store.reader import ShardView, Store
from logitstore.store.reader import open_store as open
from logitstore.store.snapshot import Snapshot
from logitstore.store.verify import VerifyReport, verify
from logitstore.store.writer import (
    ShardAttempt,
    SingleWriterWarning,
    StoreWriter,
    append,
    create,
)

__all__ = [
    "DEFAULT_GRACE_S",
    "CopyReport",
    "Deletion",
    "GcPlan",
    "Location",
    "ShardAttempt",
    "ShardView",
    "SingleWriterWarning",
    "Snapshot",
    "Store",
    "StoreWriter",
    "VerifyReport",
    "append",
    "copy",
    "create",
    "gc",
    "open",
    "parse_location",
    "verify",
]
