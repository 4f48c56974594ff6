"""The loss benchmarks run and write their reports; times are not looked at."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

from tests.source_tree import REPOSITORY


def run(name: str, out) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / name), "--tiny", "--out", str(out)]
    # In a process of its own: peaks of memory are reset and read there.
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=200)


def test_losses(tmp_path):
    run("losses.py", tmp_path)
    report = json.loads((tmp_path / "losses.json").read_text())
    page = (tmp_path / "losses.md").read_text()
    declared = runpy.run_path(str(REPOSITORY / "benchmarks" / "losses.py"))["FROM_BOTH"]
    variants = {row["variant"] for row in report["rows"]}
    assert {*declared, *(f"{name}, dense" for name in declared)} <= variants
    for row in report["rows"]:
        assert row["baseline"] in variants
        assert row["variant"] in page


def test_fused_linear(tmp_path):
    run("fused_linear.py", tmp_path)
    results = json.loads((tmp_path / "fused_linear.json").read_text())["results"]
    assert {row["variant"] for row in results} == {"unfused", "fused"}
    first, *others = results
    for row in others:
        for name in ("loss", "grad_hidden", "grad_weight"):
            assert abs(row[name] - first[name]) <= 1e-5 * abs(first[name])
