"""Records written through a container and read back: bytes by array, and speeds."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitstore.containers import ShardSummary, container
from logitstore.containers.ranked import IdRanks, ranked
from logitstore.record import Record
from logitstore.spec.commit import Commit, ObjectRef
from logitstore.spec.header import Header

__all__ = ["Row", "signal_columns", "stored", "timed"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        source, signal, coding: what was stored and how.
        bytes_per_token: of the signal's own arrays.
        columns: of every array, for stored objects.
        encode, decode: median Mtoken/s.
        spread: slowest to fastest decode, Mtoken/s.
    """

    source: str
    signal: str
    coding: str
    bytes_per_token: float
    columns: dict[str, float]
    encode: float
    decode: float
    spread: tuple[float, float]


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def stored(
    source: str,
    header: Header,
    records: list[Record],
    repeats: int,
    ranks: IdRanks | None = None,
) -> Row:
    """Write an object, read every chunk back, compare, and time both.

    `ranks` are the table of a header that asks for them.
    """
    box = container(header.container)
    if ranks is not None:
        box = ranked(box, header, lambda name: ranks.encode())
    positions = sum(r.num_positions for r in records)

    def write() -> tuple[io.BytesIO, ShardSummary]:
        file = io.BytesIO()
        writer = box.writer(file, header)
        for record in records:
            writer.add(record)
        return file, writer.finish()

    file, summary = write()
    encode_s = timed(write, max(1, repeats // 2))
    data = memoryview(file.getvalue())
    commit = Commit.model_construct(
        chunks=summary.chunks,
        layout=summary.layout,
        object=ObjectRef.model_construct(name="benchmark", bytes=len(data)),
    )
    own = signal_columns(header)

    def read(columns: list[str] | None = None) -> list[Record]:
        return [
            box.decode(data[c.offset : c.offset + c.bytes], header, commit, i, columns)
            for i, c in enumerate(summary.chunks)
        ]

    for record, back in zip(records, read(), strict=True):
        for name, array in record.arrays.items():
            assert np.array_equal(back[name], array), name
    decode_s = timed(lambda: read(own), repeats)
    columns = {name: size / positions for name, size in summary.column_bytes.items()}
    return Row(
        source,
        str(header.signal),
        header.container,
        sum(columns[name] for name in columns if belongs(name, own, header)),
        columns,
        positions / statistics.median(encode_s) / 1e6,
        positions / statistics.median(decode_s) / 1e6,
        (positions / max(decode_s) / 1e6, positions / min(decode_s) / 1e6),
    )


def signal_columns(header: Header) -> list[str]:
    """The columns that the signal alone brings; of q8 top1_logprob too, its exact first entry."""
    others = {"sample_lengths", "num_sample_key", "sample_key", "tokens", "segment_ids"}
    others |= set(header.stored_fields)
    if getattr(header.signal, "coding", "") == "q8":
        others.remove("top1_logprob")
    return [c.name for c in header.schema_.columns if c.name not in others]


def belongs(array: str, own: list[str], header: Header) -> bool:
    pairs = {g.pairs for g in header.schema_.groups if g.pairs}
    return array in own or array in pairs or array.removeprefix("num_") in pairs
