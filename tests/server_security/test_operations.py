"""Running the service: several workers, its end, its logs, and what it needs around it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from logitstore_server import logs
from logitstore_server.keys import revoke_key
from logitstore_server.logs import mask
from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.conftest import Keys, bearer
from tests.server_security.live import running

PATIENCE_S = 60


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.05)


def metric(text: str, name: str) -> float:
    """Sum over all labels."""
    rows = [row for row in text.splitlines() if row.partition("{")[0].partition(" ")[0] == name]
    return sum(float(row.rpartition(" ")[2]) for row in rows)


@pytest.fixture(scope="module")
def module_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


def test_workers_agree_on_keys_and_add_up_their_metrics(
    entries: tuple[StoreEntry, ...], tmp_path: Path, module_keys: Keys
) -> None:
    keys = module_keys
    (tmp_path / "counter_4.db").write_bytes(b"left by a run before")
    settings = ServerSettings(
        stores=entries, keys_file=keys.file, port=0, workers=2, metrics_dir=tmp_path,
        shutdown_delay_s=0,
    )  # fmt: skip
    number = 0
    with running(settings, toy=False) as live:
        # A new connection each: the kernel hands them to either worker.
        def status(path: str, key: str) -> int:
            return httpx2.get(f"{live.url}{path}", headers=bearer(key)).status_code

        path = "/v1/stores/alpha/store.json"
        serving: list[psutil.Process] = []
        end_s = time.monotonic() + PATIENCE_S
        while len(serving) < 2:  # one may be ready long before the other
            assert time.monotonic() < end_s, "only one worker ever answers"
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: status(path, keys.alpha), range(30)))
            assert answers == [200] * 30
            number += 30
            workers = psutil.Process(live.process.pid).children()
            serving = [w for w in workers if list(tmp_path.glob(f"counter_{w.pid}.db"))]

        def scraped() -> str:
            return httpx2.get(f"{live.url}/metrics", headers=bearer(keys.metrics)).text

        texts = [scraped() for _ in range(8)]
        for text in texts:
            labels = 'method="GET",route="/v1/stores/{store}/store.json",status="200"'
            assert f"logitstore_requests_total{{{labels}}} {number}.0\n" in text
            assert 'logitstore_response_bytes_total{store="alpha"}' in text
            assert metric(text, "logitstore_requests_in_flight") == 1  # the scrape itself

        login = httpx2.post(f"{live.url}/login", data={"key": keys.alpha})
        session = {"Cookie": login.headers["set-cookie"].partition(";")[0]}
        shown = [httpx2.get(f"{live.url}/", headers=session).status_code for _ in range(16)]
        assert shown == [200] * 16  # either worker knows who logged in at the other

        revoke_key(keys.file, keys.alpha.split("_")[1])
        assert {status(path, keys.alpha) for _ in range(20)} == {401}

        # A killed worker is replaced; its gauges go, its counters stay.
        serving[0].kill()
        eventually(lambda: serving[0].pid not in [
            child.pid for child in psutil.Process(live.process.pid).children()
        ])  # fmt: skip
        text = scraped()
        assert metric(text, "logitstore_requests_in_flight") == 1
        assert metric(text, "logitstore_requests_total") >= number + 8 + 20


def test_workers_end_with_a_parent_that_was_killed_and_leave_the_port() -> None:
    settings = ServerSettings(stores=["a=/a"], port=0, workers=2)
    with running(settings) as live:
        workers = psutil.Process(live.process.pid).children()
        live.process.kill()
        live.process.wait()
        _, alive = psutil.wait_procs(workers, PATIENCE_S)
        assert alive == []
        again = settings.model_copy(update={"port": live.port, "workers": 1})
        with running(again) as restarted:
            assert restarted.port == live.port


@pytest.mark.parametrize("workers", [1, 2])
def test_the_end_is_not_ready_then_closed_then_drained(workers: int) -> None:
    settings = ServerSettings(
        stores=["a=/a"], port=0, workers=workers, shutdown_delay_s=1.5, drain_timeout_s=10
    )
    with running(settings) as live, httpx2.Client(timeout=PATIENCE_S) as client:
        answer: list[int] = []
        slow = threading.Thread(
            target=lambda: answer.append(
                len(httpx2.get(f"{live.url}/v1/stores/a/slow?pause_s=0.4", timeout=60).content)
            )
        )
        slow.start()
        eventually(lambda: in_flight(live.url) == 2)
        live.process.send_signal(signal.SIGTERM)
        eventually(lambda: client.get(f"{live.url}/readyz").status_code == 503)
        # Still served, so that a balancer has time to look.
        assert client.get(f"{live.url}/v1/stores/a/ping").status_code == 200
        assert client.get(f"{live.url}/healthz").status_code == 200
        slow.join()
        assert answer == [100]
        assert live.process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{live.url}/healthz")


def in_flight(url: str) -> float:
    return metric(httpx2.get(f"{url}/metrics").text, "logitstore_requests_in_flight")


def test_an_answer_that_takes_too_long_at_the_end_is_seen_to_be_cut() -> None:
    settings = ServerSettings(stores=["a=/a"], port=0, shutdown_delay_s=0, drain_timeout_s=1)
    with running(settings) as live:
        failures: list[Exception] = []

        def get() -> None:
            try:
                httpx2.get(f"{live.url}/v1/stores/a/slow?pause_s=10", timeout=60)
            except httpx2.HTTPError as error:
                failures.append(error)

        slow = threading.Thread(target=get)
        slow.start()
        eventually(lambda: in_flight(live.url) == 2)
        live.process.send_signal(signal.SIGTERM)
        live.process.wait(PATIENCE_S)
        slow.join()
        assert [type(failure) for failure in failures] == [httpx2.RemoteProtocolError]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    entries = [folder, *folder.rglob("*")]
    for entry in entries:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    try:
        yield
    finally:
        for entry in entries:
            entry.chmod(0o755 if entry.is_dir() else 0o644)


def test_logs_are_lines_of_json_without_secrets(
    entries: tuple[StoreEntry, ...], module_keys: Keys
) -> None:
    """Also: stores that nothing may write to are enough, and none of them is changed."""
    folder = Path(entries[0].location).parent
    before = sorted(folder.rglob("*"))
    keys = module_keys
    settings = ServerSettings(
        stores=entries, keys_file=keys.file, port=0, log_level="debug", shutdown_delay_s=0
    )
    words = ["secretword", "hunter2"]
    with read_only(folder), running(settings, toy=False) as live:
        for path in [
            "/v1/stores/beta/store.json",
            f"/v1/stores/beta/search?query={words[0]}&X-Amz-Signature={words[1]}",
            f"/v1/stores/beta/{keys.all}",
            f"/v1/stores/beta/shards/x?token={words[1]}",
        ]:
            httpx2.get(f"{live.url}{path}", headers=bearer(keys.all) | {"X-Request-ID": "here-1"})
        httpx2.get(f"{live.url}/v1/stores", headers=bearer("ls_aaaaaaaa_" + words[1]))
        live.process.send_signal(signal.SIGTERM)
        live.process.wait(PATIENCE_S)
        log = live.log.read_text()
    assert sorted(folder.rglob("*")) == before
    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in requests[-5:-1]] == ["here-1"] * 4
    assert requests[-2]["client"] == f"key:{keys.all.split('_')[1]}"
    assert requests[-2]["path"] == "/v1/stores/beta/shards/x"
    for secret in [*words, keys.all, keys.all.rpartition("_")[2]]:
        assert secret not in log


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("GET ls_abcdefgh_Zz-_09 now", "GET ls_abcdefgh_*** now"),
        ("s3://b/k?X-Amz-Signature=abc&x=1 failed", "s3://b/k?*** failed"),
        ("https://user:pw@host/x", "https://***@host/x"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("sig=abc&other=1", "sig=***&other=1"),
        ("/v1/stores/a/shards/0001-000000.x.arrow", "/v1/stores/a/shards/0001-000000.x.arrow"),
    ],
)
def test_secrets_are_cut_out(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_a_request_s_line_is_json_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.StringIO()
    monkeypatch.setattr(logs, "_lines", lines)
    monkeypatch.setattr(logs, "_request_log", logging.Logger("requests", logging.INFO))
    key = "ls_abcdefgh_Zz-_09"
    paths = ['/"\n\\\u20ac', f"/{key}", f"/{'x' * 300}/{key}", "/v1"]
    answered = logs.Answered(
        method="GET", route="/", path="", store="", status=0, body_bytes=7, complete=False,
        first_byte_s=0.00012345, stream_s=1e-9, client="address:::1", request_id=key,
        trace_id="0f" * 16,
    )  # fmt: skip
    for path in paths:
        for _ in range(2):  # some texts are remembered
            logs.log_request(answered._replace(path=path))
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [each["path"] for each in found[::2]] == [mask(path) for path in paths]
    assert found[0].pop("timestamp")
    assert found[0] == {
        "event": "request", "level": "info", "method": "GET", "path": paths[0], "status": 0,
        "bytes": 7, "complete": False, "first_byte_s": 0.000123, "stream_s": 0,
        "client": "address:::1", "request_id": mask(key), "trace_id": "0f" * 16,
    }  # fmt: skip
    assert key not in lines.getvalue()


def test_failures_are_logged_by_place_without_their_text() -> None:
    code = (
        "import logging\n"
        "from logitstore_server.logs import configure_logging\n"
        "from logitstore_server.settings import ServerSettings\n"
        "configure_logging(ServerSettings(log_format='json'))\n"
        "try:\n    {}['the text of a corpus']\n"
        "except KeyError:\n    logging.getLogger('uvicorn.error').exception('it failed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    line = json.loads(done.stderr)
    assert line["event"] == "it failed"
    assert line["error"] == "KeyError"
    assert line["stack"] == ["<string>:6 <module>"]
    assert "corpus" not in done.stderr
