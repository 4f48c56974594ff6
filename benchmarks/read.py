"""How fast a shuffled epoch of top-64 records is read and decoded, in one process.

    python benchmarks/read.py                  # the report in benchmarks/reports/
    python benchmarks/read.py --tiny --out X   # seconds; what the test runs

Readers take turns, epoch by epoch, in one process, and CPU time is what counts, so that a busy
machine slows all of them alike; read the ratios. The page cache is warm. The number of samples is
checked in every epoch, the sum of ids in the first. The limit is a gather from two memory-mapped
arrays, ids int32 and log-probs float16: one copy and nothing else (no tokens, no checksum).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
import zarr.storage
from report import REPORTS, environment, table, write_report
from workload import Workload, make_workload

import logitstore.store
from logitstore.data import LogitDataset, loader
from logitstore.data.chunks import gather
from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.record.statistics import merge, statistics_of
from logitstore.spec.header import Packing, TeacherInfo
from logitstore.spec.plan import shard_name
from logitstore.spec.signals import parse_signal

NOTES = """\
*arrays*: a batch in its stored types, as the limit gives it, with tokens, segments, keys and
label_logprob besides.
*batches*: what a training loop gets, with ids as int64, log-probs as float32, labels, masks and
positions; the wider types are twice the bytes to write. *checked anew*: checksum and structure of a
chunk are verified when a process first reads it; later epochs skip that for mapped files. Zarr
chunks are verified and decoded in every epoch here.
"""

BATCH_SIZE = 4
SHARDS = 4
LIMIT = "memmap gather (limit)"
# Number of the epoch -> batches: how many samples, and their ids.
Epoch = Callable[[int], Iterator[tuple[int, Any]]]


def write_store(folder: Path, kind: str, workload: Workload, samples: int) -> None:
    """One chunk a sample; the workload's sequences in turn."""
    length = workload.seq_len
    header = new_header(
        parse_signal(f"topk:{workload.ids.shape[1]}"),
        vocab_size=workload.vocab_size,
        configuration={},
        teacher=TeacherInfo(name="benchmark"),
        container=kind,
        packing=Packing(seq_len=length),
        chunk_positions=length,
    )
    unique = len(workload.tokens) // length
    records = [record_of(header, workload, i % unique, i) for i in range(samples)]
    with logitstore.store.create(folder, header) as writer:
        plan = writer.add_push_plan()
        for shard in range(SHARDS):
            with writer.begin(shard_name(plan.number, shard), plan) as attempt:
                for record in records[shard::SHARDS]:
                    attempt.add(record)
                attempt.commit(statistics=merge([statistics_of(records[shard])]))
        writer.seal()


def record_of(header: Any, workload: Workload, sequence: int, number: int) -> Record:
    length = workload.seq_len
    rows = slice(sequence * length, (sequence + 1) * length)
    key = f"text#{number}@0".encode()
    columns: dict[str, Any] = {
        "sample_lengths": [length],
        "num_sample_key": [len(key)],
        "sample_key": np.frombuffer(key, np.uint8),
        "segment_ids": np.zeros(length),
        "tokens": workload.tokens[rows],
        "label_logprob": workload.label_logprobs()[rows],
        "label_rank": np.zeros(length),
        "entropy": np.ones(length),
        "log_tail": np.log(workload.tail[rows]),
        "lse": np.full(length, 20.0),
        "ids": workload.ids[rows],
        "logprobs": np.log(workload.probs[rows]),
    }
    schema = header.schema_
    return Record(
        schema, {c.name: np.asarray(columns[c.name]).astype(c.dtype) for c in schema.columns}
    )


