"""Who sees what: every route is denied, then allowed where a rule says so."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import BaseRoute, Mount, Route
from starlette.testclient import TestClient

from logitstore_server.app import create_app
from logitstore_server.auth import Authentication, store_in
from logitstore_server.keys import create_key, revoke_key
from logitstore_server.secure import secure
from logitstore_server.settings import ServerSettings
from tests.server_security.conftest import Keys, bearer

# All that anybody gets to see without a key. It says nothing about a store.
OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/static/viewer.css"),
    ("GET", "/login"),
    ("POST", "/login"),
    ("POST", "/logout"),
}


@pytest.fixture
def client(settings: ServerSettings) -> Iterator[TestClient]:
    with TestClient(secure(create_app(settings), settings), base_url="http://localhost") as client:
        yield client


def client_of(settings: ServerSettings, **changes: Any) -> TestClient:
    changed = ServerSettings(**{**settings.model_dump(), **changes})
    return TestClient(secure(create_app(changed), changed), base_url="http://localhost")


def templates(routes: list[BaseRoute], root: str = "") -> set[str]:
    """The path of every route of an application, those of mounted ones included."""
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Mount):
            found |= templates(list(route.routes), root + route.path) or {root + route.path + "/x"}
        elif isinstance(route, Route):
            found.add(root + route.path)
        else:
            raise AssertionError(f"a kind of route that this test does not know: {route!r}")
    return found


def paths_about(settings: ServerSettings, store: str) -> list[str]:
    """Every mounted path, with the store's name and a plausible value in its places."""
    app = create_app(settings)
    served = next(each for each in app.state.registry.all() if each.name == store)
    shard = served.opened().index.shards[0].object
    values = {
        "store": store,
        "store_name": store,
        "shard": shard,
        "name": shard,
        "sample:number": "0",
        "file:path": "viewer.css",
    }
    paths = []
    for template in templates(app.routes):
        path = template
        while "{" in path:
            before, _, rest = path.partition("{")
            parameter, _, after = rest.partition("}")
            path = before + values[parameter] + after
        paths.append(path)
    return [*sorted(paths), "/metrics", "/login", "/logout"]


def test_every_route_needs_a_key(client: TestClient, settings: ServerSettings) -> None:
    paths = paths_about(settings, "beta")
    assert len(paths) > 35
    assert {f"/v1/stores/beta/{name}" for name in ["store.json", "index.json"]} <= set(paths)
    assert {"/", "/compare", "/stores/beta/overview", "/stores/beta/find"} <= set(paths)
    reachable = set()
    for path in paths:
        for method in ["GET", "HEAD", "POST", "OPTIONS", "DELETE"]:
            for accept in ["*/*", "text/html"]:
                answer = client.request(
                    method, path, headers={"Accept": accept}, follow_redirects=False
                )
                told = answer.headers.get("www-authenticate")
                denied = answer.status_code == 401 and told == 'Bearer error="invalid_token"'
                refused = path in {open_path for _, open_path in OPEN} and answer.status_code == 405
                if not denied and not refused:
                    reachable.add(("GET" if method == "HEAD" else method, path))
    # A posted login without a key is 401, which the loop above cannot tell from a refusal.
    assert reachable == OPEN - {("POST", "/login")}
    print(f"{len(paths)} routes mounted, {len(reachable - OPEN)} reachable without a key")
    # Known and unknown, private and missing: without a key all look the same.
    for path in ["/v1/stores/nothing/store.json", "/nothing", "/", "/v1/stores/"]:
        assert client.get(path).status_code == 401


