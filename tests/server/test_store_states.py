"""Stores that are damaged, taken away, replaced or slow while others beside them are served."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient
from structlog.testing import capture_logs

import logitstore.store
from logitstore.spec.errors import StorageError
from logitstore_server import app as app_module
from logitstore_server import stores as stores_module
from logitstore_server.admission import HostNames
from logitstore_server.app import create_app
from logitstore_server.settings import ServerSettings
from logitstore_server.stores import ServedStore
from tests import store_push
from tests.live_service import LiveService


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stores `good` (sealed) and `bad` (not sealed)."""
    store_push.push(str(tmp_path / "good"), "zarr")
    store_push.push(str(tmp_path / "bad"), "arrow", seal=False)
    return tmp_path


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """Asks a service that looks at its stores at every request."""
    monkeypatch.setattr(stores_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(stores_module, "_MAX_AGE_S", 0.0)
    places = [f"{name}={folder / name}" for name in ("good", "bad")]
    app = create_app(ServerSettings(stores=places), unguarded=True)
    with TestClient(HostNames(app, ServerSettings(allow_hosts=["testserver"]))) as client:
        yield client


def rows(client: TestClient, name: str) -> int | tuple[int, str]:
    """Samples of a store, or status and kind of its problem."""
    answer = client.get(f"/v1/stores/{name}/rows?length=3")
    body = answer.json()
    if answer.status_code == 200:
        return body["num_rows_total"]
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, body["kind"]


def test_a_damaged_store_is_named_and_the_other_is_served(folder):
    """From the start of a real service, with the damage that an operator then mends."""
    header = folder / "bad" / "store.json"
    whole = header.read_bytes()
    flip(header)
    places = [f"{name}={folder / name}" for name in ("good", "bad")]
    logs = folder / "logs"
    logs.mkdir()
    with (
        LiveService(logs, *places) as service,
        httpx2.Client(base_url=service.url, timeout=60) as client,
    ):
        kind = "document-hash-mismatch"
        assert rows(client, "good") == 18
        assert rows(client, "bad") == (500, kind)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["unavailable"]) == (200, {"bad": kind})
        told = client.get("/v1/stores").json()["stores"]
        assert [(each["name"], each["problem"]) for each in told] == [("good", None), ("bad", kind)]
        metrics = client.get("/metrics").text
        assert 'logitstore_store_available{store="bad"} 0.0\n' in metrics
        assert 'logitstore_store_available{store="good"} 1.0\n' in metrics
        header.write_bytes(whole)
        assert rows(client, "bad") == 18
        assert client.get("/readyz").json() == {"status": "ready"}
        service.terminate()
        log = service.log()
    assert "warning: bad cannot be served until this is mended" in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    found = [(line["event"], line["store"]) for line in lines if "store" in line]
    assert found == [("store unavailable", "bad"), ("store available again", "bad")]


def test_a_damaged_commit_costs_the_store_until_it_is_sealed_and_then_its_shard(folder, client):
    """Of a store that grows, a reader could not tell a damaged shard from one yet to come."""
    assert rows(client, "bad") == 18
    logitstore.store.copy(folder / "bad", folder / "sealed")
    with logitstore.store.append(folder / "sealed") as writer:
        writer.seal()
    for name in ("bad", "sealed"):
        flip(folder / name / "commits" / "0001-000001.1.json")
    places = [f"{name}={folder / name}" for name in ("bad", "sealed")]
    with TestClient(create_app(ServerSettings(stores=places), unguarded=True)) as fresh:
        kind = "document-hash-mismatch"
        assert rows(fresh, "bad") == (500, kind)
        assert fresh.get("/readyz").json()["unavailable"] == {"bad": kind}
        samples = "/v1/stores/sealed/samples?ids={}"
        assert fresh.get(samples.format("0,5")).status_code == 200
        assert fresh.get(samples.format("12,17")).status_code == 200
        damaged = fresh.get(samples.format("7"), headers={"Accept": "application/json"})
        assert (damaged.status_code, damaged.json()["kind"]) == (500, kind)


def test_a_store_that_is_taken_away_replaced_and_put_back(folder, client):
    shard = f"/v1/stores/good/shards/{next((folder / 'good' / 'shards').iterdir()).name}"
    assert client.get(shard).status_code == 200
    with capture_logs() as logs:
        (folder / "good").rename(folder / "away")
        assert rows(client, "good") == (503, "not-a-store")
        for path in (shard, "/v1/stores/good/store.json", "/v1/stores/good/index.json"):
            assert client.get(path).status_code == 503, path
        assert client.get("/readyz").json()["unavailable"] == {"good": "not-a-store"}
        assert rows(client, "bad") == 18
        store_push.push(str(folder / "good"), "zarr", shards=1)
        assert rows(client, "good") == 6
        with logitstore.store.open(folder / "good") as other:
            header = client.get("/v1/stores/good/store.json").content
            assert str(other.header.store_uuid).encode() in header
        assert client.get(shard).status_code == 404
        shutil.rmtree(folder / "good")
        (folder / "away").rename(folder / "good")
        assert rows(client, "good") == 18
        assert client.get(shard).status_code == 200
    events = [(log["event"], log["store"], log.get("kind")) for log in logs]
    assert events == [
        ("store unavailable", "good", "not-a-store"),
        ("store available again", "good", None),
    ]


def test_storage_that_cannot_be_reached_keeps_what_is_open_and_no_thread(
    folder, client, monkeypatch
):
    assert rows(client, "good") == 18
    good, bad = client.app._app.state.registry.all()
    asked: list[str] = []

    def silence(served: ServedStore) -> None:
        def unreachable(key: str, **options: object) -> None:
            asked.append(served.name)
            raise StorageError("storage-failed", "no answer", where="bucket")

        monkeypatch.setattr(served.backend, "get", unreachable)

    silence(good)
    silence(bad)
    # What is open stays so; the other one is asked for once, not by every request in turn.
    assert rows(client, "good") == 18
    assert [rows(client, "bad") for _ in range(3)] == [(503, "storage-failed")] * 3
    assert asked.count("bad") == 1
    assert client.get("/readyz").status_code == 503  # a probe names both
    monkeypatch.undo()
    monkeypatch.setattr(stores_module, "_LOOK_S", 0.0)
    bad._failed = None  # as after two seconds
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_probe_is_answered_in_time_and_names_nothing_to_strangers(client, folder, monkeypatch):
    assert rows(client, "good") == 18
    _, bad = client.app._app.state.registry.all()
    monkeypatch.setattr(app_module, "_LOOK_PATIENCE_S", 0.05)
    monkeypatch.setattr(bad, "opened", lambda: time.sleep(0.5))
    body = client.get("/readyz").json()
    assert (body["status"], body["unavailable"]) == ("degraded", {"bad": "storage-failed"})
    stranger = client.get("/readyz", headers={"Host": "rebound.example"}).json()
    assert stranger == {**body, "unavailable": {}}
