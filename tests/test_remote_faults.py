"""Training over HTTP while the network and the server fail: the same batches, hash by hash."""

from __future__ import annotations

import copy
import http.server
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

import logitstore.store
from logitstore.data import LogitDataset, loader
from logitstore.spec.errors import IntegrityError, StorageError, UsageError
from logitstore.store import retry
from logitstore.store.connect import connect
from logitstore.store.retry_after import parse_retry_after
from tests.data_stores import make_store, random_samples
from tests.remote_host import FaultProxy, StaticHost, digest, digests
from tests.store_report import report

TABLE = b'{"words": ["a", "b"]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of 20 chunks in 2 shards, in a folder `st`."""
    folder = tmp_path_factory.mktemp("host")
    make_store(folder / "st", random_samples(100), shards=2, tables={"t.json": TABLE}).close()
    with logitstore.store.append(folder / "st") as writer:
        writer.seal()
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    """Digests of the batches of a shuffled epoch from the disk."""
    return digests(loader(LogitDataset(folder / "st", shuffle=True), 9))


@pytest.fixture
def host(folder: Path) -> Iterator[StaticHost]:
    host = StaticHost(folder)
    yield host
    host.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that are short where the server names no time."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.05)


def epoch(url: str, **options: object) -> list[str]:
    with LogitDataset(url, shuffle=True, **options) as dataset:
        return digests(loader(dataset, 9))


@pytest.mark.usefixtures("quick")
def test_streams_cut_at_each_tenth(host, expected):
    for tenth in range(10):
        seen: Counter[str] = Counter()

        def rule(method, path, headers, share=tenth / 10, seen=seen) -> str | float:
            asked = path + headers.get("range", "")
            seen[asked] += 1
            return max(share, 1e-9) if seen[asked] == 1 else "pass"

        with FaultProxy(host.url, rule) as proxy:
            assert epoch(f"{proxy.url}/st") == expected
            assert proxy.faults == len(seen) >= 20  # every document and every chunk
        report(f"cut-{tenth}0%", f"{proxy.faults} streams cut, 0 of {len(expected)} batches differ")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("retry_after", [None, "0"])
def test_a_storm_of_429_and_503(host, expected, retry_after):
    numbers = iter(range(10**6))

    def rule(method, path, headers) -> str | int:
        return {0: 429, 1: 503, 2: 500}.get(next(numbers) % 5, "pass")

    with FaultProxy(host.url, rule) as proxy:
        proxy.retry_after = retry_after
        assert epoch(f"{proxy.url}/st") == expected
        assert proxy.faults > 20
        report(
            f"storm, Retry-After {retry_after}",
            f"{len(proxy.requests)} requests, {proxy.faults} refused, "
            f"0 of {len(expected)} batches differ",
        )


@pytest.mark.usefixtures("quick")
def test_a_server_killed_and_started_again(host, expected):
    dataset = LogitDataset(f"{host.url}/st", shuffle=True, cache_bytes=0)
    batches = loader(dataset, 9)
    found = []
    kills = 0
    for batch in batches:
        found.append(digest(batch))
        if len(found) in (2, 6):
            host.stop()
            kills += 1
            threading.Timer(0.7, host.start).start()
    assert found == expected
    report("killed server", f"{kills} kills, 0 of {len(expected)} batches differ")


@pytest.mark.usefixtures("quick")
def test_workers_survive_it_too_and_resume_is_exact(host, expected):
    numbers: Counter[str] = Counter()

    def rule(method, path, headers) -> str | int | float:
        asked = path + headers.get("range", "")
        numbers[asked] += 1
        # Two workers ask at once: documents are not damaged, or one could meet it twice in a row.
        third = "pass" if path.endswith(".json") else "flip"
        return {1: 503, 2: 0.5, 3: third}.get((numbers[asked] + len(asked)) % 6, "pass")

    with FaultProxy(host.url, rule) as proxy:
        dataset = LogitDataset(f"{proxy.url}/st", shuffle=True)
        first = []
        for batch in loader(dataset, 9, num_workers=2):
            first.append(digest(batch))
            if len(first) == 5:
                break
        again = loader(LogitDataset(f"{proxy.url}/st", shuffle=True), 9)
        again.load_state_dict(batch.state)
        assert first + digests(again) == expected
        assert proxy.faults > 10


