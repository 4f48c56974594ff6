"""The HTTP benchmark runs, counts what it must, and writes its report; times are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.source_tree import REPOSITORY

NGINX = any(os.access(f"{folder}/nginx", os.X_OK) for folder in ("/usr/sbin", "/usr/local/sbin"))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="server and client need a core each")
def test_http(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "http_speed.py")
    command = [sys.executable, script, "--tiny", "--out", str(tmp_path)]
    told = subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=250)
    report = json.loads((tmp_path / "http.json").read_text())
    page = (tmp_path / "http.md").read_text()
    opened = report["opening"]
    assert opened["logitstore"]["shards"] == opened["disk"]["shards"] == 20
    assert opened["logitstore"]["requests"] == 2
    assert {row["read"] for row in report["epochs"]} >= {"disk", "warm cache", "no cache"}
    assert all(row["requests"] for part in ("shards", "ranges", "load") for row in report[part])
    assert report["memory"]["samples"]["rows"] == 40
    for what, _, _ in report["targets"]:
        assert what in page
    servers = {row["server"] for row in report["shards"]}
    assert servers == ({"nginx", "logitstore"} if NGINX else {"logitstore"})
    assert bool(report["skipped"]) == (not NGINX) == (b"apt-get install nginx" in told.stdout)
