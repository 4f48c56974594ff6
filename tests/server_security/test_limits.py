"""Rates, requests in flight, sizes, host names, proxies, origins and headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from logitstore_server.limits import Gate, RateLimit
from logitstore_server.metrics import exposition
from logitstore_server.secure import secure
from logitstore_server.settings import ServerSettings
from tests.server_security.conftest import bearer


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(0.5, 20), st.integers(1, 20))
def test_a_rate_is_never_exceeded(gaps_s: list[float], per_s: float, burst: int) -> None:
    clock = Clock()
    limit = RateLimit(per_s, burst, clock)
    allowed = 0
    for gap_s in gaps_s:
        clock.now_s += gap_s
        wait_s = limit.take("client")
        allowed += wait_s == 0
        assert allowed <= burst + per_s * clock.now_s + 1e-6
        if wait_s:
            assert limit.wait_s("client") == wait_s
            clock.now_s += wait_s + 1e-9
            assert limit.wait_s("client") == pytest.approx(0, abs=1e-6)


def test_clients_have_rates_of_their_own_in_bounded_memory() -> None:
    limit = RateLimit(1, 1, Clock())
    assert limit.take("a") == 0
    assert limit.take("a") == 1
    assert limit.take("b") == 0
    for number in range(20_000):
        limit.take(str(number))
    assert len(limit._buckets) <= 10_000


def test_a_gate_counts_in_and_out() -> None:
    gate = Gate(3, 2)
    assert [gate.enter("a"), gate.enter("a"), gate.enter("a")] == [None, None, "client"]
    assert [gate.enter("b"), gate.enter("c")] == [None, "total"]
    gate.leave("a")
    assert gate.enter("c") is None
    for client in "abc":
        gate.leave(client)
    assert gate._in_flight == {}


def app() -> Starlette:
    async def echo(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body()), "client": request.client})

    async def page(request: Request) -> Response:
        return HTMLResponse("x", headers={"Content-Security-Policy": "default-src 'self'"})

    async def fail(request: Request) -> Response:
        raise ValueError("the text of a corpus")

    async def cut(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"begun"
            raise ValueError("the text of a corpus")

        return StreamingResponse(body())

    return Starlette(
        routes=[
            Route("/v1/stores/a/echo", echo, methods=["GET", "POST"]),
            Route("/v1/stores/a/page", page),
            Route("/v1/stores/a/fail", fail),
            Route("/v1/stores/a/cut", cut),
            Route("/readyz", echo),
        ]
    )


def client_of(**settings: Any) -> TestClient:
    configured = ServerSettings(stores=["a=/a"], **settings)
    return TestClient(
        secure(app(), configured), base_url="http://localhost", raise_server_exceptions=False
    )


def counted(line: str) -> float:
    """The present value of a line of the metrics, 0 if there is none."""
    for row in exposition().decode().splitlines():
        if row.startswith(f"{line} "):
            return float(row.rpartition(" ")[2])
    return 0.0


def test_requests_above_the_rate_are_told_when_to_come_back() -> None:
    refusals = 'logitstore_refusals_total{kind="rate-limited"}'
    before = counted(refusals)
    client = client_of(requests_per_s=0.5)
    answers = [client.get("/v1/stores/a/echo") for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert answers[-1].headers["retry-after"] == "2"
    assert counted(refusals) == before + 2
    assert client.get("/readyz").status_code == 200


def chunks(number: int) -> Iterator[bytes]:
    for _ in range(number):
        yield b"x" * 1000


@pytest.mark.parametrize(("kilobytes", "status"), [(1, 200), (4, 200), (5, 413), (900, 413)])
def test_bodies_above_the_limit_are_refused_with_and_without_a_length(
    kilobytes: int, status: int
) -> None:
    client = client_of(max_body_bytes=4000)
    announced = client.post("/v1/stores/a/echo", content=b"x" * 1000 * kilobytes)
    chunked = client.post("/v1/stores/a/echo", content=chunks(kilobytes))
    assert [announced.status_code, chunked.status_code] == [status, status]
    if status == 413:
        assert announced.json()["kind"] == chunked.json()["kind"] == "request-too-large"


def test_requests_in_flight_are_limited() -> None:
    release = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await JSONResponse({})(scope, receive, send)

    async def status(service: Any, address: str) -> int:
        found = 0

        async def send(message: Any) -> None:
            nonlocal found
            found = message.get("status", found)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/stores/a/x",
            "headers": [(b"host", b"localhost")],
            "client": (address, 1),
        }
        await service(scope, None, send)
        return found

    async def run() -> list[int]:
        settings = ServerSettings(stores=["a=/a"], max_streams=3, max_streams_per_key=2)
        service = secure(wait, settings)
        waiting = [asyncio.create_task(status(service, a)) for a in ("one", "one", "two")]
        await asyncio.sleep(0)
        refused = [await status(service, "three")]
        waiting.append(asyncio.create_task(status(secure(wait, settings), "x")))
        release.set()
        answered = await asyncio.gather(*waiting)
        return [*refused, *answered, await status(service, "one")]

    assert asyncio.run(run()) == [503, 200, 200, 200, 200, 200]


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [
        ("localhost:8640", {}, 200),
        ("127.0.0.1", {}, 200),
        ("[::1]:8640", {}, 200),
        ("evil.example", {}, 421),
        ("localhost.evil.example", {}, 421),
        ("127.0.0.1.evil.example", {}, 421),
        ("", {}, 421),
        ("169.254.169.254", {}, 421),
        ("Logits.example:443", {"allow_hosts": ["logits.EXAMPLE"]}, 200),
        ("other.example", {"allow_hosts": ["logits.example"]}, 421),
        ("10.0.0.7", {"host": "10.0.0.7"}, 200),
        ("0.0.0.0", {"host": "0.0.0.0"}, 421),
        ("anything.example", {"allow_hosts": ["*"]}, 200),
    ],
)
def test_only_our_names_are_answered(host: str, settings: dict[str, Any], status: int) -> None:
    client = client_of(**settings)
    answer = client.get("/v1/stores/a/echo", headers={"Host": host})
    assert answer.status_code == status
    # What an orchestrator probes has no name.
    assert client.get("/readyz", headers={"Host": host}).status_code == 200


def test_forwarded_headers_count_from_trusted_proxies_alone() -> None:
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}

    def seen(settings: ServerSettings) -> str:
        service = secure(app(), settings)
        client = TestClient(service, base_url="http://localhost", client=("10.1.2.3", 5))
        address = client.get("/v1/stores/a/echo", headers=headers).json()["client"][0]
        assert isinstance(address, str)
        return address

    assert seen(ServerSettings(stores=["a=/a"])) == "10.1.2.3"
    trusting = ServerSettings(stores=["a=/a"], trusted_proxies=["10.1.0.0/16"])
    assert seen(trusting) == "203.0.113.9"
    elsewhere = ServerSettings(stores=["a=/a"], trusted_proxies=["10.2.0.0/16"])
    assert seen(elsewhere) == "10.1.2.3"


def test_other_origins_may_not_read() -> None:
    answer = client_of().get("/v1/stores/a/echo", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_named_origins_may_read_without_credentials() -> None:
    client = client_of(cors_origins=["https://good.example"])
    good = client.get("/v1/stores/a/echo", headers={"Origin": "https://good.example"})
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-credentials" not in good.headers
    assert {"ETag", "Content-Range"} <= set(
        good.headers["access-control-expose-headers"].split(", ")
    )
    evil = client.get("/v1/stores/a/echo", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in evil.headers


def test_every_answer_has_security_headers_and_a_page_keeps_its_own() -> None:
    client = client_of()
    for path in ["echo", "fail", "nothing"]:
        headers = client.get(f"/v1/stores/a/{path}").headers
        policy = headers["content-security-policy"]
        assert policy == "default-src 'none'; frame-ancestors 'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    page = client.get("/v1/stores/a/page").headers
    assert page.get_list("content-security-policy") == ["default-src 'self'"]


def test_a_failure_is_a_problem_that_tells_nothing() -> None:
    answer = client_of().get("/v1/stores/a/fail")
    assert answer.status_code == 500
    assert "corpus" not in answer.text


def test_ids_of_requests_and_traces() -> None:
    client = client_of()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    given_id = client.get(
        "/v1/stores/a/echo", headers={"X-Request-ID": "run-7.a", "traceparent": trace}
    )
    assert given_id.headers["x-request-id"] == "run-7.a"
    assert given_id.headers["traceparent"] == trace
    for bad in ["a b", "x" * 200, "<script>", ""]:
        made = client.get(
            "/v1/stores/a/echo", headers={"X-Request-ID": bad, "traceparent": "00-zz"}
        ).headers
        assert len(made["x-request-id"]) == 32
        assert "traceparent" not in made


def test_labels_of_metrics_take_few_values() -> None:
    client = client_of(requests_per_s=0)
    for number in range(30):
        client.get(f"/v1/stores/s{number}/x", headers=bearer("x"))
        client.request(f"M{number}", "/v1/stores/a/echo")
    text = exposition().decode()
    assert "s17" not in text
    assert "M17" not in text
