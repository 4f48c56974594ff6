"""Records as flat targets: one builder per signal, looked up by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitstore.record import Record
from logitstore.spec.errors import UsageError
from logitstore.spec.header import AUX_FIELDS, Header
from logitstore.targets.base import PAD_ID, Targets, pad_rows
from logitstore.targets.topk import TopKTargets

__all__ = ["BUILDERS", "from_records"]

# torch dtype of each column once it is a target
_INTEGER_FIELDS = {"label_rank", "byte_end"}


def from_records(records: Sequence[Record], header: Header) -> Targets:
    """Flat targets of the samples of `records`, one after another.

    Log-probs become float32 (exactly, from float16); ids int64. `lengths` is [B], positions per
    sample.

    Raises: UsageError unknown-signal.
    """
    build = BUILDERS.get(header.signal.kind)
    if build is None:
        raise UsageError(
            "unknown-signal",
            "no targets for this signal",
            got=str(header.signal),
            expected=", ".join(sorted(BUILDERS)),
        )
    record = Record.concat(records)
    return build(record, header, _common(record, header))


def _common(record: Record, header: Header) -> dict[str, Any]:
    """Fields that any signal may carry."""
    fields: dict[str, Any] = {
        "vocab_size": header.vocab_size,
        "lengths": as_int64(record["sample_lengths"]),
    }
    for name in AUX_FIELDS:
        if name in record and name != "log_tail":
            column = record[name]
            fields[name] = as_int64(column) if name in _INTEGER_FIELDS else as_float32(column)
    fields["lse_at"] = {
        temperature: as_float32(record[f"lse_at_{i}"])
        for i, temperature in enumerate(header.lse_at)
        if f"lse_at_{i}" in record
    }
    if "always_logprobs" in record:
        fields["always_ids"] = torch.tensor(header.always_ids, dtype=torch.int64)
        fields["always_logprobs"] = as_float32(record["always_logprobs"])
    return fields


def _topk(record: Record, header: Header, common: dict[str, Any]) -> TopKTargets:
    ids, logprobs = as_int64(record["ids"]), as_float32(record["logprobs"])
    if "num_ids" in record:
        counts = as_int64(record["num_ids"])
        width = int(counts.max()) if counts.numel() else 1
        ids = pad_rows(ids, counts, width, PAD_ID)
        logprobs = pad_rows(logprobs, counts, width, -torch.inf)
    log_tail = as_float32(record["log_tail"]) if "log_tail" in record else None
    return TopKTargets(ids=ids, logprobs=logprobs, log_tail=log_tail, **common)


# signal kind -> (record, header, common fields) -> targets
BUILDERS: dict[str, Callable[[Record, Header, dict[str, Any]], Targets]] = {"topk": _topk}


def as_int64(column: np.ndarray[Any, Any]) -> Tensor:
    """An integer column as an int64 tensor."""
    return torch.from_numpy(column.astype(np.int64))


def as_float32(column: np.ndarray[Any, Any]) -> Tensor:
    """A float column as a float32 tensor that owns its memory."""
    return torch.from_numpy(column.astype(np.float32))
