"""The viewer's benchmark runs and writes its report; times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.source_tree import REPOSITORY


def test_viewer_benchmark(browser, tmp_path):
    del browser  # skips where there is none
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "viewer.py"), "--tiny"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, timeout=250)
    report = json.loads((tmp_path / "viewer.json").read_text(encoding="utf-8"))
    page = (tmp_path / "viewer.md").read_text(encoding="utf-8")
    assert report["positions"] == 2048
    for row in report["pages"]:
        assert row["page"] in page
        for kind in ("cold", "warm"):
            assert 0 < row[kind]["response_s"] <= row[kind]["useful_s"]
    assert report["scroll"]["frames"] == 20
    assert 0 < report["scroll"]["tokens"] <= 1024
