"""The classification demos run, on a thirtieth of their data: scripts that nobody runs rot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitstore import store as stores
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("script", "asset", "samples"),
    [("classification", "fashion_mnist_dir", 1600), ("classification_text", "kjv_path", 100)],
)
def test_a_demo_captures_verifies_and_trains(script, asset, samples, tmp_path, request):
    request.getfixturevalue(asset)
    command = [sys.executable, str(REPOSITORY / "demo" / f"{script}.py"), "--quick"]
    environment = {**os.environ, "LOGITSTORE_DEMO_OUT": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / script.replace("_", "-")
    with stores.open(out / "store") as store:
        assert store.num_samples == samples
        assert store.header.sample_kind == "classification"
    report = Path(out / "report.md").read_text()
    assert report.count("| student, ") == (4 if script == "classification" else 2)
    assert report.splitlines()[-1] in done.stdout
