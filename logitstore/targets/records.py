"""Records as flat targets: one builder per signal, looked up by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from logitstore.record import Record
from logitstore.spec.errors import UsageError
from logitstore.spec.header import AUX_FIELDS, Header
from logitstore.targets import builders
from logitstore.targets.base import Targets
from logitstore.targets.builders import as_float32, as_int64

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


# signal kind -> (record, header, common fields) -> targets
BUILDERS: dict[str, Callable[[Record, Header, dict[str, Any]], Targets]] = {
    "dense": builders.dense,
    "graph": builders.graph,
    "sampled": builders.sampled,
    "scores": builders.scores,
    "threshold": builders.threshold,
    "topk": builders.topk,
}
