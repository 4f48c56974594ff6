"""`logitstore serve s3://...`: every answer is the one that the same store gives from a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pyarrow as pa
import pytest

import logitstore.store
from logitstore.data import LogitDataset, loader
from tests import store_push
from tests.data_stores import make_store, random_samples
from tests.live_service import LiveService
from tests.remote_host import digests

# One name is as long as the other, so that lengths of answers do not differ by it.
NAMES = {"sealed": ("disk-1", "pail-1"), "growing": ("disk-2", "pail-2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    store_push.push(str(folder / "sealed"), "zarr")
    store_push.push(str(folder / "growing"), "arrow", shards=2, seal=False)
    make_store(folder / "trained", random_samples(30), shards=2).close()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """Serves both stores from the disk and from a bucket of a real S3 server."""
    import boto3
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client(
            "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"})
        )
        client.create_bucket(Bucket="data")
        client.close()
        places = []
        for kind, (disk, pail) in NAMES.items():
            logitstore.store.copy(folder / kind, f"s3://data/{kind}")
            places += [f"{disk}={folder / kind}", f"{pail}=s3://data/{kind}"]
        logitstore.store.copy(folder / "trained", "s3://data/trained")
        places.append("s3://data/trained")
        with LiveService(tmp_path_factory.mktemp("logs"), *places) as service:
            yield service
    server.stop()


@pytest.fixture(scope="module")
def ask(service: LiveService) -> Iterator:
    """The same request about both copies; the one answer, whose name of the store is left out."""
    with httpx2.Client(base_url=service.url, timeout=60) as client:

        def ask(kind: str, path: str, **headers: str) -> httpx2.Response:
            answers = []
            for name in NAMES[kind]:
                url = path.format(name)
                sent = {key.replace("_", "-"): value for key, value in headers.items()}
                answers.append(client.get(url, headers={"Accept-Encoding": "identity", **sent}))
            told = []
            for answer, name in zip(answers, NAMES[kind], strict=True):
                assert b"s3://" not in answer.content
                body = answer.content.replace(name.encode(), b"NAME")
                body = re.sub(rb'"request_id": ?"[0-9a-f]+"', b"", body)
                kept = {
                    k: v for k, v in answer.headers.items() if k not in ("date", "x-request-id")
                }
                told.append((answer.status_code, kept, body))
            assert told[0] == told[1]
            return answers[0]

        yield ask


@pytest.mark.parametrize("kind", NAMES)
def test_files_of_a_bucket_are_those_of_the_disk(folder, ask, kind):
    keys = [path for path in (folder / kind).rglob("*") if path.is_file()]
    assert len(keys) >= 7
    for path in keys:
        url = f"/v1/stores/{{}}/{path.relative_to(folder / kind).as_posix()}"
        data = path.read_bytes()
        got = ask(kind, url)
        assert (got.status_code, got.content) == (200, data)
        assert ask(kind, url, If_None_Match=got.headers["etag"]).status_code == 304
        part = ask(kind, url, Range="bytes=10-99")
        assert (part.status_code, part.content) == (206, data[10:100])
        assert part.headers["content-range"] == f"bytes 10-99/{len(data)}"
        assert ask(kind, url, Range="bytes=-5").content == data[-5:]
        assert ask(kind, url, Range="bytes=0-3,8-11").status_code == 206
        assert ask(kind, url, Range=f"bytes={len(data)}-").status_code == 416
    assert ask(kind, "/v1/stores/{}/index.json", Accept_Encoding="zstd").status_code == 200
    for missing in ("shards/0001-000000.deadbeef.zarr.zip", "tables/none", "plans/000009.json"):
        assert ask(kind, f"/v1/stores/{{}}/{missing}").status_code == 404


@pytest.mark.parametrize("kind", NAMES)
def test_samples_rows_and_pages_of_a_bucket_are_those_of_the_disk(ask, kind):
    samples = ask(kind, "/v1/stores/{}/samples")
    assert len(pa.ipc.open_stream(samples.content).read_all()) == (18 if kind == "sealed" else 12)
    ask(kind, "/v1/stores/{}/samples?ids=3,1&k=2", Accept="application/json")
    for route in (
        *("samples?start=2&stop=9&columns=tokens", "splits", "first-rows", "rows?offset=5"),
        *('filter?where=[["length",">=",8]]', "search?query=a", "statistics", "size", "info"),
        *("is-valid", "croissant"),
    ):
        assert ask(kind, f"/v1/stores/{{}}/{route}").status_code == 200, route
    for page in ("overview", "overview.json", "samples/3", "samples/3/kept.json", "find?query=a"):
        assert ask(kind, f"/stores/{{}}/{page}", Accept="text/html").status_code == 200, page
    assert ask(kind, "/stores/{}/shards/0001-000001?check=1", Accept="text/html").status_code == 200
    assert ask(kind, "/stores/{}/samples/99", Accept="text/html").status_code == 404


def test_training_through_the_service_from_a_bucket(folder, service):
    expected = digests(loader(LogitDataset(folder / "trained", shuffle=True), 7))
    url = service.store("trained")
    assert digests(loader(LogitDataset(url, shuffle=True), 7)) == expected


def test_a_store_in_a_bucket_is_served_as_it_grows(folder, service):
    """Captured in the bucket while it is served; last, since the copies then differ."""
    url = service.store("pail-2")
    before = logitstore.store.open(url)
    assert len(before) == 12
    with logitstore.store.append("s3://data/growing") as writer:
        plan = writer.add_push_plan()
        store_push.commit_shard(writer, plan, f"{plan.number:04d}-000000")
        assert len(logitstore.store.open(url)) == 18
        before.sample(11)
        writer.seal()
    with logitstore.store.open(url) as after, logitstore.store.open("s3://data/growing") as bucket:
        assert after.snapshot == bucket.snapshot
        assert bucket.sealed
