"""Records of repeated rows, for statistics over many draws of one distribution."""

from __future__ import annotations

import numpy as np
import torch

from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.signals import encoder
from logitstore.spec.header import Header, TeacherInfo
from logitstore.spec.signals import parse_signal
from logitstore.targets import Targets, from_records

__all__ = ["draw", "header_of", "record_of", "repeated"]


def header_of(signal: str, vocab_size: int, **options: object) -> Header:
    """A classification header: one position per sample, so that rows are independent."""
    return new_header(
        parse_signal(signal),
        vocab_size=vocab_size,
        configuration={"test": True},
        teacher=TeacherInfo(name="test"),
        **{"sample_kind": "classification", "aux": ["label_logprob"], **options},
    )


def record_of(header: Header, logits_PV: torch.Tensor, labels_P: torch.Tensor, key: int) -> Record:
    """One sample per row; row i has position number i under `key`."""
    count = len(logits_PV)
    positions = torch.arange(count)
    columns = encoder(header).encode(
        logits_PV,
        labels_P=labels_P,
        keys_P=torch.full((count,), key),
        positions_P=positions,
    )
    names = [b"x"] * count
    dtype = header.schema_.column("label").dtype
    arrays = {
        "sample_lengths": np.ones(count, np.uint32),
        "num_sample_key": np.ones(count, np.uint16),
        "sample_key": np.frombuffer(b"".join(names), np.uint8),
        "label": labels_P.numpy().astype(dtype),
        **columns,
    }
    return Record(header.schema_, arrays)


def draw(header: Header, logits_PV: torch.Tensor, labels_P: torch.Tensor, key: int = 7) -> Targets:
    """Targets of the rows, through the record."""
    return from_records([record_of(header, logits_PV, labels_P, key)], header)


def repeated(row_V: torch.Tensor, count: int, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` copies of one row and its label."""
    return row_V.expand(count, -1), torch.full((count,), label)
