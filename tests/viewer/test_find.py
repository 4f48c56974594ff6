"""Searches: what they find, in which order, and how far they go at once."""

from __future__ import annotations

import numpy as np
import pytest

from logitstore import store
from logitstore_server.viewer import find as find_module
from tests.viewer.viewed import TABLE, log_softmax


def test_find_by_text_token_and_key(client, stores):
    record = stores["topk"].sample(1)
    token = int(record["tokens"][5])
    found = client.get(f"/stores/topk/find.json?token={token}&order=corpus").json()
    expected = [
        (s, p)
        for s in range(len(stores["topk"]))
        for p in np.flatnonzero(stores["topk"].sample(s)["tokens"] == token).tolist()
    ]
    assert [(r["sample"], r["position"]) for r in found["results"]] == expected
    text = TABLE.text([token])
    places = {
        (s, p)
        for s in range(len(stores["topk"]))
        for p, t in enumerate(stores["topk"].sample(s)["tokens"].tolist())
        if TABLE.text([t]).startswith(text)
    }
    by_text = client.get("/stores/topk/find.json", params={"text": text}).json()["results"]
    assert {(r["sample"], r["position"]) for r in by_text} == places
    by_key = client.get("/stores/topk/find.json", params={"key": "#2@"}).json()["results"]
    assert [r["sample"] for r in by_key] == [2]


def test_find_sorts_and_filters_by_measure_and_tells_its_cap(client, stores, monkeypatch):
    opened = stores["topk"]
    means = [float(opened.sample(s)["entropy"].astype(float).mean()) for s in range(len(opened))]
    told = client.get("/stores/topk/find.json?measure=entropy").json()
    assert [r["sample"] for r in told["results"]] == np.argsort(means)[::-1].tolist()
    assert not told["partial"]
    middle = sorted(means)[2]
    some = client.get(f"/stores/topk/find.json?measure=entropy&least={middle - 1e-4}").json()
    assert sorted(r["sample"] for r in some["results"]) == [
        s for s, mean in enumerate(means) if mean >= middle - 1e-4
    ]
    wrong = client.get("/stores/topk/find.json?measure=label_logprob").json()["results"]
    assert [r["value"] for r in wrong] == sorted(r["value"] for r in wrong)
    monkeypatch.setattr(find_module, "MAX_CHUNKS", 1)
    capped = client.get("/stores/topk/find.json?measure=entropy").json()
    assert (capped["partial"], capped["chunks_looked_at"], capped["next"]) == (
        *(True, 1),
        {"shards_from": 0, "skip": 1},
    )
    assert "Look at the next chunks" in client.get("/stores/topk/find?measure=entropy").text


def test_a_search_derives_no_more_from_dense_logits_than_its_bound(client, stores, monkeypatch):
    monkeypatch.setattr(find_module, "MAX_CELLS", 1)
    derived = client.get("/stores/dense/find.json?measure=top1_prob").json()
    assert (derived["chunks_looked_at"], derived["partial"]) == (1, True)
    assert derived["next"] == {"shards_from": 0, "skip": 1}
    stored = client.get("/stores/topk/find.json?measure=entropy").json()
    assert stored["chunks_looked_at"] == stored["num_chunks"] > 1
    truth = np.exp(log_softmax(stores["dense"].sample(3)["logits"])).max(-1).mean()
    monkeypatch.undo()
    every = client.get("/stores/dense/find.json?measure=top1_prob").json()["results"]
    assert next(r["value"] for r in every if r["sample"] == 3) == pytest.approx(truth, rel=1e-4)


def test_a_search_among_many_shards_goes_on_until_all_were_searched(client, stores, monkeypatch):
    monkeypatch.setattr(find_module, "MAX_SHARDS", 1)
    monkeypatch.setattr(find_module, "MAX_CHUNKS", 1)
    monkeypatch.setattr(
        store.Store,
        "commit",
        lambda self, shard, real=store.Store.commit: read.add(shard) or real(self, shard),
    )
    found: list[int] = []
    asked: dict[str, int] = {}
    for _ in range(20):
        read: set[int] = set()
        told = client.get("/stores/topk/find.json", params={"order": "sure", **asked}).json()
        assert len(read) == 1
        found += [r["sample"] for r in told["results"]]
        if told["next"] is None:
            break
        asked = told["next"]
        assert told["partial"]
    assert sorted(found) == [*range(len(stores["topk"]))]
    assert (
        f"of 1 of {len(stores['topk'].shards)} shards"
        in client.get("/stores/topk/find?order=sure").text
    )
