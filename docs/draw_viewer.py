"""Take the screenshots of docs/viewer.md from real stores.

    python docs/draw_viewer.py TEXT GRAPH IMAGES

TEXT is a top-64 capture; a copy with 16 ids is made beside it for the comparison. GRAPH is one with
`--signal graph:k=16,form=vocab`, IMAGES a capture of Fashion-MNIST by `demo/classification.py`'s
teacher with `--keep-thumbnails --views 4 --aux entropy,top1_logprob,label_logprob,label_rank`.
Needs the development environment and Chromium (LOGITSTORE_CHROMIUM names one that is not on the
PATH).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

FIGURES = Path(__file__).resolve().parent / "figures"
NAME, NARROW = "python-docs", "python-docs-k16"
GRAPH, IMAGES = "python-docs-graph", "fashion-mnist"
SAMPLE = f"stores/{NAME}/samples/3?measure=entropy&position=40"
COMPARE = f"compare/samples/2?a={NAME}&b={NARROW}&order=missed&measure=missed&position=60"
WIDE, PHONE = (1280, 860), (360, 780)
# figure -> address, size, colours
SHOTS: dict[str, tuple[str, tuple[int, int], str]] = {
    "viewer-store": (f"stores/{NAME}/overview", WIDE, "light"),
    "viewer-sample": (SAMPLE, WIDE, "light"),
    "viewer-sample-dark": (SAMPLE, WIDE, "dark"),
    "viewer-sample-phone": (SAMPLE, PHONE, "light"),
    "viewer-store-dark": (f"stores/{NAME}/overview", WIDE, "dark"),
    "viewer-shard": (f"stores/{NAME}/shards/0001-000000?check=1", WIDE, "light"),
    "viewer-find": (f"stores/{NAME}/find?text=Python&measure=label_logprob", WIDE, "light"),
    "viewer-image": (f"stores/{IMAGES}/samples/281", WIDE, "light"),
    "viewer-image-store": (f"stores/{IMAGES}/overview", WIDE, "light"),
    "viewer-image-find": (
        f"stores/{IMAGES}/find?measure=label_logprob",
        (1280, 620),
        "light",
    ),
    "viewer-graph": (f"stores/{GRAPH}/samples/1#h-graph", (1280, 720), "light"),
    "viewer-compare": (COMPARE, WIDE, "light"),
    "viewer-compare-phone": (COMPARE, PHONE, "light"),
}
# Figures that are a part of such a page.
PARTS = {"viewer-store": ("viewer-mass", ".chart:has([data-chart=mass])")}


def main(text: str, graph: str, images: str) -> None:
    """Serve the stores and the copy, and photograph every page."""
    with tempfile.TemporaryDirectory() as folder:
        place, narrow = Path(folder, NAME), Path(folder, NARROW)
        for store, name in ((text, NAME), (graph, GRAPH), (images, IMAGES)):
            shutil.copytree(store, Path(folder, name))
        command = [sys.executable, "-c", "from logitstore_cli.main import main; main()"]
        convert = ["convert", str(place), str(narrow), "--signal", "topk:16", "--quiet"]
        subprocess.run([*command, *convert], check=True)
        view = [*command, "view", NAME, NARROW, GRAPH, IMAGES, "--port", "0", "--no-browser"]
        with subprocess.Popen(view, stdout=subprocess.PIPE, text=True, cwd=folder) as viewer:
            try:
                assert viewer.stdout is not None
                _shoot(viewer.stdout.readline().strip())
            finally:
                viewer.terminate()


def _shoot(address: str) -> None:
    path = os.environ.get("LOGITSTORE_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (page_path, (width, height), scheme) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(address + page_path)
            page.wait_for_load_state("networkidle")
            # The folder of a moment ago means nothing to a reader.
            page.locator(".sub .small").evaluate_all("all => all.forEach((one) => one.remove())")
            page.screenshot(path=FIGURES / f"{name}.png")
            if name in PARTS:
                part, selector = PARTS[name]
                page.locator(selector).screenshot(path=FIGURES / f"{part}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
