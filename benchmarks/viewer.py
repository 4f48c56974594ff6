"""How soon a page of a store of a million positions is useful, and how a long sample scrolls.

    python benchmarks/viewer.py                  # the report in benchmarks/reports/
    python benchmarks/viewer.py --tiny --out X   # seconds; what the test runs

A `logitstore view` process serves stores, Chromium opens the pages. Times are the browser's own:
from the start of the navigation until the response began, until the page was loaded, and until it
was useful: charts drawn, or the text coloured and the panel filled. *Cold* is the first page that a
new process and a new browser profile see; *warm* is a new profile afterwards, the median of the
repeats. Needs Chromium; LOGITSTORE_CHROMIUM names one that is not on the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright
from report import REPORTS, environment, table, write_report
from workload import Workload, make_workload

import logitstore.store
from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.record.statistics import merge, statistics_of
from logitstore.spec.header import Header, Packing, TeacherInfo
from logitstore.spec.plan import shard_name
from logitstore.spec.signals import parse_signal

SHARDS = 16
# Page -> address, and what holds once it is useful.
CHARTS = "document.querySelectorAll('.chart canvas').length > 2"
HEAT = "document.querySelectorAll('.tk').length > 40 && document.querySelector('#panel .top-k')"
PAGES = {
    "store": ("/stores/million/overview", CHARTS),
    "sample": ("/stores/million/samples/7", HEAT),
    "find, least sure first": (
        "/stores/million/find?measure=entropy",
        "document.querySelector('.results')",
    ),
    "sample of 32,768 tokens": ("/stores/long/samples/0?position=20000", HEAT),
}
TARGETS_S = {"warm": 1.0, "cold": 3.0}
SCROLL = """frames => new Promise(done => {
  let last = performance.now(), most = 0, tokens = 0, left = frames;
  const times = [];
  const step = () => {
    const now = performance.now();
    times.push(now - last);
    last = now;
    most = Math.max(most, document.querySelectorAll('*').length);
    tokens = Math.max(tokens, document.querySelectorAll('.tk').length);
    if (left-- === 0) done({ times: times.slice(1), elements: most, tokens });
    else { scrollBy(0, 400); requestAnimationFrame(step); }
  };
  requestAnimationFrame(step);
})"""


def write_store(folder: Path, workload: Workload, samples: int, shards: int) -> None:
    """The workload's sequences in turn, one chunk a sample."""
    header = new_header(
        parse_signal(f"topk:{workload.ids.shape[1]}"),
        vocab_size=workload.vocab_size,
        configuration={},
        teacher=TeacherInfo(name="benchmark"),
        packing=Packing(seq_len=workload.seq_len),
        chunk_positions=workload.seq_len,
    )
    unique = len(workload.tokens) // workload.seq_len
    with logitstore.store.create(folder, header) as writer:
        plan = writer.add_push_plan()
        for shard in range(shards):
            parts = []
            with writer.begin(shard_name(plan.number, shard), plan) as attempt:
                for number in range(shard, samples, shards):
                    record = record_of(header, workload, number % unique, number)
                    attempt.add(record)
                    parts.append(statistics_of(record))
                attempt.commit(statistics=merge(parts))
        writer.seal()


def record_of(header: Header, workload: Workload, sequence: int, number: int) -> Record:
    length = workload.seq_len
    rows = slice(sequence * length, (sequence + 1) * length)
    key = f"text#{number}@0".encode()
    probs, tail = workload.probs[rows], workload.tail[rows]
    # Of the candidates and the tail as one: enough for a histogram that looks like one.
    entropy = -(probs * np.log(probs)).sum(-1) - tail * np.log(tail)
    columns: dict[str, Any] = {
        "sample_lengths": [length],
        "num_sample_key": [len(key)],
        "sample_key": np.frombuffer(key, np.uint8),
        "segment_ids": np.zeros(length),
        "tokens": workload.tokens[rows],
        "label_logprob": workload.label_logprobs()[rows],
        "label_rank": (workload.ids[rows] != workload.tokens[rows, None]).cumprod(-1).sum(-1),
        "entropy": entropy,
        "log_tail": np.log(tail),
        "lse": np.full(length, 20.0),
        "ids": workload.ids[rows],
        "logprobs": np.log(probs),
    }
    return Record(
        header.schema_,
        {c.name: np.asarray(columns[c.name]).astype(c.dtype) for c in header.schema_.columns},
    )


@contextmanager
def viewing(folder: Path) -> Iterator[tuple[str, float]]:
    """The address of a viewer in a process of its own, and the seconds until it told it."""
    code = "from logitstore_cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "view",
        "million",
        "long",
        "--port",
        "0",
        "--no-browser",
        "--quiet",
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        try:
            address = viewer.stdout.readline().strip().rstrip("/")
            yield address, time.perf_counter() - started
        finally:
            viewer.terminate()