@pytest.mark.usefixtures("quick")
def test_damaged_bytes_are_asked_for_once_more(host, expected, tmp_path):
    seen: Counter[str] = Counter()

    def rule(method, path, headers) -> str:
        asked = path + headers.get("range", "")
        seen[asked] += 1
        return "flip" if seen[asked] == 1 else "pass"

    with FaultProxy(host.url, rule) as proxy:
        assert epoch(f"{proxy.url}/st", cache_dir=tmp_path) == expected
        store = logitstore.store.open(f"{proxy.url}/st", cache_dir=tmp_path)
        assert store.table("t.json") == TABLE
        assert store.table("t.json") == TABLE
        assert seen["/st/tables/t.json"] == 2
        assert proxy.faults == len(seen)
        assert max(n for asked, n in seen.items() if "json" not in asked) == 2
        report("damaged", f"{proxy.faults} answers damaged and asked for again")


def test_what_stays_damaged_is_named(host, folder, tmp_path):
    def rule(method, path, headers) -> str:
        return "flip" if "range" in headers else "pass"

    with FaultProxy(host.url, rule) as proxy:
        store = logitstore.store.open(f"{proxy.url}/st", cache_dir=tmp_path)
        with pytest.raises(IntegrityError) as caught:
            store.read_chunk(1, 3)
        row = store.commit(1).chunks[3]
        assert caught.value.kind == "chunk-checksum-mismatch"
        assert f"shards/{store.shards[1].object} chunk 3" in caught.value.where
        assert caught.value.expected == f"crc32c {row.crc32c:08x}"
        assert caught.value.got.endswith("twice")
        assert caught.value.data == {"shard": "0001-000001", "chunk": 3}
        assert len([path for _, _, path in proxy.requests if "shards/" in path]) == 2
        # Nothing damaged was kept.
        proxy.rule = lambda *request: "pass"
        local = logitstore.store.open(folder / "st").read_chunk(1, 3)
        assert store.read_chunk(1, 3)["tokens"].tolist() == local["tokens"].tolist()

        def every(method, path, headers) -> str:
            return "flip" if "commits" in path else "pass"

        proxy.rule = every
        with pytest.raises(IntegrityError, match="document-hash-mismatch"):
            logitstore.store.open(f"{proxy.url}/st").read_chunk(0, 0)


def test_retry_after_is_kept_stretched_and_capped(host, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    answers = iter([503, 429, "pass", "pass"])

    def rule(method, path, headers) -> str | int:
        # HEAD asks for the header of the refusal that came before it.
        return 503 if method == "HEAD" else next(answers)

    with FaultProxy(host.url, rule) as proxy:
        proxy.retry_after = "7"
        logitstore.store.open(f"{proxy.url}/st")
        assert len(slept) == 2
        assert all(7 <= seconds <= 7 * 1.25 for seconds in slept)
        assert slept[0] != slept[1]
        methods = [(method, path) for _, method, path in proxy.requests]
        assert methods[:2] == [("GET", "/st/store.json"), ("HEAD", "/st/store.json")]
        # Longer than anybody should wait for the opening of a store: said, not waited for.
        slept.clear()
        proxy.retry_after = "86400"
        proxy.rule = lambda *request: 429
        with pytest.raises(StorageError, match="429") as caught:
            logitstore.store.open(f"{proxy.url}/st")
        assert caught.value.data["retry_after_s"] == 86400
        assert all(seconds <= retry.MAX_RETRY_AFTER_S * 1.25 for seconds in slept)


def test_waits_without_a_named_time_grow_with_jitter(monkeypatch):
    clock = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(retry.time, "sleep", sleep)
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])

    def fail() -> None:
        raise StorageError("storage-failed", "busy", data={"transient": True})

    with pytest.raises(StorageError):
        retry.retrying(fail)
    assert sum(slept) <= retry.OPENING_PATIENCE_S
    slept.clear()
    with pytest.raises(StorageError), retry.patience(retry.TRAINING_PATIENCE_S):
        retry.retrying(fail)
    assert 200 < sum(slept) <= 300
    for number, seconds in enumerate(slept):
        whole = min(0.1 * 2**number, 15)
        assert whole / 2 <= seconds <= whole
    with pytest.raises(StorageError):  # what cannot pass is not tried again
        retry.retrying(lambda: (_ for _ in ()).throw(StorageError("storage-failed", "no")))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5), ("0", 0), (None, None), ("soon", None), ("Mon, 01 Jan 2001 00:00:00 GMT", 0)],
)
def test_parsing_retry_after(value, seconds):
    assert parse_retry_after(value) == seconds