class Memmap:
    """Two plain files, gathered batch by batch."""

    def __init__(self, folder: Path, workload: Workload, samples: int) -> None:
        length = workload.seq_len
        unique = len(workload.tokens) // length
        order = np.arange(samples) % unique
        self._samples = samples
        self._arrays = []
        for name, values in (
            ("ids", workload.ids.astype(np.int32)),
            ("logprobs", np.log(workload.probs).astype(np.float16)),
        ):
            path = folder / f"{name}.npy"
            np.save(path, values.reshape(unique, length, -1)[order])
            self._arrays.append(np.load(path, mmap_mode="r"))
        self.bytes_per_token = sum(a.nbytes for a in self._arrays) / (samples * length)

    def __call__(self, epoch: int) -> Iterator[tuple[int, Any]]:
        order = np.random.default_rng(epoch).permutation(self._samples)
        for start in range(0, self._samples, BATCH_SIZE):
            picked = order[start : start + BATCH_SIZE]
            ids, logprobs = (torch.from_numpy(a[picked]) for a in self._arrays)
            yield len(logprobs), ids


def records(dataset: LogitDataset) -> Epoch:
    """Batches as arrays in their stored types: what `collate` starts from."""

    def epoch(number: int) -> Iterator[tuple[int, Any]]:
        order = dataset.epoch_order(number)
        for start in range(0, len(order), BATCH_SIZE):
            numbers = order.numbers(start, min(start + BATCH_SIZE, len(order))).tolist()
            record = gather([item.row for item in dataset.items(numbers)])
            yield record.num_samples, record["ids"]

    return epoch


def batches(dataset: LogitDataset, num_workers: int = 0) -> Epoch:
    """What a training loop gets: int64 ids, float32 log-probs, tokens, labels, masks, positions."""
    batched = loader(
        dataset, BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0
    )

    def epoch(number: int) -> Iterator[tuple[int, Any]]:
        batched.set_epoch(number)
        for batch in batched:
            yield len(batch), batch.targets.ids

    return epoch


