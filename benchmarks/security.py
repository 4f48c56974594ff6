"""The security figures: what was tried against parsers, service and pages, and what came of it.

    python benchmarks/security.py                    # the report in benchmarks/reports/
    python benchmarks/security.py --tiny --out X     # seconds; what the test runs
    python benchmarks/security.py --parts slow       # this again; the others stay in the report

Each part stands in a module of its own, `security_<part>.py`, which says what it does. Everything
runs in real processes: parsers, `logitstore serve`, `logitstore view`, the command line, Chromium.
Inputs follow from `--seed`. Ids (F13 to F22) are those of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import security_keys
from report import REPORTS, environment, write_report
from security_bombs import bombs
from security_fuzz import fuzz
from security_page import page
from security_pages import pages
from security_paths import paths
from security_pickles import pickles
from security_slow import slow
from security_stores import push

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = 300


def openapi(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """F14: what schemathesis makes of the description, answered by the application."""
    place = push(folder / "store")
    shard = next((place / "shards").iterdir()).name
    examples = 3 if tiny else EXAMPLES
    script = REPOSITORY / "tests" / "server" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, str(script), str(place), str(examples), shard],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout.splitlines()
    if not told or not told[-1].startswith("{"):
        raise SystemExit(f"schemathesis did not run: {done.stderr[-2000:]}")
    return {"examples": examples, **json.loads(told[-1])}


Part = Callable[..., dict[str, Any]]
PARTS: dict[str, Part] = {
    "paths": paths,
    "bombs": bombs,
    "pickles": pickles,
    "routes": security_keys.routes,
    "guessing": security_keys.guessing,
    "timing": security_keys.timing,
    "slow": slow,
    "pages": pages,
    "openapi": openapi,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--parts", nargs="*", choices=("fuzz", *PARTS), default=("fuzz", *PARTS))
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzed inputs")
    options = parser.parse_args()
    before = options.out / "security.json"
    result: dict[str, Any] = json.loads(before.read_text()) if before.exists() else {}
    for part in options.parts:
        print(f"{part} ...", flush=True)
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="logitstore-security-") as text:
            folder = Path(text).resolve()
            if part == "fuzz":
                found = fuzz(folder, options.seed, tiny=options.tiny)
            else:
                found = PARTS[part](folder, tiny=options.tiny)
        result[part] = {**found, "part_s": time.monotonic() - start_s}
    packages = ("uvicorn", "starlette", "fastapi", "pydantic", "schemathesis", "obstore", "zarr")
    result["environment"] = {**environment(), **{name: version(name) for name in packages}}
    # Parts may have been run one by one.
    tiny = " --tiny" if options.tiny else ""
    result["environment"]["command"] = f"python benchmarks/security.py --seed {options.seed}{tiny}"
    write_report(options.out, "security", result, page(result))
    print((options.out / "security.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