def test_parsing_a_date_ahead():
    assert 50 <= parse_retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


# tokens


def test_the_token_goes_in_a_header_only(host, monkeypatch, tmp_path):
    secret = "lgs_" + "t0ken" * 8

    def rule(method, path, headers) -> str | int:
        assert secret not in path
        return "pass" if headers.get("authorization") == f"Bearer {secret}" else 401

    with FaultProxy(host.url, rule) as proxy:
        with pytest.raises(StorageError, match="LOGITSTORE_TOKEN") as caught:
            logitstore.store.open(f"{proxy.url}/st")
        assert caught.value.kind == "permission-denied"
        monkeypatch.setenv("LOGITSTORE_TOKEN", secret)
        assert len(logitstore.store.open(f"{proxy.url}/st")) == 100
        monkeypatch.delenv("LOGITSTORE_TOKEN")
        path = tmp_path / "token"
        path.write_text(secret + "\n")
        monkeypatch.setenv("LOGITSTORE_TOKEN_FILE", str(path))
        store = logitstore.store.open(f"{proxy.url}/st", cache_dir=tmp_path / "cache")
        store.sample(3)
        # It is in no pickle, so in no worker's arguments, and in no file.
        assert secret.encode() not in pickle.dumps(store)
        for found in (tmp_path / "cache").rglob("*"):
            assert not found.is_file() or secret.encode() not in found.read_bytes()

    monkeypatch.setenv("LOGITSTORE_TOKEN", "two\r\nlines: x")
    with pytest.raises(UsageError) as caught:
        logitstore.store.open(f"{host.url}/st")
    assert "two" not in str(caught.value)
    monkeypatch.delenv("LOGITSTORE_TOKEN")
    monkeypatch.setenv("LOGITSTORE_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="none"):
        logitstore.store.open(f"{host.url}/st")


class Echo:
    """Answers 400 with whatever was sent, redirects `/go/`, and remembers headers."""

    def __init__(self, target: str = "") -> None:
        seen = self.seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(dict(self.headers))
                body = str(self.headers).encode()
                self.send_response(302 if target else 400)
                if target:
                    self.send_header("Location", target + self.path)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_server_cannot_put_the_token_into_an_error_or_pass_it_on(monkeypatch):
    secret = "lgs_" + "s3cret" * 6
    monkeypatch.setenv("LOGITSTORE_TOKEN", secret)
    monkeypatch.setenv("LOGITSTORE_TOKEN_HOSTS", "127.0.0.1, localhost")
    with Echo() as echo:
        with pytest.raises(StorageError, match="400") as caught:
            logitstore.store.open(f"{echo.url}/st")
        assert echo.seen[0]["authorization"] == f"Bearer {secret}"
        assert secret not in str(caught.value)
        assert "Bearer ***" in str(caught.value)
        assert caught.value.__cause__ is None  # the cause would show it
        # obstore follows a redirect to another host, without the token.
        with Echo(target=echo.url.replace("127.0.0.1", "localhost")) as redirecting:
            echo.seen.clear()
            with pytest.raises(StorageError, match="400"):
                logitstore.store.open(f"{redirecting.url}/st")
            assert "authorization" in redirecting.seen[0]
            assert all("authorization" not in headers for headers in echo.seen)
            assert echo.seen


def asks_with(echo: Echo) -> str | None:
    """The Authorization that a server is sent for a store."""
    echo.seen.clear()
    with pytest.raises(StorageError, match="400"):
        logitstore.store.open(f"{echo.url}/st")
    return echo.seen[0].get("authorization")


def test_a_token_goes_to_its_hosts_alone(monkeypatch, tmp_path):
    secret = "lgs_" + "h0st" * 8
    port = "{0.server.server_address[1]}"
    with Echo() as one, Echo() as two:
        monkeypatch.setenv("LOGITSTORE_TOKEN", secret)
        # Without hosts: the first, and no other, also in workers that read from the other alone.
        sent = f"Bearer {secret}"
        assert [asks_with(echo) for echo in (one, two, one)] == [sent, None, sent]
        backend = connect(f"{two.url}/st")
        code = "import pickle, sys; b = pickle.loads(sys.stdin.buffer.read())\n"
        code += "try: b.get('store.json', limit_bytes=9)\nexcept Exception as e: print(e)"
        two.seen.clear()
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(backend),
            capture_output=True,
            check=True,
        )
        assert b"400" in done.stdout
        assert two.seen
        assert "authorization" not in two.seen[0]
        monkeypatch.setenv("LOGITSTORE_TOKEN_HOSTS", f"127.0.0.1:{port.format(two)},other.example")
        assert [asks_with(echo) for echo in (one, two)] == [None, f"Bearer {secret}"]
        monkeypatch.delenv("LOGITSTORE_TOKEN")
        monkeypatch.delenv("LOGITSTORE_TOKEN_HOSTS")
        file = tmp_path / "tokens"
        file.write_text(
            f"# ours\n127.0.0.1:{port.format(one)} t1\n127.0.0.1:{port.format(two)} t2\n"
        )
        monkeypatch.setenv("LOGITSTORE_TOKEN_FILE", str(file))
        assert [asks_with(echo) for echo in (one, two)] == ["Bearer t1", "Bearer t2"]


