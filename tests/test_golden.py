"""Stores that earlier releases wrote open today, with the values they had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitstore import store
from tests.golden.write import STORES, digest
from tests.independent_reader import IndependentStore

GOLDEN = Path(__file__).resolve().parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/store.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_old_stores_are_read(folder: Path) -> None:
    assert store.verify(folder, full=True).problems == []
    expected = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))["samples"]
    with store.open(folder) as opened:
        assert len(opened) == len(expected)
        for number, columns in enumerate(expected):
            arrays = opened.sample(number).arrays
            assert {name: digest(values) for name, values in arrays.items()} == columns
    for number, columns in enumerate(IndependentStore(folder).samples):
        for name, values in columns.items():
            same_type = values.astype(expected[number][name]["dtype"])
            assert digest(same_type) == expected[number][name], name


def test_every_container_is_there() -> None:
    assert {path.name for path in FOLDERS if path.parent.name == "v1"} == set(STORES)
