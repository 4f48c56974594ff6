"""Bytes per token and coding speed of every signal, container and option.

    python benchmarks/bytes.py                  # the report in benchmarks/reports/, some minutes
    python benchmarks/bytes.py --tiny --out X   # seconds; what the test runs
    python benchmarks/bytes.py --models smollm2 qwen gemma

Two sources: a synthetic workload at V = 128,256 (`workload.py`) and the logits of real models over
the King James Bible and the Python documentation (`real_rows.py`; a model that is not in
`.cache/models` is named as skipped). Both are written through the product's own containers in
chunks of 2,048 positions and read back; other codings of the same arrays and the entropy bounds
(`bounds.py`) stand beside them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from bounds import entropy_bits, rskd_bound, set_bound, topk_bound
from codings import CODINGS, pack_entries, unpack_entries
from real_rows import MODELS, model_folder
from report import REPORTS, environment, table, write_report
from sources import EVERYTHING, Source, make_header, real_source, synthetic_source
from stored import Row, signal_columns, stored, timed
from workload import make_workload

from logitstore.containers.ranked import IdRanks, count_ids
from logitstore.record import Record
from logitstore.spec.header import Header
from logitstore.spec.signals import Q8_STEP


def other_codings(source: str, header: Header, records: list[Record], repeats: int) -> list[Row]:
    """The signal's columns of each chunk in the codings of `codings.py`."""
    own = [n for n in signal_columns(header) if n != "top1_logprob"]
    chunks = []
    for record in records:
        chunk = {name: record[name] for name in own}
        for name in ("counts", "num_ids"):  # as narrow as a careful writer would make them
            if name in chunk and chunk[name].max() < 256:
                chunk[name] = chunk[name].astype(np.uint8)
        chunks.append(chunk)
    positions = sum(r.num_positions for r in records)
    rows = []
    for coding in CODINGS:
        data = [coding.encode(chunk) for chunk in chunks]
        for part, chunk in zip(data, chunks, strict=True):
            for name, array in coding.decode(part, chunk).items():
                assert np.array_equal(array, chunk[name]), (coding.name, name)
        encode_s = timed(lambda c=coding: [c.encode(x) for x in chunks], max(1, repeats // 2))
        decode_s = timed(
            lambda c=coding, d=data: [c.decode(x, y) for x, y in zip(d, chunks, strict=True)],
            repeats,
        )
        rows.append(
            coding_row(
                source, header, coding.name, sum(map(len, data)), positions, encode_s, decode_s
            )
        )
    return rows


def packed_entries(source: str, header: Header, records: list[Record], repeats: int) -> Row:
    """24-bit entries, and a length byte where positions differ in length."""
    id_bits = 17 if header.vocab_size <= 1 << 17 else 18
    most = (1 << (24 - id_bits)) - 1
    positions = sum(r.num_positions for r in records)
    parts = []
    for record in records:
        if header.signal.kind == "topk":
            small = np.rint(np.exp(record["logprobs"].astype(np.float32)) * most)
        else:
            # 6 bits hold 1 to 64 when 1 is taken off
            small = record["counts"] - (1 if id_bits == 18 else 0)
        parts.append((record["ids"], small))
    data = [pack_entries(ids, small, id_bits) for ids, small in parts]
    for part, (ids, small) in zip(data, parts, strict=True):
        back = unpack_entries(part, id_bits)
        assert np.array_equal(back[0], ids)
        assert np.array_equal(back[1], small)
    encode_s = timed(lambda: [pack_entries(*part, id_bits) for part in parts], repeats)
    decode_s = timed(lambda: [unpack_entries(part, id_bits) for part in data], repeats)
    size = sum(part.nbytes for part in data)
    if header.signal.kind != "topk":
        size += positions
    name = f"24-bit entries ({id_bits} + {24 - id_bits})"
    return coding_row(source, header, name, size, positions, encode_s, decode_s)


def with_ranks(source: str, header: Header, records: list[Record], repeats: int) -> Row:
    """Ranks for ids in the zarr container, even chunks by the order of the odd ones and the other
    way round."""
    header = make_header(
        str(header.signal), header.vocab_size, rank_ids=True, aux=header.stored_fields
    )
    rows = []
    for half, other in ((records[::2], records[1::2]), (records[1::2], records[::2])):
        counts = sum(count_ids(record, header.vocab_size) for record in other)
        rows.append(stored(source, header, half, repeats, IdRanks.by_frequency(counts)))
    columns = {name: statistics.mean(row.columns[name] for row in rows) for name in rows[0].columns}
    return replace(
        rows[0],
        coding="zarr, ranks for ids",
        bytes_per_token=statistics.mean(row.bytes_per_token for row in rows),
        columns=columns,
        encode=statistics.mean(row.encode for row in rows),
        decode=statistics.mean(row.decode for row in rows),
        spread=(min(row.spread[0] for row in rows), max(row.spread[1] for row in rows)),
    )


def coding_row(
    source: str,
    header: Header,
    name: str,
    size: int,
    positions: int,
    encode_s: list[float],
    decode_s: list[float],
) -> Row:
    return Row(
        source,
        str(header.signal),
        name,
        size / positions,
        {},
        positions / statistics.median(encode_s) / 1e6,
        positions / statistics.median(decode_s) / 1e6,
        (positions / max(decode_s) / 1e6, positions / min(decode_s) / 1e6),
    )


def bounds_of(header: Header, records: list[Record]) -> dict[str, float]:
    """The entropy bound of a signal's arrays over all records together."""
    kind = header.signal.kind
    joined = {n: np.concatenate([r[n] for r in records]) for n in signal_columns(header)}
    if kind == "topk" and header.signal.p is None:
        ids = joined["ids"].astype(np.int64)
        if header.signal.coding == "q8":
            steps = np.rint(joined["logprobs"].astype(np.float64) / -Q8_STEP).astype(np.int64)
        else:
            steps = joined["logprobs"].view(np.uint16).astype(np.int64)
        return topk_bound(ids, steps)
    if kind == "sampled":
        counts = joined["num_ids"].astype(np.int64)
        draws = joined["counts"].astype(np.int64)
        return rskd_bound(counts, joined["ids"].astype(np.int64), draws)
    if kind == "threshold":
        positions = len(joined["num_heads"])
        parts = {
            "head ids": set_bound(joined["head_ids"], positions),
            "tail ids": set_bound(joined["tail_ids"], positions),
        }
        return {**parts, "total": sum(parts.values())}
    if kind == "dense" and header.signal.dtype == "float16":
        values = joined["logits"]
        bits = entropy_bits(values.view(np.uint16))
        return {"logits": bits * values.shape[1] / 8, "total": bits * values.shape[1] / 8}
    return {}


# The report


def measure_source(
    source: str,
    signals: Source,
    repeats: int,
    log: Callable[[str], None],
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    rows, bounds = [], {}
    for signal, by_kind in signals.items():
        log(f"{source}: {signal}")
        for kind, (header, records) in by_kind.items():
            row = stored(source, header, records, repeats)
            rows.append(replace(row, signal=signal))
            if kind != "zarr" or signal == EVERYTHING:
                continue
            if header.signal.kind in ("topk", "sampled", "threshold"):
                rows.append(with_ranks(source, header, records, repeats))
            if header.signal.kind in ("topk", "sampled", "threshold", "dense"):
                rows += other_codings(source, header, records, repeats)
                bounds[signal] = bounds_of(header, records)
            if header.signal.kind == "sampled" or signal == "topk:64":
                rows.append(packed_entries(source, header, records, repeats))
    return rows, bounds


SYNTHETIC_SIGNALS = (
    "topk:64",
    "topk:64,coding=q8",
    "topk:64,p=0.95",
    "sampled:50",
    "threshold:tau=1/40",
    "threshold:tau=1/50",
)
REAL_SIGNALS = (
    *SYNTHETIC_SIGNALS,
    "topk:64,p=0.95,coding=q8",
    "sampled:50,power=0.9",
    "threshold:k=12",
    "graph:k=10",
    "graph:k=10,form=vocab",
)


# Signals whose arrays are listed with ranks for ids, too.
RANKED_IN_FULL = ("topk:64", "sampled:50", "threshold:tau=1/40")

# Dense records are measured on this many positions: a token takes 100 to 500 KB.
DENSE_POSITIONS = 256


def targets_of(rows: list[Row], bounds: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """What was asked for, what came out."""

    def row(source: str, signal: str, coding: str) -> Row:
        found = [r for r in rows if (r.source, r.signal) == (source, signal)]
        return next(r for r in found if r.coding == coding or r.coding.startswith(coding + " "))

    synthetic_name = next(r.source for r in rows if r.source.startswith("synthetic"))
    rskd = row(synthetic_name, "sampled:50", "zarr").bytes_per_token
    rskd_packed = row(synthetic_name, "sampled:50", "24-bit entries").bytes_per_token
    topk = row(synthetic_name, "topk:64", "zarr").bytes_per_token
    q8 = row(synthetic_name, "topk:64,coding=q8", "zarr").bytes_per_token
    topk_packed = row(synthetic_name, "topk:64", "24-bit entries").bytes_per_token
    topk_bound_bytes = bounds[synthetic_name]["topk:64"]["total"]
    rskd_ranks = row(synthetic_name, "sampled:50", "zarr, ranks for ids").bytes_per_token
    topk_ranks = row(synthetic_name, "topk:64", "zarr, ranks for ids").bytes_per_token
    lines = [
        ("RS-KD N = 50 / 24-bit entries, synthetic", rskd / rskd_packed, 0.65, "0.60"),
        ("the same, ranks for ids", rskd_ranks / rskd_packed, 0.65, "0.60"),
        ("top-64 lossless / its bound, synthetic", topk / topk_bound_bytes, 1.06, "1.04"),
        ("the same, ranks for ids", topk_ranks / topk_bound_bytes, 1.06, "1.04"),
        ("top-64 q8 / 24-bit entries, synthetic", q8 / topk_packed, 0.70, ""),
    ]
    for source in dict.fromkeys(r.source for r in rows if r.source != synthetic_name):
        c = row(source, "topk:64", "zarr").columns
        scalars = c["label_logprob"] + c["entropy"] + c["log_tail"]
        lines += [
            (f"label_logprob + entropy + log_tail, {source}, B/token", scalars, 5.0, ""),
            (f"lse, {source}, B/token", c["lse"], 3.1, ""),
            (f"tokens, {source}, B/token", c["tokens"], 1.6, ""),
        ]
    return [
        [name, f"{value:.3f}", f"{most:.2f}", stretch, "met" if value <= most else "MISSED"]
        for name, value, most, stretch in lines
    ]


QUESTION = """\
How many bytes does a token's record take, in which array, and how fast is it written and read?

"B/token" counts the signal's own arrays; tokens, aux fields and the object's ZIP or IPC envelope
stand in the table by array. Speeds are of one core, the median of runs on the signal's decoded
arrays (slowest to fastest decode in brackets); every value read back was compared with what was
written. The bound is the entropy of context-free coders (`bounds.py`); for threshold it covers ids
alone. 24-bit entries keep RS-KD's counts exactly but round top-K probabilities to 7 or 6 bits.
"Ranks for ids" is `--rank-ids`, each half of the chunks by the other half's order. Dense records
are of a few hundred positions; "every optional field" is topk:1 with all aux fields, `lse_at` for
two temperatures and four always-ids.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--models", nargs="*", default=["smollm2", "qwen", "gemma"], choices=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.tiny else options.repeats
    size = {"vocab_size": 1000, "sequences": 2, "seq_len": 64} if options.tiny else {}
    workload = make_workload(**size)
    source = f"synthetic V={workload.vocab_size}"

    def log(line: str) -> None:
        print(line, flush=True)

    signals = synthetic_source(workload, SYNTHETIC_SIGNALS)
    rows, bounds_found = measure_source(source, signals, repeats, log)
    bounds = {source: bounds_found}
    skipped = []
    for model in [] if options.tiny else options.models:
        if model_folder(model) is None:
            skipped.append(f"{model}: not in .cache/models")
            log(f"skipped {skipped[-1]}")
            continue
        real = real_source(model, 4, 1024, REAL_SIGNALS, DENSE_POSITIONS)
        vocab_size = next(iter(real.values()))["zarr"][0].vocab_size
        name = f"{model} V={vocab_size}"
        more, bounds[name] = measure_source(name, real, repeats, log)
        rows += more

    goals = targets_of(rows, bounds)
    result = {
        "environment": environment(),
        "repeats": repeats,
        "skipped": skipped,
        "targets": goals,
        "rows": [asdict(r) for r in rows],
        "bounds": bounds,
    }
    write_report(options.out, "bytes", result, page(rows, bounds, goals, skipped, repeats))


def _speed(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def page(
    rows: list[Row],
    bounds: dict[str, dict[str, dict[str, float]]],
    goals: list[list[str]],
    skipped: list[str],
    repeats: int,
) -> str:
    out = ["# Bytes per token and coding speed", "", QUESTION]
    out += [f"Runs: {repeats} of every decode, {max(1, repeats // 2)} of every encode."]
    out += [f"Skipped: {'; '.join(skipped)}." if skipped else "", "## Targets", ""]
    out += table(["what", "measured", "required at most", "stretch", ""], goals)
    for source in dict.fromkeys(r.source for r in rows):
        of_source = [r for r in rows if r.source == source]
        out += ["", f"## {source}", ""]
        lines = []
        for r in of_source:
            bound = bounds[source].get(r.signal, {}).get("total")
            lines.append(
                [
                    r.signal,
                    r.coding,
                    f"{r.bytes_per_token:.1f}",
                    "" if bound is None else f"{r.bytes_per_token / bound:.2f}",
                    _speed(r.encode),
                    f"{_speed(r.decode)} ({_speed(r.spread[0])} to {_speed(r.spread[1])})",
                ]
            )
        out += table(
            ["signal", "coding", "B/token", "x bound", "encode Mtok/s", "decode Mtok/s"], lines
        )
        out += ["", f"### By array, zarr, {source}", ""]
        lines = [
            [
                r.signal + r.coding.removeprefix("zarr"),
                ", ".join(f"{n} {v:.2f}" for n, v in r.columns.items() if v >= 0.005),
            ]
            for r in of_source
            if r.coding.startswith("zarr") and (r.coding == "zarr" or r.signal in RANKED_IN_FULL)
        ]
        out += table(["signal", "B/token"], lines)
        out += ["", f"### Bounds, {source}", ""]
        lines = [
            [signal, ", ".join(f"{n} {v:.1f}" for n, v in parts.items())]
            for signal, parts in bounds[source].items()
            if parts
        ]
        out += table(["signal", "B/token"], lines)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
