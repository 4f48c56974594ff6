"""Stores at the edges: empty, one position, none at all, ids by rank, very many of something."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import logitstore
from logitstore import store
from logitstore.record import Record
from logitstore_cli.commands.view import OpenedStores
from logitstore_server.viewer import compare as compare_module
from logitstore_server.viewer import find as find_module
from logitstore_server.viewer import store_page, viewer_app
from logitstore_server.viewer.ask import ask
from tests import store_push
from tests.viewer.viewed import VOCAB, push


def viewing(*places: Path) -> TestClient:
    return TestClient(viewer_app(OpenedStores(tuple(map(str, places)))))


def test_a_store_whose_ids_are_ranks_is_shown_as_any_other(tmp_path):
    frequencies = np.random.default_rng(5).permutation(VOCAB) + 1
    client = viewing(
        push(tmp_path / "plain", "topk:8"),
        push(tmp_path / "ranked", "topk:8", id_frequencies=frequencies),
    )
    for path in (
        *("samples/1/kept.json", "samples/1/tokens.json", "samples/2/kept.json?top=3"),
        *("find.json?token=7", "find.json?text=w1&order=corpus"),
    ):
        one, other = (client.get(f"/stores/{name}/{path}").json() for name in ("plain", "ranked"))
        one.pop("store", None), other.pop("store", None)
        assert one == other
    assert client.get("/stores/ranked/overview").status_code == 200
    told = client.get("/compare/samples/1.json?a=plain&b=ranked").json()
    assert told["means"]["kl"] == 0
    assert told["means"]["overlap"] == told["means"]["agree"] == 1


def test_the_page_of_a_store_opens_no_object(tmp_path):
    place = push(tmp_path / "st", "topk:8", lengths=(40,) * 30)
    before = viewing(place).get("/stores/st/overview.json").json()
    assert before["num_shards"] == 30
    shutil.move(place / "shards", tmp_path / "elsewhere")
    client = viewing(place)
    assert client.get("/stores/st/overview.json").json() == before
    assert client.get("/stores/st/overview").status_code == 200
    assert client.get("/stores/st/samples/0").status_code != 200


def test_caps_are_told_on_pages_and_in_data(tmp_path, monkeypatch):
    client = viewing(
        push(tmp_path / "a", "topk:8", lengths=(40,) * 12, always_ids=range(30)),
        push(tmp_path / "b", "topk:8", lengths=(40,) * 12, always_ids=range(30), noise=0.5),
    )
    monkeypatch.setattr(store_page, "SHARDS_SHOWN", 5)
    monkeypatch.setattr(find_module, "MAX_RESULTS", 3)
    monkeypatch.setattr(compare_module, "MAX_ROWS", 4)
    for path, cap, said in (
        ("/stores/a/overview", "truncated", "Showing 5 of 12."),
        ("/stores/a/find", "truncated", "Showing <b>3</b> of 12 samples"),
        ("/compare?a=a&b=b", "partial", "samples 0 – 7 of 12"),
        ("/compare/samples/1?a=a&b=b", "truncated", "Showing 4 of 40 positions"),
    ):
        beside, _, query = path.partition("?")
        told = client.get(f"{beside}.json?{query}").json()
        assert (told.get("result") or told)[cap] is True
        assert said in client.get(path).text
    assert "Showing 2 of 12." in client.get("/stores/a/overview?first_shard=11").text
    assert "23, … (30 in all)" in client.get("/stores/a/overview").text
    kept = client.get("/stores/a/samples/1/kept.json?from=5&count=9999&top=2").json()
    assert (kept["count"], kept["total"]) == (35, 40)
    assert (len(kept["positions"][0]["entries"]), kept["positions"][0]["kept"]) == (2, 8)


def test_provenance_is_that_of_the_header(tmp_path):
    place = push(
        tmp_path / "st", "topk:8", teacher="<i>me", lse_at=(2.0,), always_ids=(3, 5), bos="none"
    )
    with store.open(place) as opened:
        header = opened.header
    groups = viewing(place).get("/stores/st/overview.json").json()["provenance"]
    told = {(g["title"], term): value for g in groups for term, value in g["terms"]}
    assert header.tokenizer is not None
    expected = {
        ("Teacher", "name"): "<i>me",
        ("Tokenizer", "fingerprint"): header.tokenizer.fingerprint,
        ("Store", "signal"): "topk:8",
        ("Store", "temperatures"): "2",
        ("Store", "always-ids"): "3, 5",
        ("Store", "vocabulary"): str(VOCAB),
        ("Store", "uuid"): header.store_uuid,
    }
    assert expected.items() <= told.items()
    assert header.created in told["Store", "created"]


def test_one_position_and_none(tmp_path, monkeypatch):
    """What `push` refuses, another writer may have written: samples without a position."""
    one = push(tmp_path / "one", "topk:8", lengths=(1,))
    real = store_push.record

    def first_is_empty(*arguments):
        record = real(*arguments)
        arrays = {c.name: np.array(record[c.name]) for c in record.schema.columns}
        arrays["sample_lengths"] = np.array([0, arrays["sample_lengths"].sum(), 0])
        return Record(
            record.schema,
            {c.name: arrays[c.name].astype(c.dtype) for c in record.schema.columns},
        )

    monkeypatch.setattr(store_push, "record", first_is_empty)
    writer = store.create(str(tmp_path / "gaps"), store_push.header(), store_push.tables())
    planned = writer.add_plan(store_push.plan(writer.header, 1))
    store_push.commit_shard(writer, planned, planned.shards[0].shard)
    writer.close()
    client = viewing(one, tmp_path / "gaps")
    page = client.get("/stores/one/samples/0").text
    assert "1 position ·" in page
    assert "Next →" not in page
    empty = client.get("/stores/gaps/samples/0")
    assert "This sample has no positions" in empty.text
    assert 'id="heat"' not in empty.text
    assert client.get("/stores/gaps/samples/0/kept.json").json()["positions"] == []
    assert client.get("/stores/gaps/samples/1").status_code == 200
    assert client.get("/stores/gaps/find?text=a").status_code == 200


def test_ids_beyond_the_tokenizer_and_logits_of_minus_infinity(tmp_path):
    z = np.random.default_rng(2).normal(0, 2, (12, 60)).astype(np.float32)
    z[:, 5] = -np.inf
    from tests.viewer.viewed import TABLE

    for name, signal in (("topk", "topk:59"), ("dense", "dense:dtype=float32")):
        with logitstore.writer(
            tmp_path / name, signal=signal, vocab_size=60, tokenizer=TABLE
        ) as writer:
            writer.add(np.arange(12) * 5, z, sample_key="x")
    client = viewing(tmp_path / "topk", tmp_path / "dense")
    for name in ("topk", "dense"):
        tokens = client.get(f"/stores/{name}/samples/0/tokens.json").json()
        assert tokens["text"][9:] == ["#45", "#50", "#55"]
        entropy = [value for value in tokens["measures"]["entropy"] if value is not None]
        p = np.exp(z.astype(float) - np.log(np.exp(z.astype(float)).sum(1, keepdims=True)))
        true = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        assert entropy == pytest.approx(true, abs=1e-2)
        kept = client.get(f"/stores/{name}/samples/0/kept.json?top=99").json()["positions"][0]
        assert [e["value"] for e in kept["entries"] if e["id"] == 5] in ([], [0.0])
        assert client.get(f"/stores/{name}/samples/0").status_code == 200


def test_the_ways_to_take_a_sample_along_work(tmp_path, capsys):
    place = push(tmp_path / "it's 100%41 <b>", "topk:8")
    app = viewer_app(OpenedStores((str(place),)))
    # Starlette's client decodes %25 twice.
    page = "/stores/it%27s%20100%2541%20%3Cb%3E/samples/1"
    told = json.loads(ask(app, f"{page}.json").body)["copy"]
    exec(compile(told["python"], "copied", "exec"), {})
    assert "'logprobs'" in capsys.readouterr().out
    assert shlex.split(told["curl"]) == ["curl", f"http://127.0.0.1{page}.json"]
    # The link to a page's data, too.
    assert f'href="{page}.json" title="The data' in ask(app, page).body.decode()
