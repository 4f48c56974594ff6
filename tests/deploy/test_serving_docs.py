"""docs/serving.md: every promise names a test that there is, and its table is the benchmark's."""

from __future__ import annotations

import re
import runpy

from tests.source_tree import REPOSITORY

PAGE = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
TESTS = {
    file.name: file.read_text(encoding="utf-8")
    for file in (REPOSITORY / "tests").rglob("test_*.py")
}


def test_the_threat_model_names_tests_that_there_are() -> None:
    section = PAGE.partition("\n## Who may give us what\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 12
    for row in rows:
        held = re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", row.split(" | ")[-1])
        assert held, row
        file = ""
        for name, test in held:
            file = name or file
            assert file in TESTS, row
            assert f"def {test}" in TESTS[file], f"{file}::{test}"
    for giver in ("store", "manifest", "URL", "corpus", "model"):
        assert f"**{giver}**" in section


def test_the_capacity_table_is_that_of_the_report() -> None:
    module = runpy.run_path(str(REPOSITORY / "docs/capacity.py"))
    assert module["page_text"](PAGE, module["read_report"]()) == PAGE
    report = {
        "capacity": [
            {"what": "bytes", "service": 1234.5, "beside": {"nginx": 0.12345}, "unit": "MB/s"},
            {"what": "first byte", "service": 2.0, "beside": {}, "unit": "ms"},
        ]
    }
    assert module["table"](report).splitlines()[2:] == [
        "| bytes | 1,234 | 0.123 | MB/s |",
        "| first byte | 2 |  | ms |",
    ]


def test_security_says_whom_to_tell_and_when_they_hear() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    assert re.search(r"within \d+ working days", text)
    assert "## Supported versions" in text
    assert "## Scope" in text
    assert "#who-may-give-us-what" in text
