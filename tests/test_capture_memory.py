"""The benchmark of capture's memory and overhead still runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_a_tiny_run_writes_its_report(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words to capture " * 20)
    subprocess.run(
        [
            *(sys.executable, "benchmarks/capture_memory.py", "--tiny", "--out", str(tmp_path)),
            *("--teacher", "py:tests.capture_teachers:bigram", "--corpus", str(corpus)),
            *("--tokens", "300", "--repeats", "1"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
    )
    result = json.loads((tmp_path / "capture_memory.json").read_text())
    (case,) = result["memory"]
    assert case["logits_mib"] == 1.0
    (timed,) = result["time"]
    assert timed["tokens"] == 300
    assert "| V | T |" in (tmp_path / "capture_memory.md").read_text()