def zarr_python(folder: Path, samples: int) -> Epoch:
    """The same shard objects through zarr-python: ids and log-probs only."""
    groups = [
        zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
        for path in sorted((folder / "shards").iterdir())
    ]
    arrays = [(group["ids"], group["logprobs"]) for group in groups]
    per_shard = samples // SHARDS

    def epoch(number: int) -> Iterator[tuple[int, Any]]:
        order = np.random.default_rng(number).permutation(samples)
        for start in range(0, samples, BATCH_SIZE):
            read = []
            for sample in order[start : start + BATCH_SIZE]:
                ids, logprobs = arrays[sample // per_shard]
                read.append((ids[sample % per_shard], logprobs[sample % per_shard]))
            ids, _ = (np.stack(part) for part in zip(*read, strict=True))
            yield len(ids), ids

    return epoch


def readers(folder: Path, workload: Workload, samples: int) -> dict[str, tuple[float, Any]]:
    """name -> (stored bytes per token, () -> Epoch). Fresh readers decode every chunk again."""
    positions = samples * workload.seq_len
    stored = {
        kind: sum(p.stat().st_size for p in (folder / kind / "shards").iterdir()) / positions
        for kind in ("arrow", "zarr")
    }

    def opened(kind: str) -> LogitDataset:
        return LogitDataset(folder / kind, shuffle=True, columns=())

    arrow, arrow_batches = records(opened("arrow")), batches(opened("arrow"))
    workers = batches(opened("arrow"), num_workers=2)
    memmap = Memmap(folder, workload, samples)
    return {
        LIMIT: (memmap.bytes_per_token, lambda: memmap),
        "arrow, arrays": (stored["arrow"], lambda: arrow),
        "arrow, arrays, chunks checked anew": (stored["arrow"], lambda: records(opened("arrow"))),
        "arrow, batches": (stored["arrow"], lambda: arrow_batches),
        "arrow, batches, 2 workers": (stored["arrow"], lambda: workers),
        "zarr, arrays": (stored["zarr"], lambda: records(opened("zarr"))),
        "zarr, batches": (stored["zarr"], lambda: batches(opened("zarr"))),
        "zarr-python": (stored["zarr"], lambda: zarr_python(folder / "zarr", samples)),
    }


def measure(
    found: dict[str, tuple[float, Any]], samples: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds of this process' CPU, seconds on the clock) of every epoch.

    The first, unmeasured round warms the page cache and is checked.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    sums = set()
    for number in range(repeats + 1):
        for name, (_, make) in found.items():
            epoch = make()
            count, total = 0, 0
            cpu, clock = time.process_time(), time.perf_counter()
            for read, ids in epoch(number):
                count += read
                if number == 0:
                    total += int(np.asarray(ids).sum(dtype=np.int64))
            elapsed = time.process_time() - cpu, time.perf_counter() - clock
            if count != samples:
                raise SystemExit(f"{name} gave {count} of {samples} samples")
            if number == 0:
                sums.add(total)
            else:
                seconds[name].append(elapsed)
    if len(sums) != 1:
        raise SystemExit(f"readers disagree about the sum of ids: {sums}")
    return seconds


def summary(
    name: str, stored: float, seconds: dict[str, list[tuple[float, float]]], positions: int
) -> dict[str, Any]:
    """One row. CPU time counts, which other jobs disturb least; of workers it is the clock's."""
    kind = 1 if "workers" in name else 0
    own = [epoch[kind] for epoch in seconds[name]]
    # Of each round: the limit of the same round saw the same load.
    ratios = [a[kind] / b for a, b in zip(seconds[LIMIT], own, strict=True)]
    return {
        "reader": name,
        "time": ("cpu", "clock")[kind],
        "bytes_per_token": stored,
        "tokens_per_s": positions / statistics.median(own),
        "seconds": seconds[name],
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--samples", type=int, default=512, help="of 2,048 positions")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
    samples, repeats = (16, 1) if options.tiny else (options.samples, options.repeats)
    size = {"vocab_size": 1000, "seq_len": 64, "k": 16} if options.tiny else {}
    workload = make_workload(sequences=min(samples, 32), **size)
    folder = Path(tempfile.mkdtemp(prefix="logitstore-read-"))
    try:
        for kind in ("arrow", "zarr"):
            write_store(folder / kind, kind, workload, samples)
        found = readers(folder, workload, samples)
        seconds = measure(found, samples, repeats)
    finally:
        shutil.rmtree(folder)
    positions = samples * workload.seq_len
    rows = [summary(name, stored, seconds, positions) for name, (stored, _) in found.items()]
    result = {
        "environment": environment(),
        "samples": samples,
        "positions": positions,
        "batch_size": BATCH_SIZE,
        "repeats": repeats,
        "targets": targets_of({row["reader"]: row for row in rows}),
        "rows": rows,
    }
    write_report(options.out, "read", result, page(result))
    print((options.out / "read.md").read_text(encoding="utf-8"))


def targets_of(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    faster = rows["zarr, arrays"]["tokens_per_s"] / rows["zarr-python"]["tokens_per_s"]
    arrow = rows["arrow, arrays"]["ratio"]
    return [
        ["uncompressed Arrow / memmap gather", f"{arrow:.2f}", "0.50", "0.80"],
        ["Zarr / zarr-python on the same files", f"{faster:.1f}", "5", ""],
    ]


def page(result: dict[str, Any]) -> str:
    lines = [
        [
            row["reader"],
            f"{row['bytes_per_token']:.0f}",
            f"{row['tokens_per_s'] / 1e6:.2f}",
            row["time"],
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = ["reader", "stored B/token", "Mtok/s", "time", "of the limit", "spread"]
    return "\n".join(
        [
            "# Reading a shuffled epoch",
            "",
            f"{result['samples']} samples, {result['positions']} positions, batches of "
            f"{result['batch_size']}, one process, warm page cache; medians of {result['repeats']} "
            "interleaved epochs, ratios of the same round.",
            "",
            NOTES,
            "",
            *table(["target", "measured", "required", "stretch"], result["targets"]),
            "",
            *table(head, lines),
            "",
        ]
    )


if __name__ == "__main__":
    main()
