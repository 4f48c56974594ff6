"""Pages for people: a key exchanged once for a cookie, which shows what the key allows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from logitstore_server.app import create_app
from logitstore_server.keys import revoke_key
from logitstore_server.secure import secure
from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.conftest import Keys, bearer
from tests.server_security.test_auth import templates
from tests.viewer.viewed import push

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PAGE = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreEntry, ...]:
    """Two stores that pages can show in full, and one that cannot be opened."""
    folder = tmp_path_factory.mktemp("shown")
    for name in ("alpha", "beta"):
        push(folder / name, "topk:4")
    names = ("alpha", "beta", "gone")
    return tuple(StoreEntry(name=name, location=str(folder / name)) for name in names)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


@pytest.fixture
def settings(shown: tuple[StoreEntry, ...], keys: Keys) -> ServerSettings:
    return ServerSettings(stores=shown, keys_file=keys.file)


def visit(settings: ServerSettings, *, scheme: str = "http", **changes: Any) -> TestClient:
    settings = ServerSettings(**{**settings.model_dump(), **changes})
    app = secure(create_app(settings), settings)
    return TestClient(app, base_url=f"{scheme}://localhost", follow_redirects=False, headers=PAGE)


@pytest.fixture
def client(settings: ServerSettings) -> Iterator[TestClient]:
    with visit(settings) as client:
        yield client


def cookie_of(client: TestClient) -> dict[str, str]:
    return {"Cookie": f"logitstore-session={client.cookies['logitstore-session']}"}


def log_in(client: TestClient, key: str, **fields: str) -> Any:
    return client.post("/login", data={"key": key, **fields})


def test_a_page_without_a_session_is_the_form_and_leads_back(
    client: TestClient, keys: Keys
) -> None:
    asked = client.get("/stores/alpha/samples/1?measure=label_rank&position=3")
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert asked.headers["cache-control"] == "no-store"
    then = "/stores/alpha/samples/1?measure=label_rank&amp;position=3"
    assert f'name="then" value="{then}"' in asked.text
    answer = log_in(client, keys.alpha, then=then.replace("&amp;", "&"))
    assert answer.status_code == 303
    assert answer.headers["location"] == then.replace("&amp;", "&")
    assert client.get(answer.headers["location"]).status_code == 200
    assert keys.alpha not in asked.text + answer.text + str(answer.headers)
    # Programs are told as before.
    client.cookies.clear()
    assert client.get("/v1/stores").headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "then",
    ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/a\nb",
     "\\\\evil.example", "/\t/evil.example", "", "evil"],
)  # fmt: skip
def test_a_login_never_leads_to_another_site(client: TestClient, keys: Keys, then: str) -> None:
    assert log_in(client, keys.alpha, then=then).headers["location"] == "/"


def test_the_cookie_is_for_this_service_alone(
    client: TestClient, settings: ServerSettings, keys: Keys
) -> None:
    cookie = log_in(client, keys.alpha).headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/", "max-age=28800"} <= set(cookie.split("; "))
    assert "secure" not in cookie
    assert "domain" not in cookie
    assert keys.alpha.split("_", 2)[2].lower() not in cookie
    with visit(settings, scheme="https") as encrypted:
        assert "; secure" in log_in(encrypted, keys.alpha).headers["set-cookie"].lower()


def test_pages_show_what_the_key_allows(client: TestClient, keys: Keys) -> None:
    log_in(client, keys.alpha)
    home = client.get("/")
    assert home.status_code == 200
    assert "alpha" in home.text
    assert "beta" not in home.text
    assert "Log out" in home.text
    assert home.headers["cache-control"] == "private, no-cache"
    assert [each["name"] for each in client.get("/stores.json").json()["stores"]] == ["alpha"]
    assert [each["name"] for each in client.get("/v1/stores").json()["stores"]] == ["alpha"]
    assert client.get("/compare.json").json()["names"] == ["alpha"]


def test_a_foreign_store_is_on_no_page(
    client: TestClient, settings: ServerSettings, keys: Keys
) -> None:
    """Every page of the viewer, by cookie and by key, as a page and as data."""
    pages = [
        template.replace("{sample:number}", "0").replace("{shard}", "0001-000000")
        for template in templates(create_app(settings).routes)
        if "{store}" in template and not template.startswith("/v1")
    ]
    assert len(pages) >= 8
    asked = [page.replace("{store}", "NAME") for page in pages]
    for one, other in (("alpha", "NAME"), ("NAME", "alpha"), ("NAME", "NAME")):
        for end in ("/compare", "/compare.json", "/compare/samples/0", "/compare/samples/0.json"):
            asked.append(f"{end}?a={one}&b={other}")
    log_in(client, keys.alpha)
    for headers in ({}, bearer(keys.alpha), bearer(keys.alpha) | {"Accept": "*/*"}):
        for address in asked:
            seen = [
                client.get(address.replace("NAME", name), headers=headers)
                for name in ("beta", "none")
            ]
            assert [answer.status_code for answer in seen] == [404, 404], address
            words = [
                re.sub(r'"(request_id|instance)": "[^"]*"', "", answer.text) for answer in seen
            ]
            assert words[0] == words[1], address
            assert "beta" not in words[0]
    # A store of texts has no pictures.
    own = [address.replace("NAME", "alpha") for address in asked if "image.png" not in address]
    assert {client.get(address).status_code for address in own} == {200}


def test_a_store_that_cannot_be_opened_leaves_the_others_on_the_first_page(
    client: TestClient, settings: ServerSettings, keys: Keys
) -> None:
    log_in(client, keys.all)
    home = client.get("/")
    assert home.status_code == 200
    assert "not-a-store" in home.text
    assert "alpha" in home.text
    broken = client.get("/stores/gone/overview")
    assert broken.status_code == 503
    folder = str(Path(settings.stores[0].location).parent)
    assert folder not in home.text + broken.text


def test_a_session_ends_with_its_key_its_time_and_a_logout(
    settings: ServerSettings, keys: Keys
) -> None:
    with visit(settings) as client:
        log_in(client, keys.alpha)
        assert client.get("/").status_code == 200
        ended = client.post("/logout")
        assert (ended.status_code, ended.headers["location"]) == (303, "/")
        assert client.get("/").status_code == 401
        log_in(client, keys.alpha)
        revoke_key(keys.file, keys.alpha.split("_")[1])
        assert client.get("/").status_code == 401
    with visit(settings, session_s=1) as client:
        log_in(client, keys.all)
        time.sleep(2.1)  # a session's age is counted in whole seconds
        assert client.get("/", headers=cookie_of(client)).status_code == 401


def test_workers_and_restarts_with_one_secret_agree(settings: ServerSettings, keys: Keys) -> None:
    secret = SecretStr("s" * 32)
    with visit(settings, session_secret=secret) as one:
        log_in(one, keys.alpha)
        cookie = cookie_of(one)
    with visit(settings, session_secret=secret) as other:
        assert other.get("/", headers=cookie).status_code == 200
    with visit(settings, session_secret=SecretStr("t" * 32)) as stranger:
        assert stranger.get("/", headers=cookie).status_code == 401
    assert secret.get_secret_value() not in str(settings) + repr(settings)


def test_a_cookie_reads_and_does_nothing_else(client: TestClient, keys: Keys) -> None:
    log_in(client, keys.alpha)
    assert client.head("/v1/stores").status_code == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path in ("/", "/v1/stores", "/stores/alpha/overview"):
            assert client.request(method, path).status_code == 401
    # A key that is sent wins, also over a session that would allow more.
    assert client.get("/", headers=bearer("ls_aaaaaaaa_x")).status_code == 401


def test_pages_of_others_cannot_log_anybody_in(client: TestClient, keys: Keys) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://["):
        answer = client.post("/login", data={"key": keys.alpha}, headers={"Origin": origin})
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
    own = client.post("/login", data={"key": keys.alpha}, headers={"Origin": "http://localhost"})
    assert own.status_code == 303


@pytest.mark.parametrize(
    "send",
    [
        {"data": {}},
        {"data": {"key": ""}},
        {"data": {"key": "x" * 9000}},
        {"data": {f"k{i}": "v" for i in range(20)}},
        {
            "content": b"key=%ff%00",
            "headers": FORM,
        },
        {"content": b"\xff\xfe", "headers": FORM},
        {"json": {"key": "x"}},
        {"content": b""},
    ],
)
def test_what_is_no_form_with_a_key_is_refused(client: TestClient, send: dict[str, Any]) -> None:
    answer = client.post("/login", **send)
    assert answer.status_code == 401
    assert "no valid key" in answer.text
    assert "set-cookie" not in answer.headers


def test_guessing_by_form_and_by_cookie_is_limited_as_by_header(
    settings: ServerSettings, keys: Keys
) -> None:
    with visit(settings, failed_keys_per_minute=4) as client:
        log_in(client, keys.alpha)
        session = cookie_of(client)
        client.cookies.clear()
        assert log_in(client, "ls_aaaaaaaa_1").status_code == 401
        forged = {"Cookie": session["Cookie"][:-4] + "aaaa"}
        refused = client.get("/", headers=forged)
        assert refused.status_code == 401
        assert "Max-Age=0" in refused.headers["set-cookie"]
        client.cookies.clear()
        assert client.get("/", headers=bearer("ls_aaaaaaaa_2")).status_code == 401
        assert log_in(client, "ls_aaaaaaaa_3").status_code == 401
        limited = log_in(client, "ls_aaaaaaaa_4")
        assert limited.status_code == 429
        assert int(limited.headers["retry-after"]) > 0
        assert "Too many wrong keys" in limited.text
        assert client.get("/", headers=forged).status_code == 429
        client.cookies.clear()
        # The key that was right from here before goes on, also as a session.
        assert client.get("/", headers=session).status_code == 200


def test_pages_and_the_form_have_a_strict_policy(client: TestClient, keys: Keys) -> None:
    def policies() -> set[str]:
        answers = [client.get(path) for path in ("/", "/login", "/stores/none/overview")]
        for answer in answers:
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "<style" not in answer.text
            assert " style=" not in answer.text
        return {answer.headers["content-security-policy"] for answer in answers}

    before = policies()
    log_in(client, keys.alpha)
    assert before == policies()
    (policy,) = before
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self'" in policy


def test_hostile_addresses_are_text_in_the_form(client: TestClient) -> None:
    for path in ("/stores/%22%3E%3Cscript%3E/overview", "/compare?a=%22%3E%3Cimg%20src=x>"):
        text = client.get(path).text
        assert "<script>" not in text
        assert "<img" not in text


def test_without_keys_there_is_nothing_to_log_in_to(settings: ServerSettings) -> None:
    with visit(settings, keys_file=None) as client:
        home = client.get("/")
        assert home.status_code == 200
        assert "Log out" not in home.text
        assert client.get("/login").status_code == 404