def visit(browser: Any, address: str, useful: str) -> dict[str, float]:
    """Seconds until a page in a new profile responded, was loaded, was useful."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto(address, wait_until="commit")
    until = 0.0
    for _ in range(6000):
        until = page.evaluate(f"({useful}) ? performance.now() : 0")
        if until:
            break
        page.wait_for_timeout(5)
    page.wait_for_load_state("load")
    told = page.evaluate(
        "(n => [n.responseStart, n.loadEventEnd])(performance.getEntriesByType('navigation')[0])"
    )
    context.close()
    if not until:
        raise SystemExit(f"{address} never became useful")
    return {"response_s": told[0] / 1e3, "load_s": told[1] / 1e3, "useful_s": until / 1e3}


def scroll(browser: Any, address: str, frames: int) -> dict[str, Any]:
    """Frame times while a long sample scrolls by 400 pixels a frame, and how large the page is."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto(address, wait_until="load")
    told = page.evaluate(SCROLL, frames)
    context.close()
    times = sorted(told["times"])
    return {
        "frames": len(times),
        "median_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))],
        "max_ms": times[-1],
        "elements": told["elements"],
        "tokens": told["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    repeats = 1 if options.tiny else options.repeats
    samples, length, long = (32, 64, 1024) if options.tiny else (512, 2048, 32768)
    folder = Path(tempfile.mkdtemp(prefix="logitstore-viewer-"))
    try:
        size = {"vocab_size": 1000 if options.tiny else 128_256, "k": 16}
        write_store(
            folder / "million",
            make_workload(sequences=min(samples, 8), seq_len=length, **size),
            samples,
            SHARDS,
        )
        write_store(folder / "long", make_workload(sequences=1, seq_len=long, **size), 1, 1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("LOGITSTORE_CHROMIUM") or shutil.which("chromium"),
                args=["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])],
            )
            rows = measure(browser, folder, repeats, list(PAGES)[: 2 if options.tiny else None])
            with viewing(folder) as (address, _):
                scrolled = scroll(
                    browser, f"{address}/stores/long/samples/0", 20 if options.tiny else 300
                )
            browser.close()
    finally:
        shutil.rmtree(folder)
    result = {
        "environment": environment(),
        "samples": samples,
        "positions": samples * length,
        "shards": SHARDS,
        "long_positions": long,
        "repeats": repeats,
        "pages": rows,
        "scroll": scrolled,
    }
    write_report(options.out, "viewer", result, page_of(result))
    print((options.out / "viewer.md").read_text(encoding="utf-8"))


def measure(browser: Any, folder: Path, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """Each page, first of a server of its own and then again."""
    rows = []
    for name in names:
        path, useful = PAGES[name]
        with viewing(folder) as (address, started_s):
            cold = visit(browser, address + path, useful)
            warm = [visit(browser, address + path, useful) for _ in range(repeats)]
        rows.append(
            {
                "page": name,
                "server_start_s": started_s,
                "cold": cold,
                "warm": {key: statistics.median(w[key] for w in warm) for key in cold},
                "warm_worst_s": max(w["useful_s"] for w in warm),
            }
        )
    return rows


def page_of(result: dict[str, Any]) -> str:
    lines = [
        [
            row["page"],
            *(f"{row['warm'][key]:.2f}" for key in ("response_s", "load_s", "useful_s")),
            f"{row['warm_worst_s']:.2f}",
            f"{row['cold']['useful_s']:.2f}",
            f"{row['server_start_s']:.1f}",
        ]
        for row in result["pages"]
    ]
    head = ["page", "response", "loaded", "**useful**", "worst", "useful, cold", "server start"]
    first = result["pages"][0]
    targets = [
        [f"first useful page, {kind}", f"{first[kind]['useful_s']:.2f} s", f"< {limit:.0f} s"]
        for kind, limit in TARGETS_S.items()
    ]
    scrolled = result["scroll"]
    return "\n".join(
        [
            "# The viewer",
            "",
            f"A sealed store of {result['positions']:,} positions in {result['shards']} shards, "
            f"top-16; seconds in Chromium, warm ones the median of {result['repeats']}. "
            "*Response*: the server began to answer; *useful*: charts drawn, or text coloured and "
            "the panel filled.",
            "",
            *table(["target", "measured", "required"], targets),
            "",
            *table(head, lines),
            "",
            f"Scrolling {result['long_positions']:,} tokens by 400 pixels a frame, "
            f"{scrolled['frames']} frames: median {scrolled['median_ms']:.0f} ms, "
            f"95 % below {scrolled['p95_ms']:.0f} ms, longest {scrolled['max_ms']:.0f} ms; at most "
            f"{scrolled['tokens']:,} tokens and {scrolled['elements']:,} elements in the page.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