def test_a_key_for_one_store_finds_no_other_on_any_route(
    client: TestClient, settings: ServerSettings, keys: Keys
) -> None:
    for path in paths_about(settings, "beta"):
        if "beta" not in path:
            continue
        unknown = path.replace("beta", "nothing")
        tags = {"If-None-Match": "*", "Range": "bytes=0-1"}
        for method in ["GET", "HEAD", "POST"]:
            there = client.request(method, path, headers=bearer(keys.alpha) | tags)
            missing = client.request(method, unknown, headers=bearer(keys.alpha) | tags)
            assert there.status_code == missing.status_code == 404, (method, path)
            if method != "HEAD":
                same = [dict(answer.json()) for answer in (there, missing)]
                for body in same:
                    del body["request_id"], body["instance"]
                assert same[0] == same[1]


def test_a_list_of_stores_holds_what_the_key_allows(client: TestClient, keys: Keys) -> None:
    def listed(headers: dict[str, str]) -> set[str]:
        return {row["name"] for row in client.get("/v1/stores", headers=headers).json()["stores"]}

    assert listed(bearer(keys.alpha)) == {"alpha", "open"}
    assert listed(bearer(keys.all)) == {"alpha", "beta", "open"}


def test_a_key_reads_its_store_and_anybody_a_public_one(client: TestClient, keys: Keys) -> None:
    alpha = client.get("/v1/stores/alpha/store.json", headers=bearer(keys.alpha))
    assert alpha.status_code == 200
    assert "public" not in alpha.headers["cache-control"]
    public = client.get("/v1/stores/open/store.json")
    assert public.status_code == 200
    assert (
        client.get("/v1/stores/alpha/store.json", headers=bearer(keys.metrics)).status_code == 404
    )


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer ls_aaaaaaaa_x", "Bearer \xff", "x"]
)
def test_what_is_no_key_is_401(client: TestClient, value: str) -> None:
    for path in ["/v1/stores/alpha/store.json", "/v1/stores/open/store.json", "/v1/stores"]:
        answer = client.get(path, headers={"Authorization": value.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.json()["kind"] == "key-invalid"


def test_a_revoked_key_is_refused_at_once(client: TestClient, keys: Keys) -> None:
    path = "/v1/stores/alpha/store.json"
    assert client.get(path, headers=bearer(keys.alpha)).status_code == 200
    revoke_key(keys.file, keys.alpha.split("_")[1])
    assert client.get(path, headers=bearer(keys.alpha)).status_code == 401


def test_a_broken_file_of_keys_denies_and_tells_no_path(client: TestClient, keys: Keys) -> None:
    keys.file.write_text("{")
    answer = client.get("/v1/stores/alpha/store.json", headers=bearer(keys.alpha))
    assert answer.status_code == 503
    assert answer.json()["kind"] == "keys-file"
    assert str(keys.file) not in answer.text


def test_metrics_need_their_scope(client: TestClient, keys: Keys) -> None:
    assert client.get("/metrics", headers=bearer(keys.metrics)).status_code == 200
    refused = client.get("/metrics", headers=bearer(keys.all))
    assert refused.status_code == 403
    assert refused.headers["www-authenticate"] == 'Bearer error="insufficient_scope"'


def test_guessing_is_limited_and_does_not_lock_others_out(
    settings: ServerSettings, keys: Keys
) -> None:
    path = "/v1/stores/alpha/store.json"
    with client_of(settings, failed_keys_per_minute=3) as client:
        assert client.get(path, headers=bearer(keys.alpha)).status_code == 200
        guesses = [client.get(path, headers=bearer(f"ls_aaaaaaaa_{i}")) for i in range(5)]
        assert [answer.status_code for answer in guesses] == [401, 401, 401, 429, 429]
        assert 1 <= int(guesses[-1].headers["retry-after"]) <= 20
        # A key that was right from here before goes on; one that never was has to wait.
        assert client.get(path, headers=bearer(keys.alpha)).status_code == 200
        assert client.get(path, headers=bearer(keys.all)).status_code == 429


def test_without_a_file_of_keys_everything_is_open_on_loopback(settings: ServerSettings) -> None:
    with client_of(settings, keys_file=None) as client:
        assert client.get("/v1/stores/beta/store.json").status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.get("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "store"),
    [
        ("/v1/stores/a/store.json", "a"),
        ("/v1/stores/a", "a"),
        ("/view/stores/a.b-c/samples/3", "a.b-c"),
        ("/stores/a/overview", "a"),
        ("/v1/stores", None),
        ("/v1/stores/", None),
        ("/v1/stores/../b", None),
        ("/v1//stores/a", None),
        ("//v1/stores/a", None),
        ("/v1/stores/a\n/x", None),
        ("/v1/v2/stores/a", None),
    ],
)
def test_the_store_of_a_path(path: str, store: str | None) -> None:
    assert store_in(path) == store


TRAVERSAL = [
    prefix + step * times + target
    for prefix in ["/v1/stores/alpha/", "/v1/stores/alpha/shards/", "/v1/stores/"]
    for step in [
        "../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "..%5c", "%252e%252e%252f", "....//",
        "..;/", "%c0%ae%c0%ae/", "..%00/", ".%2e/",
    ]
    for times in [1, 2, 6]
    for target in ["etc/passwd", "beta/store.json", "keys.json"]
]  # fmt: skip


def test_no_path_climbs_out_of_its_store(
    client: TestClient, keys: Keys, settings: ServerSettings
) -> None:
    assert len(TRAVERSAL) >= 200
    secret = Path(settings.stores[1].location, "store.json").read_bytes()
    for path in TRAVERSAL:
        answer = client.get(path, headers=bearer(keys.alpha))
        assert answer.status_code in (404, 422), path
        assert b"root:" not in answer.content
        assert secret not in answer.content


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:22/",
        "file:///etc/passwd",
        "s3://other-bucket/store",
        "http://[::ffff:169.254.169.254]/",
        "gopher://127.0.0.1/",
    ],
)
def test_no_location_of_a_client_is_opened(
    settings: ServerSettings, keys: Keys, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stores of the settings are the only ones: nothing connects for a client's location."""
    with client_of(settings) as client:
        client.get("/v1/stores", headers=bearer(keys.all))

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"connected to {args}")

        monkeypatch.setattr("logitstore_server.stores.connect", refuse)
        for name in ["store", "dataset", "url", "location", "path"]:
            query = {name: target}
            for path in ["/v1/stores", f"/v1/stores/{target}", "/v1/stores/alpha/store.json"]:
                answer = client.get(path, params=query, headers=bearer(keys.all))
                assert answer.status_code in (200, 404, 422)
                assert "root:" not in answer.text


