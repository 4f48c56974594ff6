"""Batches: what a training step receives.

Letters: B samples, T positions of the longest of them, N positions of all together.

Row t of a sample is the teacher's distribution over token t + 1, given tokens up to t of the same
segment. So `student_logits[:, t]` meets `targets[:, t]` and `labels[:, t] == tokens[:, t + 1]`:
nothing is ever shifted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.data.chunks import Row, gather
from logitstore.record import Record
from logitstore.record.sequences import IGNORE, labels, loss_mask, position_ids
from logitstore.record.views import Views, views_of
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.targets import Targets, TopKTargets, from_records

__all__ = ["Batch", "Item", "SampleId", "collate"]

NO_SEGMENT = -1


class SampleId(NamedTuple):
    """Where a sample is: name of its shard, and its row in that shard."""

    shard: str
    row: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples for one training step.

    Sequences have [B, T] fields, short samples padded at the end; classification samples have
    labels [B], targets with leading shape [B], and None in every field of sequences.

    Attributes:
        labels: int64 [B, T], tokens[:, t + 1] inside a segment, -100 where there is none (the last
            position of a segment, padding); for classification int64 [B], -100 where the store
            keeps no labels.
        targets: flat (`lengths` tells samples apart); `targets.padded()` gives [B, T, ...].
        sample_keys: stable names from the corpus, empty strings where the store keeps none.
        sample_ids: shard and row of each sample.
        tokens: int64 [B, T], 0 in padding.
        loss_mask: bool [B, T], True where the position counts: it has a label, and the corpus did
            not exclude it (prompts). Labels of excluded positions are still there.
        segment_ids: int64 [B, T], number of the segment inside the sample, -1 in padding.
        position_ids: int64 [B, T], what the teacher saw: counted from 0 in each segment under
            block-diagonal attention, in each sample under full attention; 0 in padding.
        view: which view of its image each sample is, for `replay`; None where they are no views.
        block_diagonal: True when the teacher attended inside segments only.
        state: of the loader after this batch; `load_state_dict(state)` continues with the next.
    """

    labels: Tensor
    targets: Targets
    sample_keys: tuple[str, ...]
    sample_ids: tuple[SampleId, ...]
    tokens: Tensor | None = None
    loss_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    position_ids: Tensor | None = None
    view: Views | None = None
    block_diagonal: bool = True
    state: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def attention_mask(self) -> Tensor:
        """bool [B, 1, T, T]: True where query position i may attend to key position j.

        Causal, and inside i's segment under block-diagonal attention. This is the 4-D mask that
        transformers models and `scaled_dot_product_attention` take; pass `position_ids` with it.
        Padding attends to padding before it, so that no row is empty.

        Raises: UsageError bad-argument for classification samples.
        """
        if self.segment_ids is None:
            raise UsageError(
                "bad-argument",
                "classification samples have no attention mask",
                where="Batch.attention_mask",
            )
        segments_BT = self.segment_ids
        if not self.block_diagonal:
            segments_BT = segments_BT.clamp(max=0)
        length = segments_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return (same_BTT & causal_TT)[:, None]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Any) -> Batch:
        changes = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Targets)
        }
        return dataclasses.replace(self, **changes)


class Item:
    """One sample, as `LogitDataset[i]` returns it. Tensors are made when they are first asked for.

    All tensors are those of a batch of this one sample, without the batch axis: tokens int64 [T],
    labels int64 [T] (-100 where there is none), loss_mask bool [T], segment_ids and position_ids
    int64 [T]; for classification labels int64 [] and None for the others.
    """

    def __init__(self, row: Row, header: Header, sample_id: SampleId, k: int | None = None) -> None:
        self.row, self.header, self.sample_id, self.k = row, header, sample_id, k

    @property
    def sample_key(self) -> str:
        """Stable name from the corpus; an empty string where the store keeps none."""
        return self.row.chunk.sample_key(self.row.row) or ""

    @cached_property
    def _batch(self) -> Batch:
        return collate([self])

    @property
    def tokens(self) -> Tensor | None:
        return _first(self._batch.tokens)

    @property
    def labels(self) -> Tensor:
        return self._batch.labels[0]

    @property
    def loss_mask(self) -> Tensor | None:
        return _first(self._batch.loss_mask)

    @property
    def segment_ids(self) -> Tensor | None:
        return _first(self._batch.segment_ids)

    @property
    def position_ids(self) -> Tensor | None:
        return _first(self._batch.position_ids)

    @property
    def view(self) -> Views | None:
        """The one view, or None where samples are no views."""
        return self._batch.view

    @property
    def targets(self) -> Targets:
        """Targets of the sample's T positions (flat, `lengths` [1]), or of its one row."""
        return self._batch.targets


def collate(items: Sequence[Item]) -> Batch:
    """One batch of what `LogitDataset` yields; `collate_fn` of any DataLoader.

    Raises: UsageError bad-argument for an empty list.
    """
    if not items:
        raise UsageError("bad-argument", "a batch needs at least one sample", where="collate")
    first = items[0]
    record = gather([item.row for item in items])
    targets = from_records([record], first.header)
    if first.k is not None and isinstance(targets, TopKTargets):
        targets = targets.truncated(first.k)
    fields: dict[str, Any] = {
        "sample_keys": tuple(record.sample_keys() or [""] * len(items)),
        "sample_ids": tuple(item.sample_id for item in items),
    }
    if first.header.sample_kind == "classification":
        # One position per sample: the flat form already has the leading shape [B].
        targets = dataclasses.replace(targets, lengths=None)
        view = views_of(record, first.header.images)
        label = torch.from_numpy(labels(record))
        return Batch(labels=label, targets=targets, view=view, **fields)
    packing = first.header.packing
    block_diagonal = packing is None or packing.attention == "block-diagonal"
    fields |= _sequence_fields(record, block_diagonal=block_diagonal)
    return Batch(targets=targets, block_diagonal=block_diagonal, **fields)


def _sequence_fields(record: Record, *, block_diagonal: bool) -> dict[str, Tensor]:
    """tokens, labels, loss_mask, segment_ids and position_ids, [B, T] each."""
    lengths_B = record["sample_lengths"].astype(np.int64)
    if block_diagonal:
        positions_N = position_ids(record)
    else:
        starts_N = np.repeat(record.sample_offsets()[:-1], lengths_B)
        positions_N = np.arange(record.num_positions) - starts_N
    columns = {
        "tokens": (record["tokens"].astype(np.int64), 0),
        "labels": (labels(record), IGNORE),
        "loss_mask": (loss_mask(record), False),
        "segment_ids": (record["segment_ids"].astype(np.int64), NO_SEGMENT),
        "position_ids": (positions_N, 0),
    }
    return {name: _padded(rows, lengths_B, fill) for name, (rows, fill) in columns.items()}


def _padded(rows_N: NDArray[Any], lengths_B: NDArray[np.int64], fill: int) -> Tensor:
    """[N] rows of B samples -> [B, T]; equal samples are a view."""
    length = int(lengths_B.max())
    if len(rows_N) == len(lengths_B) * length:
        return torch.from_numpy(rows_N.reshape(len(lengths_B), length))
    out_BT = np.full((len(lengths_B), length), fill, rows_N.dtype)
    out_BT[np.arange(length) < lengths_B[:, None]] = rows_N
    return torch.from_numpy(out_BT)


def _first(field: Tensor | None) -> Tensor | None:
    return None if field is None else field[0]
