"""docs/reliability.md promises nothing without a test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def test_every_promise_names_a_test_that_exists():
    text = PAGE.read_text()
    written = {path.name: path.read_text() for path in TESTS.glob("test_*.py")}
    promises = text.partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(?:test_\w+\.py::)?(test_\w+(?:\.py)?)`", row.split("|")[3])
        assert named, row
        for name in named:
            known = name in written or any(f"def {name}(" in code for code in written.values())
            assert known, f"{name} is promised and does not exist"
    for name in re.findall(r"`(test_\w+)\[", text):
        assert any(f"def {name}(" in code for code in written.values()), name
