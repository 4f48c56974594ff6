"""The reading benchmark runs, its readers agree, its report is written; times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.source_tree import REPOSITORY


def test_read(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "read.py")
    command = [sys.executable, script, "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=250)
    report = json.loads((tmp_path / "read.json").read_text())
    page = (tmp_path / "read.md").read_text()
    assert report["samples"] == 16
    assert {"arrow, arrays", "zarr, batches", "zarr-python"} <= {
        r["reader"] for r in report["rows"]
    }
    for row in report["rows"]:
        assert row["reader"] in page
        assert len(row["seconds"]) == report["repeats"]
