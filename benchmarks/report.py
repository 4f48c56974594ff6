"""What reports share: where they go, the machine and versions they name, tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["REPORTS", "environment", "table", "write_report"]

REPORTS = Path(__file__).resolve().parent / "reports"


def environment() -> dict[str, str]:
    """Versions, cores and load."""
    packages = ("numpy", "torch", "numcodecs", "pcodec", "pyarrow")
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_1min": f"{os.getloadavg()[0]:.1f}",
    }


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def write_report(folder: Path, name: str, result: dict[str, Any], page: str) -> None:
    """`<name>.json` with everything, `<name>.md` with the page and the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    facts = result["environment"]
    lines = [f"Command: `{facts['command']}`  "]
    lines += [", ".join(f"{k} {v}" for k, v in facts.items() if k != "command") + "  "]
    lines += ["The machine was shared with other jobs: read speeds to one digit.", ""]
    title, _, rest = page.partition("\n")
    text = "\n".join([title, "", *lines]) + rest
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
