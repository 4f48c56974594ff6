"""What pages and their data say, compared with the records; without a browser."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from logitstore import store
from logitstore.record.random import bits, key_of
from logitstore.record.sequences import has_label, labels
from logitstore_cli.commands.stats import summary
from logitstore_server.viewer import viewer_app, viewer_routes
from logitstore_server.viewer.routes import SECURITY_HEADERS, STATIC
from tests.viewer.viewed import HOSTILE_STORE, SIGNALS, VOCAB, log_softmax, push


def test_every_page_has_data_beside_it_and_a_strict_policy(client, stores):
    pages = ["/", "/compare", "/compare?a=topk&b=dense", "/compare/samples/1?a=topk&b=dense"]
    for name, opened in stores.items():
        base = f"/stores/{name.replace('<', '%3C').replace(' ', '%20')}"
        shard = opened.shards[0].shard
        pages += [f"{base}/{end}" for end in ("overview", "samples/1", "find", f"shards/{shard}")]
    for page in pages:
        path, mark, query = page.partition("?")
        beside = ("/stores" if path == "/" else path) + ".json" + mark + query
        for address, kind in ((page, "text/html; charset=utf-8"), (beside, "application/json")):
            answer = client.get(address)
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind), address
            for header, value in SECURITY_HEADERS.items():
                assert answer.headers[header] == value
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "http" not in policy


def test_pages_hold_no_inline_script_style_or_handler(client):
    for page in (
        "/stores/topk/overview",
        "/stores/topk/samples/0",
        "/stores/vocab-graph/samples/0",
    ):
        text = client.get(page).text
        assert "<style" not in text
        assert " style=" not in text
        assert " onclick=" not in text
        for tag in text.split("<script")[1:]:
            assert " src=" in tag.partition(">")[0] or "application/json" in tag.partition(">")[0]


def test_a_sample_names_the_command_that_runs_its_teacher_again(client, stores):
    told = client.get("/stores/topk/samples/1.json").json()["copy"]["audit"]
    where = str(stores["topk"].location)
    assert told == f"logitstore audit {where} --teacher hf:FOLDER_OR_ID --sample 1"
    assert told in client.get("/stores/topk/samples/1").text
    assert client.get("/stores/graph/samples/1.json").json()["copy"]["audit"] is None
    assert "Is the record true" not in client.get("/stores/graph/samples/1").text


def test_hostile_names_and_tokens_are_text(client):
    home = client.get("/").text
    assert HOSTILE_STORE not in home
    assert "&lt;img src=x onerror=alert(1)&gt;" in home
    for page in ("overview", "samples/0", "find"):
        text = client.get(f"/stores/%3Cimg%20src=x%20onerror=alert(1)%3E/{page}").text
        assert "<img" not in text
        assert "</script><script>" not in text
        assert "\u202e" not in text


def test_routes_only_read(stores):
    for route in viewer_routes(stores):
        assert route.methods == {"GET", "HEAD"}
    answer = TestClient(viewer_app(stores)).post("/stores/topk/overview")
    assert answer.status_code == 405


def test_what_is_not_there_is_said_without_repeating_it(client):
    for path in ("/nothing/%3Cscript%3E", "/stores/gone-%3Cb%3E/overview", "/static/../routes.py"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "gone-" not in answer.text
        assert "nothing" not in answer.text
        assert answer.headers["Content-Security-Policy"]
    assert client.get("/stores/topk/samples/99").status_code == 404
    assert client.get("/stores/topk/samples/0?measure=x").status_code == 422
    problem = client.get("/stores/topk/samples/0/kept.json?from=-1")
    assert (problem.status_code, problem.json()["kind"]) == (422, "bad-argument")


def test_overview_equals_stats_and_reads_no_chunk(client, stores, monkeypatch):
    monkeypatch.setattr(
        store.Store, "read_chunk", lambda *a, **k: pytest.fail("a chunk was read for the overview")
    )
    for name in SIGNALS:
        told = client.get(f"/stores/{name}/overview.json").json()
        held = summary(stores[name])
        for key in ("samples", "positions", "bytes", "labels"):
            assert told[key] == held[key]
        assert told["nll"] == pytest.approx(held["nll"])
        assert {c["name"]: c["bytes"] for c in told["columns"]} == {
            c["name"]: c["bytes"] for c in held["columns"]
        }
        for chart in told["charts"]:
            assert chart["mean"] == pytest.approx(held["measures"][chart["name"]]["mean"])
            assert sum(b["count"] for b in chart["bins"]) == chart["count"]
        assert sum(row["positions"] for row in told["shards"]) == told["positions"]


def test_ece_equals_its_definition(client, stores):
    opened = stores["topk"]
    confidence, correct = [], []
    for number in range(len(opened)):
        record = opened.sample(number)
        known = has_label(record)
        confidence.append(np.exp(record["logprobs"][:, 0].astype(float))[known])
        correct.append((record["label_rank"] == 0)[known])
    p, hit = np.concatenate(confidence), np.concatenate(correct)
    bins = np.minimum((p * 15).astype(int), 14)
    expected = sum(
        (bins == b).mean() * abs(hit[bins == b].mean() - p[bins == b].mean())
        for b in np.unique(bins)
    )
    told = client.get("/stores/topk/overview.json").json()["reliability"]
    assert told["ece"] == pytest.approx(expected, abs=1e-9)
    assert "15 bins" in told["rule"]


def test_kept_ids_of_topk_and_the_mass_outside(client, stores):
    record = stores["topk"].sample(1)
    exact = stores["dense"].sample(1)["logits"].astype(float)
    exact = np.exp(exact - np.log(np.exp(exact).sum(-1, keepdims=True)))
    for told in client.get("/stores/topk/samples/1/kept.json").json()["positions"]:
        p = told["position"]
        assert [e["id"] for e in told["entries"]] == record["ids"][p].tolist()
        assert [e["rank"] for e in told["entries"]] == list(range(8))
        values = [e["value"] for e in told["entries"]]
        assert values == pytest.approx(exact[p, record["ids"][p]], rel=2e-3, abs=1e-5)
        assert told["outside"]["kind"] == "exact"
        outside = 1 - exact[p, record["ids"][p]].sum()
        assert told["outside"]["mass"] == pytest.approx(outside, rel=3e-3, abs=1e-5)
        label = labels(record)[p]
        if label >= 0:
            assert told["label"]["id"] == label
            assert told["label"]["value"] == pytest.approx(exact[p, label], rel=5e-3, abs=1e-6)
            assert told["label"]["kept"] == (label in record["ids"][p])
            marked = [e["id"] for e in told["entries"] if e["label"]]
            assert marked == ([label] if label in record["ids"][p] else [])
        else:
            assert told["label"] is None


def test_cumulative_mass_per_position_equals_the_logits(client, stores):
    p = np.exp(log_softmax(stores["dense"].sample(3)["logits"]))
    mass = (-np.sort(-p)).cumsum(-1)
    for name, ranked in (("dense", VOCAB), ("topk", 8)):
        for told in client.get(f"/stores/{name}/samples/3/kept.json").json()["positions"]:
            exact = mass[told["position"]][:ranked]
            assert told["mass"]["ks"][-1] == told["mass"]["ranked"] == ranked
            assert told["mass"]["mass"] == pytest.approx(
                [exact[k - 1] for k in told["mass"]["ks"]], abs=2e-3
            )
            for level, needed in told["mass"]["needed"].items():
                if abs(exact - float(level)).min() > 2e-3:
                    reached = np.flatnonzero(exact >= float(level))
                    assert needed == (int(reached[0]) + 1 if len(reached) else None)
    for told in client.get("/stores/threshold/samples/3/kept.json").json()["positions"]:
        if told["mass"] is not None:
            exact = mass[told["position"]][[k - 1 for k in told["mass"]["ks"]]]
            assert told["mass"]["mass"] == pytest.approx(exact, abs=0.02)
    drawn = client.get("/stores/sampled/samples/3/kept.json").json()["positions"]
    assert all(told["mass"] is None for told in drawn)


def test_the_overview_tells_how_many_ids_hold_which_mass(client, stores):
    """The curve of the statistics, and the ranks read from it."""
    told = client.get("/stores/dense/overview.json").json()["cumulative_mass"]
    held = stores["dense"].statistics().cumulative_mass
    assert held is not None
    rows = []
    for number in range(len(stores["dense"])):
        record = stores["dense"].sample(number)
        keys = np.full(record.num_positions, key_of(record.sample_keys()[0]), np.uint64)
        chosen = bits(0x6D617373, keys, np.arange(len(keys)), 0) % np.uint64(64) == 0
        rows.append(np.exp(log_softmax(record["logits"][chosen])))
    mass = (-np.sort(-np.concatenate(rows))).cumsum(-1)
    assert told["positions"] == len(mass) == held.positions > 0
    at = mass[:, [k - 1 for k in told["ks"]]]
    assert told["mass"] == pytest.approx(at.mean(0), abs=1e-6)
    for level in told["levels"]:
        needed = [told["ks"][int((row >= float(level["level"]) - 1e-9).argmax())] for row in at]
        assert level["half"] == sorted(needed)[(len(needed) + 1) // 2 - 1]
        assert level["mean"] == told["ks"][int((at.mean(0) >= float(level["level"])).argmax())]


def test_kept_ids_of_drawn_signals(client, stores):
    record = stores["sampled"].sample(1)
    offsets = record.group_offsets("ids")
    for told in client.get("/stores/sampled/samples/1/kept.json").json()["positions"]:
        part = slice(offsets[told["position"]], offsets[told["position"] + 1])
        counts = dict(
            zip(record["ids"][part].tolist(), record["counts"][part].tolist(), strict=True)
        )
        assert {e["id"]: e["count"] for e in told["entries"]} == counts
        assert all(e["value"] == pytest.approx(e["count"] / 20) for e in told["entries"])
        assert told["outside"] == {**told["outside"], "mass": None, "kind": "unknown"}
    p = np.exp(log_softmax(stores["dense"].sample(1)["logits"]))
    for told in client.get("/stores/threshold/samples/1/kept.json").json()["positions"]:
        heads = told["entries"][: told["heads"]]
        true = p[told["position"]]
        order = np.argsort(-true)
        inside = [e["id"] for e in heads]
        # Heads are kept in steps of 1/64 of a nat, and what is outside is what they leave.
        assert told["outside"]["mass"] == pytest.approx(1 - true[inside].sum(), abs=0.01)
        assert {i for i in range(VOCAB) if true[i] > 0.101} <= {*inside}
        ranks = {e["id"]: e["rank"] for e in heads if e["rank"] is not None}
        assert ranks == {int(order[r]): r for r in ranks.values()}
        assert all(e["rank"] is not None for e in heads if e["value"] > 0.101)
        assert sum(e["value"] for e in heads) + told["outside"]["mass"] == pytest.approx(
            1, abs=1e-5
        )
        assert [e["exact"] for e in told["entries"]] == [
            i < told["heads"] for i in range(len(told["entries"]))
        ]
    for told in client.get("/stores/dense/samples/1/kept.json?top=50").json()["positions"]:
        assert sum(e["value"] for e in told["entries"]) == pytest.approx(1, abs=1e-4)
        assert told["outside"]["kind"] == "none"
    for told in client.get("/stores/graph/samples/1/kept.json").json()["positions"]:
        assert told["entries"] == []


def test_measures_name_their_source_and_the_flag_that_would_store_them(client):
    sources = {
        name: {
            m["name"]: m["source"]
            for m in client.get(f"/stores/{name}/samples/0.json").json()["measures"]
        }
        for name in SIGNALS
    }
    assert sources["topk"] == {
        "entropy": "stored",
        "top1_prob": "derived",
        "label_logprob": "stored",
        "label_rank": "stored",
        "kept_mass": "stored",
    }
    assert sources["q8"]["top1_prob"] == "stored"
    assert sources["sampled"]["top1_prob"] == sources["sampled"]["kept_mass"] == "unavailable"
    assert set(sources["dense"].values()) == {"derived", "stored"}
    told = client.get("/stores/sampled/samples/0.json").json()["measures"]
    assert "--aux top1_logprob" in next(m["how"] for m in told if m["name"] == "top1_prob")


def test_measures_of_every_signal_agree_with_the_logits(client):
    truth = client.get("/stores/dense/samples/3/tokens.json").json()["measures"]
    for name in SIGNALS:
        told = client.get(f"/stores/{name}/samples/3/tokens.json").json()["measures"]
        for measure in told.keys() - {"kept_mass"}:
            for one, true in zip(told[measure], truth[measure], strict=True):
                if one is not None and true is not None:
                    # q8 keeps log-probs in steps of 1/16; a threshold head in steps of 1/64.
                    assert one == pytest.approx(true, rel=0.02, abs=0.02), (name, measure)


def test_a_damaged_shard_names_itself_and_leaves_the_others(tmp_path):
    place = push(tmp_path / "st", "topk:8")
    opened = store.open(place)
    first, second = opened.shards[:2]
    path = place / "shards" / second.object
    data = bytearray(path.read_bytes())
    chunk = opened.commit(1).chunks[0]
    data[chunk.offset + chunk.bytes // 2] ^= 0xFF
    path.write_bytes(data)
    client = TestClient(viewer_app({"st": opened}))
    damaged = first.samples
    answer = client.get(f"/stores/st/samples/{damaged}")
    assert answer.status_code == 500
    assert "chunk-checksum-mismatch" in answer.text
    assert second.object in answer.text
    assert "logitstore verify" in answer.text
    assert client.get("/stores/st/samples/0").status_code == 200
    rows = client.get("/stores/st/overview.json").json()["shards"]
    assert [row["state"] for row in rows[:2]] == ["unread", "damaged"]
    checked = client.get(f"/stores/st/shards/{first.shard}.json?check=1").json()
    assert checked["state"] == "checked"
    page = client.get(f"/stores/st/shards/{second.shard}?check=1").text
    assert "chunk-checksum-mismatch" in page
    assert f"logitstore verify {place} --full" in page
    found = client.get("/stores/st/find.json").json()
    assert [p["shard"] for p in found["problems"]] == [second.shard]
    assert found["partial"]
    assert len(found["results"]) >= 1


def test_empty_store_and_store_without_table_have_helpful_pages(tmp_path, client):
    import logitstore

    logitstore.writer(tmp_path / "new", signal="topk:4", vocab_size=9).close()
    with store.open(tmp_path / "new") as opened:
        empty = TestClient(viewer_app({"new": opened}))
        page = empty.get("/stores/new/overview").text
        assert "Nothing is committed yet" in page
        assert "logitstore precompute" in page
        assert empty.get("/stores/new/find").status_code == 200
    assert "No token text" in client.get("/stores/no-table/overview").text
    tokens = client.get("/stores/no-table/samples/0/tokens.json").json()
    assert tokens["text"] == [f"#{i}" for i in tokens["ids"]]


def test_a_shared_viewer_never_tells_where_stores_are(stores, folder, tmp_path):
    place = push(tmp_path / "st", "topk:8")
    opened = store.open(place)
    (place / "shards" / opened.shards[0].object).unlink()
    app = Starlette(routes=viewer_routes({**stores, "st": opened}))
    shared = TestClient(app)
    for path in (
        "/",
        "/stores/topk/overview",
        "/stores/topk/samples/0",
        "/stores/topk/samples/0.json",
        f"/stores/topk/shards/{stores['topk'].shards[0].shard}",
        "/stores/st/samples/0",
        "/stores/st/samples/0.json",
    ):
        text = shared.get(path).text
        assert str(folder) not in text
        assert str(tmp_path) not in text
    assert "/v1/stores/topk" in shared.get("/stores/topk/samples/0").text


def test_classification_samples_show_class_names(tmp_path):
    import logitstore

    with logitstore.writer(
        tmp_path / "st",
        signal="dense",
        vocab_size=3,
        sample_kind="classification",
        configuration={"classes": ["cat", "<b>dog</b>", "owl"]},
    ) as writer:
        writer.add(2, np.array([0.0, 2.0, 1.0], np.float32))
    with store.open(tmp_path / "st") as opened:
        client = TestClient(viewer_app({"st": opened}))
        told = client.get("/stores/st/samples/0/kept.json").json()["positions"][0]
        assert [e["id"] for e in told["entries"]] == [1, 2, 0]
        assert told["label"]["id"] == 2
        assert [e["text"] for e in told["entries"]] == ["<b>dog</b>", "owl", "cat"]
        assert [r["hit"] for r in client.get("/stores/st/find.json").json()["results"]] == ["owl"]
        assert client.get("/stores/st/samples/0").status_code == 200
        assert client.get("/stores/st/overview").status_code == 200


def test_vendored_files_are_those_of_the_manifest():
    manifest = json.loads((STATIC / "vendor" / "manifest.json").read_text(encoding="utf-8"))
    listed = {}
    for package in manifest.values():
        assert package["version"]
        assert package["licence"]
        listed.update(package["files"])
    found = {
        str(f.relative_to(STATIC / "vendor")): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in (STATIC / "vendor").rglob("*")
        if f.is_file() and f.name != "manifest.json"
    }
    assert found == listed
