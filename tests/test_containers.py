"""Containers by name, and the page that shows how other tools read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from logitstore.containers import CONTAINERS, container
from logitstore.spec.errors import UsageError
from tests.shard_records import SCHEMAS, header, random_record, write_shard


def test_names() -> None:
    assert [container(name).name for name in CONTAINERS] == list(CONTAINERS)
    with pytest.raises(UsageError, match="no such container"):
        container("parquet")


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3:UserWarning")
def test_the_page_about_other_tools_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = random_record(SCHEMAS["threshold"], [9, 30], seed=24)
    for name in CONTAINERS:
        data, _ = write_shard(header(SCHEMAS["threshold"], container=name), [record])
        (tmp_path / f"shard{container(name).suffix}").write_bytes(data)
    page = Path(__file__).resolve().parent.parent / "docs" / "stock-readers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
    assert str([(key, n) for key, n in zip(record.sample_keys(), (9, 30), strict=True)]) in (
        capsys.readouterr().out
    )
