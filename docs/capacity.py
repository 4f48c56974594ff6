"""Write the capacity table of docs/serving.md from the report of the HTTP benchmark.

    python docs/capacity.py

The table stands between two markers of the page. It has a row for each entry of the report's list
`capacity`: `{"what": ..., "service": ..., "beside": {"nginx": ..., ...}, "unit": ...}`, where the
numbers are medians and everything of `beside` was measured in the same run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = REPOSITORY / "benchmarks/reports/http.json"
PAGE = REPOSITORY / "docs/serving.md"
START, END = "<!-- capacity: written by docs/capacity.py -->", "<!-- end of capacity -->"
UNMEASURED = "Not measured yet: `benchmarks/reports/http.json` is not there."


def table(report: dict[str, Any]) -> str:
    """The rows of a report as Markdown."""
    rows = report["capacity"]
    others = list(dict.fromkeys(name for row in rows for name in row["beside"]))
    head = ["", "service", *others, "unit"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(others) + 1) + " --- |"]
    for row in rows:
        numbers = [row["service"], *(row["beside"].get(name) for name in others)]
        cells = [row["what"], *map(_number, numbers), row["unit"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page_text(page: str, report: dict[str, Any] | None) -> str:
    """The page with the table of a report in it."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} lacks the markers"
    inside = UNMEASURED if report is None else table(report)
    return f"{before}{START}\n\n{inside}\n\n{END}{after}"


def read_report() -> dict[str, Any] | None:
    """The benchmark's report, None before its first run."""
    return json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8"), read_report()), encoding="utf-8")
