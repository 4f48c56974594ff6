"""The pages of the losses: complete, in step with the code, and their examples run."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from logitstore import losses
from tests.source_tree import REPOSITORY

PAGES = REPOSITORY / "docs" / "losses"
HEADINGS = {"Formula", "What it needs from the store", "Cost", "Example", "Source"}
# Pages that are no loss's own: the index, the concept, and collections.
COLLECTIONS = {"disagreements", "index", "missing", "metrics", "vectors"}
ALL_PAGES = sorted(PAGES.glob("*.md"))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def test_the_index_is_what_the_generator_writes():
    written = runpy.run_path(str(REPOSITORY / "docs" / "list_losses.py"))["index_text"]()
    assert (PAGES / "index.md").read_text(encoding="utf-8") == written, (
        "run: python docs/list_losses.py"
    )


def test_the_matrix_is_what_the_losses_declare():
    page = REPOSITORY / "docs" / "signals.md"
    written = runpy.run_path(str(REPOSITORY / "docs" / "list_losses.py"))["signals_text"]()
    assert page.read_text(encoding="utf-8") == written, "run: python docs/list_losses.py"
    cells = {
        row[1].strip(): [x.strip() for x in row[2:-1]]
        for row in (line.split("|") for line in written.splitlines())
        if len(row) == 9
    }
    # Spot checks of what a reader looks up.
    forward_kl = cells["[`forward_kl`](losses/forward_kl.md)"]
    assert forward_kl == ["exact", "bounded", "unbiased", "unbiased", "-", "-"]
    assert cells["[`gold`](losses/gold.md)"][1] == "bounded (`byte_end`, `label_logprob`)"
    assert cells["[`gld`](losses/gld.md)"][4] == "exact"


def test_the_table_of_vectors_is_what_the_losses_compute():
    """Every file, within the agreed tolerances; written figures may differ by a few roundings."""
    generator = runpy.run_path(str(REPOSITORY / "docs" / "list_vectors.py"))
    index = json.loads((REPOSITORY / "tests" / "vectors" / "INDEX.json").read_text("utf-8"))
    assert set(generator["METHODS"]) == set(index["files"])
    written = re.findall(
        r"^\| \[`(.+)`\]\(\1\.md\) \| `(.+)` \| (.+) \| (.+) \|$",
        (PAGES / "vectors.md").read_text(encoding="utf-8"),
        re.M,
    )
    measured = list(generator["measured"]())
    assert [row[:2] for row in written] == [row[:2] for row in measured], (
        "run: python docs/list_vectors.py"
    )
    for (_, file, value, gradient), (_, _, errors) in zip(written, measured, strict=True):
        assert errors.value <= 1e-10, file
        assert errors.value <= 100 * max(float(value), 1e-15), file
        if errors.gradient is None:
            assert gradient == "no gradient"
        else:
            assert errors.gradient <= 1e-9, file
            assert errors.gradient <= 100 * max(float(gradient), 1e-15), file


@pytest.mark.parametrize("name", sorted({*losses.LOSSES, "fused_linear_kd"}))
def test_every_loss_has_a_page(name):
    title = (PAGES / f"{name}.md").read_text(encoding="utf-8").split("\n", 1)[0]
    assert re.match(rf"# `?{name}\b", title)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.stem)
def test_pages_are_complete_and_their_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    if page.stem not in COLLECTIONS:
        headings = set(re.findall(r"^## (.+)$", text, re.M))
        assert headings >= HEADINGS
        assert any(heading.startswith("Traps") for heading in headings)
        assert python_blocks(page)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in ALL_PAGES if python_blocks(p)], ids=lambda p: p.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(page):
        torch.manual_seed(0)
        exec(compile(block, str(page), "exec"), {"__name__": "example"})
