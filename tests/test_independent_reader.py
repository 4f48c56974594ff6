"""A stranger who has only the specification reads what logitstore wrote."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from logitstore import store
from logitstore.containers import CONTAINERS
from logitstore.spec.plan import shard_name
from logitstore.spec.statistics import Statistics
from tests import independent_reader
from tests.independent_reader import IndependentStore
from tests.shard_records import SCHEMAS, header, random_record

CHUNKS = [[[9, 30], [20, 3, 8]], [[70], [1]], [[64]]]


def write_store(folder: Path, schema_name: str, container: str) -> None:
    """Three shards; the second also has a superseded commit and garbage beside it."""
    schema = SCHEMAS[schema_name]
    features = ("pairs",) if any(group.pairs for group in schema.groups) else ()
    head = header(schema, container=container, reader_features=features)
    with store.create(folder, head, {"notes.txt": b"a table"}) as writer:
        plan = writer.add_push_plan()
        for number, chunks in enumerate(CHUNKS):
            shard = shard_name(plan.number, number)
            for generation in (1, 2) if number == 1 else (1,):
                with writer.begin(shard, plan, generation=generation) as attempt:
                    for i, lengths in enumerate(chunks):
                        attempt.add(random_record(schema, lengths, seed=100 * number + i))
                    attempt.commit(statistics=Statistics())
    (folder / "shards" / "0001-000001.ffffffff.zarr.zip").write_bytes(b"a losing attempt")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("schema_name", SCHEMAS)
def test_reads_the_same_values(schema_name: str, container: str, tmp_path: Path) -> None:
    write_store(tmp_path, schema_name, container)
    for sealed in (False, True):
        if sealed:
            with store.append(tmp_path) as writer:
                writer.seal()
        strange = IndependentStore(tmp_path)
        assert strange.sealed == sealed
        with store.open(tmp_path) as ours:
            assert len(strange.samples) == len(ours) == 8
            for number, columns in enumerate(strange.samples):
                expected = ours.sample(number).arrays
                assert list(columns) == list(expected)
                for name, values in columns.items():
                    np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_the_stranger_knows_nothing_of_ours() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert not imported & {"logitstore", "logitstore_cli", "tests", ""}
