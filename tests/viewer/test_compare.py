"""Two stores compared, against sums over whole distributions."""

from __future__ import annotations

import numpy as np
import pytest

from logitstore.record.sequences import labels
from tests.viewer.viewed import HOSTILE_STORE, log_softmax


def test_compare_is_exact_for_dense_and_a_lower_bound_for_topk(client, stores):
    p = log_softmax(stores["dense"].sample(1)["logits"])
    q = log_softmax(stores["other"].sample(1)["logits"])
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    kl = (np.exp(p) * (p - q)).sum(-1)
    js = ((np.exp(p) * (p - m)).sum(-1) + (np.exp(q) * (q - m)).sum(-1)) / 2
    told = client.get("/compare/samples/1.json?a=dense&b=other&order=position").json()
    assert told["exact"]
    assert [r["kl"] for r in told["rows"]] == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-6)
    assert [r["js"] for r in told["rows"]] == pytest.approx(js.tolist(), rel=1e-4, abs=1e-6)
    agree = (p.argmax(-1) == q.argmax(-1)).astype(float)
    assert [r["agree"] for r in told["rows"]] == agree.tolist()
    tops = zip(np.argsort(-p)[:, :10].tolist(), np.argsort(-q)[:, :10].tolist(), strict=True)
    assert [r["overlap"] for r in told["rows"]] == pytest.approx(
        [len(set(a) & set(b)) / 10 for a, b in tops]
    )
    bound = client.get("/compare/samples/1.json?a=topk&b=other-topk&order=position").json()
    assert not bound["exact"]
    for row, most, most_js in zip(bound["rows"], kl, js, strict=True):
        assert row["kl"] is None or 0 <= row["kl"] <= most + 2e-3
        assert row["js"] is None or 0 <= row["js"] <= most_js + 2e-3
    ordered = client.get("/compare/samples/1.json?a=dense&b=other").json()["rows"]
    assert [r["kl"] for r in ordered] == sorted((r["kl"] for r in ordered), reverse=True)
    whole = client.get("/compare.json?a=dense&b=other").json()["result"]
    assert whole["means"]["kl"] > 0
    assert not whole["partial"]


def test_compare_tells_what_fewer_ids_lose(client, stores):
    told = client.get("/compare/samples/1.json?a=dense&b=topk&order=position").json()["rows"]
    p = np.exp(log_softmax(stores["dense"].sample(1)["logits"]))
    record = stores["topk"].sample(1)
    for row in told:
        kept = set(record["ids"][row["position"]].tolist()) | {labels(record)[row["position"]]}
        outside = 1 - sum(p[row["position"], i] for i in kept if i >= 0)
        assert row["missed"] == pytest.approx(outside, abs=1e-5)


def test_compare_refuses_other_tokenizers(client):
    answer = client.get("/compare.json", params={"a": "topk", "b": HOSTILE_STORE})
    assert (answer.status_code, answer.json()["kind"]) == (422, "tokenizer-mismatch")
