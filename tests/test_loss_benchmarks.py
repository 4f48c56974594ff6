"""The loss benchmarks run and write their reports; times are not looked at."""

from __future__ import annotations

import json
import runpy

from logitstore import losses
from tests.source_tree import REPOSITORY


def load(name: str) -> dict:
    return runpy.run_path(str(REPOSITORY / "benchmarks" / name))


def test_losses(tmp_path):
    benchmark = load("losses.py")
    benchmark["main"](["--tiny", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "losses.json").read_text())
    page = (tmp_path / "losses.md").read_text()
    variants = {row["variant"] for row in report["rows"]}
    # Every loss stands beside its dense form.
    for name in losses.LOSSES:
        ours = {v for v in variants if v.split(",")[0] == name and not v.endswith("dense")}
        assert ours, name
        assert {f"{variant}, dense" for variant in ours} <= variants
    for row in report["rows"]:
        assert row["baseline"] in variants
        assert row["variant"] in page


def test_fused_linear(tmp_path):
    # Each variant is measured in a process of its own.
    load("fused_linear.py")["main"](["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "fused_linear.json").read_text())["results"]
    assert {row["variant"] for row in results} == {"unfused", "fused"}
    first, *others = results
    for row in others:
        for name in ("loss", "grad_hidden", "grad_weight"):
            assert abs(row[name] - first[name]) <= 1e-5 * abs(first[name])
