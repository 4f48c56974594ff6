"""The stores that the HTTP benchmark serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sources import record_of, synthetic_source
from workload import make_workload

import logitstore.store
from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.record.statistics import merge, statistics_of
from logitstore.spec.header import Header, TeacherInfo
from logitstore.spec.plan import shard_name
from logitstore.spec.signals import parse_signal

__all__ = ["MANY", "STUDENT", "chunk_ranges", "write_stores"]

SHARDS = 4
MANY, STUDENT = "many", "student"
SIGNALS = {"topk": "topk:64", "threshold": "threshold:tau=1/40", "sampled": "sampled:50"}


def write_stores(folder: Path, *, samples: int, many: int, tiny: bool) -> dict[str, Path]:
    """name -> folder: `topk`, `threshold`, `sampled` in zarr, `topk-arrow`; `student`, of a small
    vocabulary; `many`, of that many shards. All are sealed."""
    size = {"vocab_size": 1000, "seq_len": 64, "k": 16} if tiny else {}
    signals = {**SIGNALS, "topk": "topk:16"} if tiny else SIGNALS
    workload = make_workload(sequences=min(samples, 16), **size)
    source = synthetic_source(workload, list(signals.values()))
    for name, signal in signals.items():
        header, records = source[signal]["zarr"]
        _write(folder / name, header, _cycled(records, samples), SHARDS)
    header, records = source[signals["topk"]]["arrow"]
    _write(folder / "topk-arrow", header, _cycled(records, samples), SHARDS)
    length = 64 if tiny else 512
    small = make_workload(sequences=min(samples, 32), vocab_size=4096, seq_len=length, k=32)
    header, records = synthetic_source(small, ["topk:32"])["topk:32"]["zarr"]
    _write(folder / STUDENT, header, _cycled(records, samples), SHARDS)
    _write_many(folder / MANY, many)
    return {name: folder / name for name in (*signals, "topk-arrow", STUDENT, MANY)}


def chunk_ranges(store: Path, name: str) -> list[tuple[str, int, int]]:
    """(path, start, stop) of every chunk; here a chunk holds one sample."""
    with logitstore.store.open(store) as opened:
        return [
            (f"/v1/stores/{name}/shards/{view.object}", row.offset, row.offset + row.bytes)
            for number, view in enumerate(opened.shards)
            for row in opened.commit(number).chunks
        ]


def _cycled(records: Sequence[Record], samples: int) -> list[Record]:
    return [records[i % len(records)] for i in range(samples)]


def _write(folder: Path, header: Header, records: Sequence[Record], shards: int) -> None:
    with logitstore.store.create(folder, header) as writer:
        plan = writer.add_push_plan()
        for shard in range(shards):
            own = records[shard::shards]
            with writer.begin(shard_name(plan.number, shard), plan) as attempt:
                for record in own:
                    attempt.add(record)
                attempt.commit(statistics=merge([statistics_of(own[0])]))
        writer.seal()


def _write_many(folder: Path, shards: int) -> None:
    """Tiny shards; as many commits and index rows as a big store has."""
    header = new_header(
        parse_signal("topk:2"),
        vocab_size=97,
        configuration={},
        teacher=TeacherInfo(name="benchmark"),
        aux=["label_logprob"],
    )
    columns = {
        "tokens": np.zeros(4),
        "label_logprob": np.log(np.array([0.5, 0.5, 0.5, 1.0])),
        "ids": np.tile([0, 1], (4, 1)),
        "logprobs": np.log(np.full((4, 2), 0.5)),
    }
    _write(folder, header, [record_of(header, [4], columns)] * shards, shards)
