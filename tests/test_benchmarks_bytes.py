"""The benchmarks of bytes and of error per byte run and write their reports; speeds are not looked
at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.source_tree import REPOSITORY


def run(name: str, out: Path) -> tuple[dict, str]:
    script = str(REPOSITORY / "benchmarks" / f"{name}.py")
    command = [sys.executable, script, "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=200)
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def test_bytes(tmp_path: Path) -> None:
    report, page = run("bytes", tmp_path)
    stored = [r for r in report["rows"] if r["coding"] in ("zarr", "arrow")]
    assert {r["signal"] for r in stored} >= {"topk:64", "sampled:50", "threshold:tau=1/40"}
    for row in stored:
        assert row["signal"] in page
        assert sum(row["columns"].values()) > row["bytes_per_token"] > 0
    by_coding = {r["coding"]: r for r in report["rows"] if r["signal"] == "sampled:50"}
    ranks = by_coding["zarr, ranks for ids"]
    assert 0 < ranks["bytes_per_token"] < by_coding["zarr"]["bytes_per_token"]
    assert by_coding["zarr"]["bytes_per_token"] < 0.65 * next(
        r["bytes_per_token"] for name, r in by_coding.items() if name.startswith("24-bit")
    )
    # A bound that a real coder beats is none; RS-KD's has no model of topics.
    for signal, bound in next(iter(report["bounds"].values())).items():
        if signal.startswith("topk") and bound:
            zarr = next(r for r in stored if (r["signal"], r["coding"]) == (signal, "zarr"))
            assert zarr["bytes_per_token"] > 0.95 * bound["total"]


def test_variance(tmp_path: Path) -> None:
    report, page = run("variance", tmp_path)
    assert (tmp_path / "variance.png").stat().st_size > 10_000
    arms = {(a["signal"], a["missing"]): a for a in report["arms"]}
    for (signal, _), arm in arms.items():
        assert signal in page
        # What one draw shows is what the closed form says.
        assert arm["error"] == pytest.approx(arm["expected"], abs=5 * arm["standard_error"])
    same_ids = report["checks"]["at RS-KD 50's ids"]
    assert 0 < same_ids < 0.6
    for tau in ("1/40", "1/50"):
        assert report["checks"]["rounding"][tau]["ids that vary more than RS-KD's"] == 0
    for found in report["checks"]["unbiased"].values():
        assert abs(found["excess"]) <= 5 * found["standard_error"]
    for scores in report["students"].values():
        assert np.isfinite(scores).all()