def test_workers_of_a_fork_server_that_began_without_the_token_are_told(host, monkeypatch):
    """It keeps the variables of its beginning, and so do all that it starts."""

    def rule(method, path, headers) -> str | int:
        return "pass" if headers.get("authorization") == "Bearer right" else 401

    with FaultProxy(host.url, rule) as proxy:
        early = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        early.start()
        early.join()
        monkeypatch.setenv("LOGITSTORE_TOKEN", "right")
        dataset = LogitDataset(f"{proxy.url}/st", shuffle=True)
        with pytest.raises(StorageError, match="fork server keeps") as caught:
            next(iter(loader(dataset, 9, num_workers=1)))
        assert caught.value.kind == "permission-denied"
        assert "right" not in str(caught.value)
        # The same process elsewhere has what it needs, and is told about tokens otherwise.
        store = copy.deepcopy(dataset.store)
        store.read_chunk(0, 0)
        proxy.rule = lambda *request: 401
        with pytest.raises(StorageError, match="LOGITSTORE_TOKEN_FILE"):
            store.read_chunk(0, 1)


@pytest.mark.parametrize("text", [f"{'x' * 30}! host", "a b c", "a\nb", "http://host token1"])
def test_a_file_that_is_none_of_tokens_is_refused_unshown(monkeypatch, tmp_path, text):
    (tmp_path / "tokens").write_text(text)
    monkeypatch.setenv("LOGITSTORE_TOKEN_FILE", str(tmp_path / "tokens"))
    with pytest.raises(UsageError) as caught:
        logitstore.store.open("http://127.0.0.1:9/st")
    assert not any(word in str(caught.value) for word in ("xxxx", "token1"))


# other storages


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("az://container/st", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("s3://bucket/st", "AWS_ACCESS_KEY_ID"),
        ("gs://bucket/st", "GOOGLE_SERVICE_ACCOUNT"),
    ],
)
def test_missing_credentials_are_said(url, told, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    # The metadata service of a cloud's machine, which is asked last, is nowhere here.
    monkeypatch.setattr("logitstore.store.objects._RETRIES", 0)
    with pytest.raises(StorageError) as caught:
        logitstore.store.open(url)
    assert caught.value.kind == "credentials-missing"
    assert told in caught.value.expected
