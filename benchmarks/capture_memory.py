"""Capture: peak memory against sequence length and vocabulary, and wall time against the teacher.

    python benchmarks/capture_memory.py                        # report in benchmarks/reports/
    python benchmarks/capture_memory.py --teacher hf:FOLDER    # and the time of a real teacher
    python benchmarks/capture_memory.py --tiny --out X         # seconds; what the test runs

Memory: each case is a process of its own that encodes one micro-batch of two samples; its peak
resident size less that before the micro-batch counts. "blocks" applies the output layer to blocks
of rows, as capture does; "whole" asks the model for all logits, as a plain script would.

Time: the same windows through the teacher alone (backbone and output layer, logits dropped) and
through the whole capture into a store on disk, in turns; the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import REPORTS, environment, table, write_report

LENGTHS = (256, 512, 1024, 2048)
VOCABULARIES = (49_152, 128_256)
SAMPLES = 2


def peak_of(mode: str, length: int, vocab_size: int) -> float:
    """MiB that one micro-batch adds to this process's peak; run in a process of its own."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from logitstore.capture.chunks import encode_samples
    from logitstore.corpora import ByteTokenizer, Sample
    from logitstore.record.new_header import new_header
    from logitstore.signals import encoder
    from logitstore.spec.header import TeacherInfo
    from logitstore.spec.signals import parse_signal
    from logitstore.teachers.causal_lm import CausalLM
    from logitstore.teachers.folder import LoadedFolder

    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    ).eval()
    loaded = LoadedFolder(name="random", path=Path(), model=model, tokenizer=None, threads=1)
    teacher = CausalLM(loaded, ByteTokenizer(vocab_size))
    assert teacher.settings["head"] == "blocks"
    if mode == "whole":
        teacher._blocks = False
    header = new_header(
        parse_signal(f"topk:{min(64, vocab_size)}"),
        vocab_size=vocab_size,
        configuration={},
        teacher=TeacherInfo(name="random"),
    )
    rng = np.random.default_rng(0)

    def samples(count: int, size: int) -> list[Sample]:
        zeros = np.zeros(size, np.int64)
        return [
            Sample(f"{i}", rng.integers(0, vocab_size, size), zeros, zeros) for i in range(count)
        ]

    encode = encoder(header)
    warm_up = samples(1, 16)
    encode_samples(encode, header, warm_up, teacher.blocks(warm_up))
    batch = samples(SAMPLES, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encode_samples(encode, header, batch, teacher.blocks(batch))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def isolated_peak_of(mode: str, length: int, vocab_size: int) -> float:
    case = [mode, str(length), str(vocab_size)]
    command = [sys.executable, __file__, "--case", *case]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(
    lengths: tuple[int, ...],
    vocabularies: tuple[int, ...],
    peak: Callable[[str, int, int], float],
) -> list[dict[str, Any]]:
    rows = []
    for vocab_size in vocabularies:
        for length in lengths:
            row: dict[str, Any] = {"vocab_size": vocab_size, "length": length}
            row["logits_mib"] = SAMPLES * length * vocab_size * 4 / 2**20
            for mode in ("blocks", "whole"):
                row[f"{mode}_mib"] = peak(mode, length, vocab_size)
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def measure_time(teacher: str, corpus: Path, tokens: int, repeats: int, threads: int) -> Any:
    """Seconds of teacher alone and of capture for the same windows, in turns."""
    from logitstore.capture.run import header_for
    from logitstore.capture.settings import CaptureSettings
    from logitstore.capture.worker import Work, capture_shards, micro_batches
    from logitstore.corpora import Corpus, find_files, plan_units
    from logitstore.record.new_header import now
    from logitstore.spec.plan import CorpusInfo, Plan, ShardPlan, plan_fingerprint
    from logitstore.spec.signals import parse_signal
    from logitstore.store import create
    from logitstore.teachers import TeacherOptions, load_teacher

    settings = CaptureSettings(teacher=teacher, corpus=(str(corpus),), out="", signal="topk:64")
    loaded = load_teacher(teacher, TeacherOptions(threads=threads))
    files = find_files([str(corpus)])
    source = Corpus(files)
    (unit,) = plan_units(
        source.documents(),
        unit_tokens=float("inf"),
        tokens_of=lambda d: len(loaded.tokenizer.encode(d.text).ids),
        max_tokens=tokens,
    )
    header, tables = header_for(settings, parse_signal(settings.signal), loaded)
    shard = ShardPlan(shard="0001-000000", spans=unit.spans, max_tokens=unit.max_tokens)
    info = CorpusInfo(format="text", files=(), documents=1, fingerprint="0" * 64)
    digest = header.configuration_sha256
    plan = Plan(
        store_uuid=header.store_uuid,
        number=1,
        kind="corpus",
        created=now(),
        configuration_sha256=digest,
        corpus=info,
        shards=(shard,),
        fingerprint=plan_fingerprint(digest, 1, info, (shard,)),
    )
    seconds: dict[str, list[float]] = {"teacher": [], "capture": []}
    for _ in range(repeats + 1):  # the first turn warms up
        with tempfile.TemporaryDirectory() as folder:
            writer = create(folder, header, tables)
            writer.add_plan(plan)
            work = Work(writer, plan, source, loaded, settings.micro_batch)
            batches = list(micro_batches(work.samples(shard), settings.micro_batch))
            start_s = time.perf_counter()
            for batch in batches:
                for _block in loaded.blocks(batch):
                    pass
            seconds["teacher"].append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            capture_shards(work, [shard], lambda event: None)
            seconds["capture"].append(time.perf_counter() - start_s)
            writer.close()
    seconds = {name: values[1:] for name, values in seconds.items()}
    ratios = [c / t for t, c in zip(seconds["teacher"], seconds["capture"], strict=True)]
    return {
        "teacher": Path(teacher).name,
        "tokens": tokens,
        "threads": threads,
        "seconds": seconds,
        "ratio_median": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def page(result: dict[str, Any]) -> str:
    head = ["V", "T", "all logits, MiB", "peak in blocks, MiB", "peak whole, MiB"]
    lines = [
        [
            f"{r['vocab_size']:,}",
            str(r["length"]),
            f"{r['logits_mib']:.0f}",
            f"{r['blocks_mib']:.0f}",
            f"{r['whole_mib']:.0f}",
        ]
        for r in result["memory"]
    ]
    text = [
        "# Capture: memory and overhead",
        "",
        "Peak resident memory that a micro-batch of two samples adds, in blocks of rows (as",
        "capture does) and with all logits at once; a model of 2 layers, 64 wide, top-64.",
        "",
        *table(head, lines),
        "",
    ]
    if result["time"]:
        head = ["teacher", "threads", "tokens", "teacher, s", "capture, s", "ratio", "spread"]
        lines = [
            [
                t["teacher"],
                str(t["threads"]),
                f"{t['tokens']:,}",
                f"{statistics.median(t['seconds']['teacher']):.1f}",
                f"{statistics.median(t['seconds']['capture']):.1f}",
                f"{t['ratio_median']:.2f}",
                f"{t['ratio_spread'][0]:.2f} to {t['ratio_spread'][1]:.2f}",
            ]
            for t in result["time"]
        ]
        text += [
            "Wall time of a capture against the teacher alone over the same windows, in turns.",
            "",
            *table(head, lines),
            "",
        ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument("--teacher", help="hf:FOLDER or py:module:function, for the time")
    parser.add_argument("--corpus", type=Path, help="a text file, for the time")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        mode, length, vocab_size = given.case
        print(peak_of(mode, int(length), int(vocab_size)))
        return
    lengths, vocabularies = ((64,), (2048,)) if given.tiny else (LENGTHS, VOCABULARIES)
    result = {
        "environment": environment(),
        # A tiny run shares one process: its peaks mean nothing, and it does not import four times.
        "memory": measure_memory(
            lengths, vocabularies, peak_of if given.tiny else isolated_peak_of
        ),
        "time": [
            measure_time(given.teacher, given.corpus, given.tokens, given.repeats, threads)
            for threads in given.threads
            if given.teacher
        ],
    }
    write_report(given.out, "capture_memory", result, page(result))


if __name__ == "__main__":
    main()
