"""Requests that broke something once, found by `benchmarks/security.py`; none may be a 5xx."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from logitstore_server.app import create_app
from logitstore_server.secure import secure
from logitstore_server.settings import ServerSettings

DIGITS = "9" * 400
CASES = [
    # A media type that is empty but for its parameters.
    ("/v1/stores/open/samples", ";", 406),
    ("/v1/stores/open/samples", "application/json, ;;;", 200),
    # Integers that Python reads and nothing else can hold.
    (f"/stores/open/find?token={DIGITS}", "*/*", 422),
    (f"/stores/open/find?skip={'9' * 20}", "*/*", 422),
    # And one that Python does not read.
    (f"/stores/open/samples/{'9' * 5000}", "*/*", 404),
    (f"/compare/samples/{'9' * 5000}?a=open&b=open", "*/*", 404),
]


@pytest.fixture(scope="module")
def client(entries):
    settings = ServerSettings(stores=entries)
    app = secure(create_app(settings), settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(("path", "accept", "status"), CASES)
def test_odd_requests_are_refused_not_failed(client, path, accept, status):
    assert client.get(path, headers={"Accept": accept}).status_code == status
