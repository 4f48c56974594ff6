"""Frequency ranks in objects: true ids on every way out, a clear refusal where they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import logitstore as ls
from logitstore import store as stores
from logitstore.analysis.convert import convert
from logitstore.capture import precompute
from logitstore.containers.ranked import IdRanks
from logitstore.record import Record
from logitstore.spec import header as header_module
from logitstore.spec.errors import FormatError, UsageError
from logitstore.spec.id_ranks import RANKS_TABLE
from logitstore_cli.main import run
from tests.independent_reader import IndependentStore
from tests.test_capture import LINES, objects, settings

V, T, SAMPLES = 700, 40, 4
SIGNALS = (
    "topk:9",
    "topk:9,p=0.9,coding=q8",
    "sampled:30",
    "sampled:30,power=0.8",
    "threshold:tau=1/20",
    "threshold:k=7",
)


def logits_of(sample: int) -> torch.Tensor:
    """Token frequencies of a power law over ids in no order, as a vocabulary has them."""
    generator = torch.Generator().manual_seed(0)
    frequent = -1.1 * torch.log(1 + torch.randperm(V, generator=generator).float())
    return frequent + torch.randn(T, V, generator=generator.manual_seed(1 + sample))


FREQUENCIES = np.exp(logits_of(0).double().mean(0).numpy())


def push(path: Path, signal: str, **options: object) -> Path:
    with ls.writer(path, signal=signal, vocab_size=V, always_ids=[3, 0], **options) as w:
        for number in range(SAMPLES):
            tokens = np.random.default_rng(number).integers(0, V, T)
            w.add(tokens, logits_of(number), sample_key=f"s{number}")
    return path


def everything(path: Path) -> Record:
    with ls.open(path) as store:
        return Record.concat([store.sample(i) for i in range(len(store))])


def assert_same(got: Record, expected: Record) -> None:
    assert list(got.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("signal", SIGNALS)
def test_records_are_those_of_a_store_of_ids(tmp_path: Path, signal: str) -> None:
    plain = push(tmp_path / "plain", signal)
    ranked = push(tmp_path / "ranked", signal, id_frequencies=FREQUENCIES)
    expected = everything(plain)
    assert_same(everything(ranked), expected)
    assert stores.verify(ranked, full=True).ok
    with ls.open(plain) as a, ls.open(ranked) as b:
        assert "rank-ids" not in a.header.reader_features
        assert "rank-ids" in b.header.reader_features
        if signal == "topk:9":  # the others are too small here
            assert b.column_bytes()["ids"] < 0.97 * a.column_bytes()["ids"]
        for column in b.header.schema_.columns:
            assert_same(b.read_chunk(0, 0, [column.name]), a.read_chunk(0, 0, [column.name]))
    # What another program makes of the format's page.
    for number, columns in enumerate(IndependentStore(ranked).samples):
        with ls.open(ranked) as store:
            sample = store.sample(number)
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(columns[name], array, err_msg=name)
    item = ls.LogitDataset(ranked)[1]
    assert torch.equal(item.targets.ids, ls.LogitDataset(plain)[1].targets.ids)


def test_objects_hold_ranks(tmp_path: Path) -> None:
    path = push(tmp_path / "s", "topk:9", id_frequencies=FREQUENCIES)
    with ls.open(path) as store:
        ranks = IdRanks.decode(store.table(RANKS_TABLE), V, where="table")
        ids = store.read_chunk(0, 0)["ids"]
        name = store.shards[0].object
    np.testing.assert_array_equal(ranks.id_of_rank, np.argsort(-FREQUENCIES, kind="stable"))
    zarr = pytest.importorskip("zarr")
    with (
        pytest.warns(UserWarning, match="Numcodecs"),
        zarr.storage.ZipStore(path / "shards" / name, mode="r") as file,
    ):
        stored = zarr.open_group(file, mode="r")["ids"][0][: len(ids)]
    np.testing.assert_array_equal(ranks.id_of_rank[stored], ids)
    assert (stored != ids).any()


def test_a_reader_without_the_feature_refuses(tmp_path: Path, monkeypatch) -> None:
    path = push(tmp_path / "s", "sampled:9", id_frequencies=FREQUENCIES)
    monkeypatch.setattr(header_module, "READER_FEATURES", frozenset({"pairs"}))
    with pytest.raises(FormatError, match="rank-ids") as caught:
        ls.open(path)
    assert caught.value.kind == "unknown-reader-feature"


@pytest.mark.parametrize("data", [b"", b"\0" * 16, b"\0\0\0\0\1\0\0\0\5\0\0\0"])
def test_a_table_that_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="order of the vocabulary"):
        IdRanks.decode(data, 3, where="tables/x")


@pytest.mark.parametrize(
    "options",
    [
        {"signal": "topk:4", "container": "arrow"},
        {"signal": "dense"},
        {"signal": "graph:k=3"},
        {"signal": "topk:4", "id_frequencies": np.ones(V - 1)},
        {"signal": "topk:4", "id_frequencies": np.full(V, np.nan)},
    ],
)
def test_where_ranks_are_of_no_use(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError) as caught:
        ls.writer(tmp_path / "s", vocab_size=V, **{"id_frequencies": FREQUENCIES, **options})
    assert caught.value.kind == "bad-argument"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("signal", ["topk:9", "sampled:30", "threshold:tau=1/20"])
def test_copies_with_ranks_and_back(tmp_path: Path, signal: str) -> None:
    source = push(tmp_path / "source", signal, chunk_positions=64)
    convert(source, tmp_path / "ranked", rank_ids=True)
    again = convert(source, tmp_path / "ranked", rank_ids=True)
    assert (again.shards, again.skipped) == (0, 1)
    assert_same(everything(tmp_path / "ranked"), everything(source))
    for name, options in {
        "kept": {"container": "zarr"},
        "arrow": {"container": "arrow"},
        "ids": {"rank_ids": False},
    }.items():
        convert(tmp_path / "ranked", tmp_path / name, **options)
        assert_same(everything(tmp_path / name), everything(source))
        with ls.open(tmp_path / name) as copy:
            assert ("rank-ids" in copy.header.reader_features) == (name == "kept")
            assert (RANKS_TABLE in {t.name for t in copy.header.tables}) == (name == "kept")


def test_dense_logits_become_ranked_samples(tmp_path: Path) -> None:
    dense = push(tmp_path / "dense", "dense:dtype=float32")
    arguments = ["convert", str(dense), str(tmp_path / "copy"), "--signal", "sampled:30"]
    assert run([*arguments, "--rank-ids"]) == 0
    assert_same(everything(tmp_path / "copy"), everything(push(tmp_path / "fresh", "sampled:30")))


def test_a_capture_orders_ids_by_its_pilot(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    plain = settings(str(text), tmp_path / "plain")
    precompute(plain)
    out = tmp_path / "ranked"
    ranked = settings(str(text), out, rank_ids=True)
    precompute(ranked)
    assert_same(everything(out), everything(tmp_path / "plain"))
    table = (out / "tables" / RANKS_TABLE).read_bytes()
    assert table != np.arange(len(table) // 4, dtype="<u4").tobytes()
    whole = objects(out)
    # Stopped after the header, before the table: the pilot makes the same one again.
    for folder in ("plans", "commits", "shards"):
        for file in (out / folder).iterdir():
            file.unlink()
    (out / "tables" / RANKS_TABLE).unlink()
    precompute(ranked)
    assert (out / "tables" / RANKS_TABLE).read_bytes() == table
    assert objects(out) == whole
    # Stopped among its shards: they continue with the table that is there.
    next((out / "commits").iterdir()).unlink()
    precompute(settings(str(text), out, rank_ids=True))
    assert objects(out) == whole