def test_problems_are_one_form(client: TestClient) -> None:
    answer = client.get("/v1/stores/alpha/store.json", headers={"X-Request-ID": "abc-1"})
    assert answer.headers["content-type"] == "application/problem+json"
    body = json.loads(answer.content)
    assert {"type", "title", "status", "detail", "instance", "kind"} <= set(body)
    assert body["request_id"] == answer.headers["x-request-id"] == "abc-1"


def test_what_a_key_was_found_to_allow_holds_while_it_would_be_found_again(
    settings: ServerSettings, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    text, _ = create_key(keys.file, label="", stores=["alpha"], metrics=False, expires=end)
    authentication = Authentication(create_app(settings), settings)
    scope = {"headers": [(b"authorization", f"Bearer {text}".encode())], "path": ""}

    def found() -> Any:
        return authentication.plain_access(scope)

    assert found() is None  # never seen before
    authentication._access({**scope, "path": "/v1/stores/alpha/store.json"})
    access, key = found()
    assert access.stores == {"alpha", "open"}
    assert authentication.is_still_valid(key)
    keys.add("beta")  # another entry of the file
    assert not authentication.is_still_valid(key)
    access, key = found()
    assert authentication.is_still_valid(key)
    monkeypatch.setattr("logitstore_server.keys._now", lambda: end)
    assert not authentication.is_still_valid(key)
    assert found() is None
    monkeypatch.undo()
    assert authentication.is_still_valid(key)
    keys.file.unlink()
    assert not authentication.is_still_valid(key)
    assert found() is None
