"""Figures that tests measure: printed, and kept as files when LOGITSTORE_REPORTS names a folder."""

from __future__ import annotations

import os
from pathlib import Path


def report(name: str, *lines: str) -> None:
    """Publish one table or figure under a stable name."""
    text = "\n".join(lines)
    print(f"\n[{name}]\n{text}")
    folder = os.environ.get("LOGITSTORE_REPORTS")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.txt").write_text(text + "\n")
