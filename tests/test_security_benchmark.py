"""The security figures are taken and written down; what they found tiny must be nothing."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.source_tree import REPOSITORY

# What the others measure has tests of its own: routes, keys, slow clients, pages, OpenAPI.
PARTS = ("fuzz", "paths", "bombs", "pickles")


def test_security(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "security.py")
    command = [sys.executable, script, "--tiny", "--out", str(tmp_path), "--parts", *PARTS]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=280)
    report = json.loads((tmp_path / "security.json").read_text())
    page = (tmp_path / "security.md").read_text()
    fuzzed = report["fuzz"]
    assert fuzzed["executions"] == 100
    assert (fuzzed["crashes"], fuzzed["hangs"]) == (0, 0), fuzzed["rows"]
    for row in report["paths"]["rows"]:
        assert row["tried"] > 20
        assert row["escaped"] == 0, row["found"]
    assert report["paths"]["connections_made"] == 0
    assert report["bombs"]["peak_mib"] < 64, report["bombs"]["rows"]
    # Every bomb was refused by name, not read and not died of.
    stores = [row for row in report["bombs"]["rows"] if row["to"] in ("zarr", "arrow")]
    assert {row["ended"] for row in stores} == {"chunk-malformed"}
    assert report["pickles"]["executed"] == 0
    for id_ in ("F13", "F15", "F16", "F17"):
        assert f"| {id_} |" in page
