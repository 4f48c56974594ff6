"""The application as a whole: its routes, its one form of error, its description."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

import logitstore.store
from logitstore.spec.errors import KINDS
from logitstore_server.app import create_app
from logitstore_server.export_openapi import document
from logitstore_server.problems import STATUS
from logitstore_server.routing import GetRoute
from logitstore_server.settings import ServerSettings
from logitstore_server.stores import ServedStore
from tests import store_push

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = {"type", "title", "status", "detail", "instance", "kind", "request_id"}

# A name that a file of each folder may have.
NAMES = {
    "shards": "0001-000000.deadbeef.zarr.zip",
    "commits": "0001-000000.1.json",
    "plans": "000001.json",
    "tables": "tokenizer.json",
}


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    store_push.push(str(path), "zarr")
    return path


@pytest.fixture(scope="module")
def app(location: Path) -> FastAPI:
    return create_app(
        ServerSettings(stores=(f"s={location}", f"gone={location}-none")), unguarded=True
    )


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as each:
        yield each


def paths(app: FastAPI, store: str = "s") -> list[str]:
    """A path for every route of the API; those of pages have tests of their own."""
    return [
        route.path.format(store=store, name=NAMES.get(route.path.split("/")[-2]))
        for route in app.routes
        if isinstance(route, GetRoute)
    ]


def assert_problem(answer, status: int, path: str) -> dict:
    body = answer.json()
    assert answer.status_code == body["status"] == status, path
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(body) - {"errors"} == KEYS
    assert body["kind"] in KINDS
    assert body["type"] == f"/errors/{body['kind']}"
    assert body["title"] == KINDS[body["kind"]]
    assert all(isinstance(body[key], str) for key in KEYS - {"status"})
    assert answer.headers["x-content-type-options"] == "nosniff"
    return body


def test_every_route_answers_get_and_head_and_refuses_the_rest(app, client):
    for path in paths(app):
        got = client.get(path)
        head = client.head(path)
        assert (got.status_code, head.status_code) == (head.status_code, got.status_code)
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            refused = client.request(method, path, content=b"x" * 1000)
            assert assert_problem(refused, 405, path)["kind"] == "method-not-allowed"
            assert refused.headers["allow"] == "GET, HEAD"
        assert_problem(client.get(path + "/"), 404, path)


def test_every_route_tells_its_failures_in_one_form(app, client, monkeypatch):
    for path in paths(app, store="nobody"):
        if "nobody" in path:
            assert assert_problem(client.get(path), 404, path)["kind"] == "store-not-found"
    valid = {"filter": "?where=[]", "search": "?query=a"}
    for path in paths(app, store="gone"):
        if "gone" in path:
            query = valid.get(path.rpartition("/")[2], "")
            body = assert_problem(client.get(path + query), 503, path)
            assert body["kind"] == "not-a-store"
            assert body["instance"] == path
            assert "-none" not in json.dumps(body)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret of the server")

    for name in ("opened", "header", "known_object", "document", "tokenizer"):
        monkeypatch.setattr(ServedStore, name, fail)
    for path in paths(app):
        if path.startswith("/v1/stores"):
            query = valid.get(path.rpartition("/")[2], "")
            answer = client.get(path + query)
            body = assert_problem(answer, 500, path)
            assert body["kind"] == "internal"
            assert "secret" not in answer.text
            assert "Error" not in answer.text


@pytest.mark.parametrize(
    "path", ["/x", "/v1", "/v1/stores/s", "/v1/stores/s/x", "/v1//stores", "/%3Cscript%3E", "/%00"]
)
def test_unknown_paths(client, path):
    body = assert_problem(client.get(path), 404, path)
    assert body["kind"] in ("path-not-found", "store-not-found")
    assert "script" not in json.dumps(body)


def test_the_request_id_is_the_one_given_in_front(app):
    async def front(scope, receive, send):
        if scope["type"] == "http":
            scope.setdefault("state", {})["request_id"] = "id-1"
        await app(scope, receive, send)

    with TestClient(front) as client:
        assert client.get("/x").json()["request_id"] == "id-1"


def test_without_a_decision_on_access_nothing_is_answered(location):
    """An application that somebody mounts without `secure` shows nothing at all."""
    settings = ServerSettings(stores=(f"s={location}",))
    with TestClient(create_app(settings)) as client:
        every = [route.path for route in client.app.routes]
        assert len(every) > 30
        for template in [*every, "/nothing"]:
            path = template.replace("{store}", "s").replace("{sample:number}", "0")
            answer = client.get(path)
            if path in ("/healthz", "/readyz"):
                assert answer.status_code == 200
                continue
            assert assert_problem(answer, 401, path)["kind"] == "key-invalid"
            assert "www-authenticate" in answer.headers


def test_lists_name_only_stores_that_the_client_may_see(app, location):
    async def front(scope, receive, send):
        if scope["type"] == "http":
            scope.setdefault("state", {})["allowed_stores"] = {"s"}
        await app(scope, receive, send)

    def told(target) -> list[dict]:
        with TestClient(target) as client:
            return client.get("/v1/stores").json()["stores"]

    everything = told(app)
    assert [(each["name"], each["available"], each["problem"]) for each in everything] == [
        ("s", True, None),
        ("gone", False, "not-a-store"),
    ]
    with logitstore.store.open(location) as store:
        assert everything[0] == {
            "name": "s",
            "available": True,
            "problem": None,
            "sealed": True,
            "sample_kind": "sequence",
            "signal": "topk:4",
            "samples": store.num_samples,
            "positions": store.num_positions,
            "shards": 3,
            "bytes": sum(view.object_bytes for view in store.shards),
        }
    assert [each["name"] for each in told(front)] == ["s"]


def test_health_is_of_the_process_and_readiness_of_the_stores(client, location):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {
        "status": "degraded",
        "detail": "1 of 2 stores cannot be opened",
        "unavailable": {"gone": "not-a-store"},
    }

    def asked(*stores: str, **options: object):
        with TestClient(create_app(ServerSettings(stores=stores), **options)) as other:
            return other.get("/readyz")

    assert asked(f"s={location}", unguarded=True).json() == {"status": "ready"}
    gone = f"gone={location}-none"
    body = assert_problem(asked(gone, unguarded=True), 503, "/readyz")
    assert (body["kind"], body["detail"]) == (
        "store-unavailable",
        "1 of 1 stores cannot be opened; gone: not-a-store",
    )
    # Who may see no store is told no name.
    assert asked(gone).json()["detail"] == "1 of 1 stores cannot be opened"
    assert asked(f"s={location}", gone).json()["unavailable"] == {}


def test_every_status_belongs_to_a_known_kind():
    assert set(STATUS) <= set(KINDS)
    assert all(400 <= status < 600 for status in STATUS.values())


def test_a_store_that_may_not_be_written_can_be_served(tmp_path):
    store_push.push(str(tmp_path / "s"), "arrow", seal=False)
    before = {p: p.stat() for p in tmp_path.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    settings = ServerSettings(stores=(f"s={tmp_path / 's'}",))
    with TestClient(create_app(settings, unguarded=True)) as client:
        assert client.get("/v1/stores/s/index.json").status_code == 200
        assert client.get("/v1/stores/s/samples").status_code == 200
        assert client.get("/v1/stores/s/rows").status_code == 200
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == {
        p: status.st_mtime_ns for p, status in before.items()
    }
    for path in before:
        path.chmod(0o755)


def test_the_description_is_the_exported_one():
    exported = (REPOSITORY / "schemas" / "openapi.json").read_text(encoding="utf-8")
    assert exported == document(), "python -m logitstore_server.export_openapi schemas/openapi.json"


def test_the_description_names_errors_and_is_what_the_app_shows(app, client):
    described = json.loads(document())
    assert client.get("/v1/openapi.json").json() == described
    templates = {route.path for route in app.routes if isinstance(route, GetRoute)}
    assert set(described["paths"]) == templates
    operation_ids = []
    for item in described["paths"].values():
        assert set(item) == {"get"}
        operation_ids.append(item["get"]["operationId"])
        responses = item["get"]["responses"]
        assert {"200", "500", "503"} <= set(responses)
        for status, response in responses.items():
            if int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}
    assert len(set(operation_ids)) == len(operation_ids)


def _fuzz(location: Path, examples: int) -> None:
    """Requests made from the description; each answer is compared with it."""
    names = [view.object for view in logitstore.store.open(location).shards]
    program = [sys.executable, str(REPOSITORY / "tests" / "server" / "fuzz.py")]
    done = subprocess.run(
        [*program, str(location), str(examples), names[0]],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_generated_requests_get_described_answers(location):
    _fuzz(location, 6)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_many_generated_requests_get_described_answers(location):
    _fuzz(location, 300)
