"""The dataset viewer's shapes: pages, cursors, conditions, text, statistics, Croissant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import numpy as np
import pytest

import logitstore.store
from logitstore.record.selection import parse_conditions
from tests import store_push
from tests.data_stores import make_store, random_samples
from tests.server.live import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    store_push.push(str(root / "text"), "zarr", shards=4)
    make_store(root / "long", random_samples(6, length=300), shards=1).close()
    return root


@pytest.fixture(scope="module")
def get(folder: Path) -> Iterator:
    with (
        serving(*(f"{name}={folder / name}" for name in ("text", "long"))) as (base, _),
        httpx2.Client(timeout=60) as client,
    ):

        def ask(path: str, status: int = 200) -> dict:
            answer = client.get(f"{base}/v1/stores/{path}")
            assert answer.status_code == status, answer.text
            return answer.json()

        yield ask


def test_rows_page_by_page(folder, get):
    store = logitstore.store.open(folder / "text")
    first = get("text/first-rows")
    assert [row["row_idx"] for row in first["rows"]] == list(range(10))
    seen, cursor = [], ""
    while cursor is not None:
        page = get(
            f"text/rows?length=7&columns=tokens,label_logprob{cursor and '&cursor='}{cursor}"
        )
        assert len(page["rows"]) <= 7
        assert page["num_rows_total"] == store.num_samples
        assert [f["name"] for f in page["features"]][-3:] == ["tokens", "label_logprob", "text"]
        seen += page["rows"]
        cursor = page["next"]
    assert [row["row_idx"] for row in seen] == list(range(store.num_samples))
    for row in seen:
        record = store.sample(row["row_idx"])
        assert row["row"]["tokens"] == record["tokens"].tolist()
        assert row["row"]["label_logprob"] == record["label_logprob"].tolist()
        assert row["row"]["text"] == store_push.TABLE.text(record["tokens"])
    assert get("text/rows?offset=9&length=1")["rows"][0]["row_idx"] == 9
    assert get("text/rows?offset=1000")["rows"] == []
    get("text/rows?length=101", 422)


def test_long_cells_are_cut_and_named(get):
    page = get("long/rows?length=2&columns=tokens,sample_key,ids")
    assert page["truncated"]
    for row in page["rows"]:
        assert row["truncated_cells"] == ["tokens", "ids"]
        assert len(row["row"]["tokens"]) == 256
        assert len(row["row"]["ids"]) == 256 // 8
    assert not get("long/rows?columns=sample_key")["truncated"]


def test_filter_is_the_filter_of_datasets(folder, get):
    store = logitstore.store.open(folder / "text")
    where = [["length", ">=", 9], ["label_logprob.mean", "<", -4.5], ["sample_key", "!=", "x"]]
    conditions = parse_conditions(where, store.header)
    expected = [
        number
        for number in range(store.num_samples)
        if all(condition.holds(store.sample(number))[0] for condition in conditions)
    ]
    assert 3 < len(expected) < store.num_samples
    found, cursor = [], ""
    scanned = 0
    while cursor is not None:
        page = get(f"text/filter?length=2&where={quote(json.dumps(where))}{cursor}")
        assert not page["partial"] or len(page["rows"]) < 2
        found += [row["row_idx"] for row in page["rows"]]
        scanned += page["scanned"]
        cursor = page["next"] and f"&cursor={page['next']}"
    assert found == expected
    assert scanned == store.num_samples


@pytest.mark.parametrize(
    "where",
    [
        "",
        "length > 3",
        "{}",
        "[[1]]",
        '["length"]',
        '[["length",">=","a"]]',
        '[["none",">=",1]]',
        '[["length","~",1]]',
        '[["length","in",3]]',
        '[["length",">=",NaN]]',
        '[["length",">=",{"a":1}]]',
        json.dumps([["length", ">=", 1]] * 17),
    ],
)
def test_conditions_that_mean_nothing(get, where):
    assert get(f"text/filter?where={quote(where)}", 422)["kind"] == "bad-argument"


def test_search_finds_text(folder, get):
    store = logitstore.store.open(folder / "text")
    texts = [store_push.TABLE.text(store.sample(i)["tokens"]) for i in range(store.num_samples)]
    wanted = texts[5][2:4]
    expected = [i for i, text in enumerate(texts) if wanted in text]
    page = get(f"text/search?query={quote(wanted, safe='')}")
    assert [row["row_idx"] for row in page["rows"]] == expected
    assert (page["next"], page["partial"], page["scanned"]) == (None, False, store.num_samples)
    assert get("long/search?query=a", 422)["kind"] == "bad-argument"
    assert (get("text/is-valid")["search"], get("long/is-valid")["search"]) == (True, False)


def test_cursors_are_bound_to_store_and_question(folder, get):
    cursor = get("text/rows?length=2")["next"]
    where = quote('[["length",">=",1]]')
    for path in [
        f"long/rows?cursor={cursor}",
        f"text/rows?columns=tokens&cursor={cursor}",
        f"text/filter?where={where}&cursor={cursor}",
        "text/rows?cursor=AAAA",
        f"text/rows?cursor={cursor}x",
        "text/rows?cursor=%00",
    ]:
        assert get(path, 422)["kind"] == "cursor-invalid", path


def test_a_cursor_ends_when_the_store_grows(tmp_path):
    location = str(tmp_path / "s")
    with (
        logitstore.store.create(location, store_push.header(), store_push.tables()) as writer,
        serving(f"s={location}") as (base, _),
        httpx2.Client(timeout=60) as client,
    ):
        planned = writer.add_plan(store_push.plan(writer.header, 2))
        store_push.commit_shard(writer, planned, "0001-000001")
        address = f"{base}/v1/stores/s"
        cursor = client.get(f"{address}/rows?length=2").json()["next"]
        assert client.get(f"{address}/rows?cursor={cursor}").status_code == 200
        store_push.commit_shard(writer, planned, "0001-000000")
        client.get(f"{address}/index.json")  # sees the commit at once
        answer = client.get(f"{address}/rows?cursor={cursor}")
        assert (answer.status_code, answer.json()["kind"]) == (409, "state-mismatch")


def test_statistics_size_and_info_are_those_of_the_store(folder, get):
    store = logitstore.store.open(folder / "text")
    told = get("text/statistics")
    assert (told["num_examples"], told["partial"]) == (store.num_samples, False)
    measures = {each["column_name"]: each["column_statistics"] for each in told["statistics"]}
    entropy = np.concatenate(
        [store.sample(i)["entropy"].astype(float) for i in range(store.num_samples)]
    )
    assert measures["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert measures["entropy"]["std"] == pytest.approx(entropy.std())
    assert sum(measures["entropy"]["histogram"]["hist"]) == len(entropy)
    size = get("text/size")["size"]["dataset"]
    assert size["num_bytes_original_files"] == sum(view.object_bytes for view in store.shards)
    assert sum(size["column_bytes"].values()) == size["num_bytes_original_files"]
    info = get("text/info")["dataset_info"]
    assert info["signal"] == {"kind": "topk", "k": 4, "coding": "f16"}
    assert info["features"]["ids"]["feature"]["feature"]["dtype"] == "uint32"
    assert get("text/splits")["splits"] == [
        {"dataset": "text", "config": "default", "split": "train"}
    ]
    assert get("long/statistics")["partial"]  # not sealed


# Of the library that the validator reads JSON-LD with.
@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")
def test_croissant_is_valid_and_lists_the_objects(folder, get):
    import mlcroissant

    described = get("text/croissant")
    dataset = mlcroissant.Dataset(jsonld=described)
    assert not dataset.metadata.ctx.issues.errors
    store = logitstore.store.open(folder / "text")
    files = {each.name: each for each in dataset.metadata.distribution}
    assert set(files) == {view.object for view in store.shards}
    for i, view in enumerate(store.shards):
        assert files[view.object].sha256 == store.commit(i).object.sha256
        assert files[view.object].content_url.endswith(f"/v1/stores/text/shards/{view.object}")
    rows = list(dataset.records("shards"))
    assert [row["shards/samples"] for row in rows] == [view.samples for view in store.shards]
