"""Stores' files over HTTP: what a reader needs, and what a static file server would answer."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import httpx2
import numpy as np
import pyarrow as pa
import pytest

import logitstore.store
from logitstore.spec.errors import NotFoundError
from logitstore.store import Store, verify
from tests import store_push
from tests.server.live import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sealed` (zarr) and `growing` (arrow, with a plan of which nothing is missing)."""
    root = tmp_path_factory.mktemp("stores")
    store_push.push(str(root / "sealed"), "zarr")
    store_push.push(str(root / "growing"), "arrow", seal=False)
    return root


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    names = [f"{name}={folder / name}" for name in ("sealed", "growing")]
    with serving(*names, f"absent={folder / 'absent'}") as (base, _):
        yield f"{base}/v1/stores"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    # Without headers of its own, so that a request says only what its test says.
    with httpx2.Client(timeout=60, headers={"Accept-Encoding": "identity"}) as each:
        yield each


@pytest.fixture(scope="module")
def shard(folder: Path, url: str) -> tuple[str, bytes]:
    """URL and bytes of a shard's object."""
    name = logitstore.store.open(folder / "sealed").shards[1].object
    return f"{url}/sealed/shards/{name}", (folder / "sealed" / "shards" / name).read_bytes()


def assert_same_samples(one: Store, other: Store) -> None:
    assert one.snapshot == other.snapshot
    assert len(one.shards) == len(other.shards) > 0
    for shard in range(len(one.shards)):
        assert one.commit(shard) == other.commit(shard)
        for chunk in range(len(one.commit(shard).chunks)):
            left, right = one.read_chunk(shard, chunk), other.read_chunk(shard, chunk)
            for name in left.arrays:
                np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("name", ["sealed", "growing"])
def test_the_reader_sees_the_same_store(folder, url, name):
    with (
        logitstore.store.open(folder / name) as disk,
        logitstore.store.open(f"{url}/{name}") as remote,
    ):
        assert_same_samples(disk, remote)
        assert remote.statistics() == disk.statistics()
        assert remote.column_bytes() == disk.column_bytes()
        assert remote.plans() == disk.plans()
        assert remote.table("tokenizer.json") == disk.table("tokenizer.json")
        assert (disk.sealed, remote.sealed) == (name == "sealed", True)


def test_a_sealed_store_verifies_over_http(url):
    assert verify(f"{url}/sealed", full=True).ok


def test_a_store_can_be_read_while_it_grows_and_gets_sealed(tmp_path, client):
    location = str(tmp_path / "grows")
    with (
        logitstore.store.create(location, store_push.header(), store_push.tables()) as writer,
        serving(f"grows={location}") as (base, _),
    ):
        remote_url = f"{base}/v1/stores/grows"
        planned = writer.add_plan(store_push.plan(writer.header, 3))
        assert len(logitstore.store.open(remote_url).shards) == 0
        first = client.get(f"{remote_url}/index.json").headers["etag"]
        # Out of order, as workers finish.
        for number, name in enumerate(["0001-000002", "0001-000000", "0001-000001"], 1):
            store_push.commit_shard(writer, planned, name)
            with logitstore.store.open(remote_url) as remote:
                assert len(remote.shards) == number
                assert_same_samples(logitstore.store.open(location), remote)
        pinned = logitstore.store.open(remote_url)
        store_push.commit_shard(writer, planned, "0001-000000", generation=2)
        with logitstore.store.open(remote_url) as remote:
            assert [view.generation for view in remote.shards] == [2, 1, 1]
            assert_same_samples(logitstore.store.open(location), remote)
        # A reader of the older snapshot still gets what it pinned.
        assert pinned.shards[0].generation == 1
        pinned.read_chunk(0, 0)
        grown = client.get(f"{remote_url}/index.json")
        writer.seal()
        data = client.get(f"{remote_url}/index.json")
        assert data.content == (tmp_path / "grows" / "index.json").read_bytes()
        assert first != grown.headers["etag"]
        # Sealed within the second the other answer was made, both are the same document.
        same = grown.content == data.content
        assert (grown.headers["etag"] == data.headers["etag"]) == same


def test_every_file_is_that_of_the_disk_and_its_etag_is_its_content(folder, url, client):
    root = folder / "sealed"
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        key = path.relative_to(root).as_posix()
        got = client.get(f"{url}/sealed/{key}")
        data = path.read_bytes()
        assert (got.status_code, got.content) == (200, data), key
        digest = hashlib.sha256(data).hexdigest()
        if key.endswith(".json") and not key.startswith("tables/"):
            digest = data[11:75].decode()  # that of the body, which the document itself holds
        assert got.headers["etag"] == f'"{digest}"', key
        lasting = "private, no-cache" if "/" not in key else "private, max-age=31536000, immutable"
        assert got.headers["cache-control"] == lasting, key
        head = client.head(f"{url}/sealed/{key}")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) == len(data)
        assert {**head.headers, "date": 0} == {**got.headers, "date": 0}
        unchanged = client.get(f"{url}/sealed/{key}", headers={"If-None-Match": f'W/"{digest}"'})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == f'"{digest}"'


def test_files_that_no_commit_names_are_not_there(folder, url, client):
    stray = folder / "sealed" / "shards" / "0001-000000.deadbeef.zarr.zip"
    stray.write_bytes(b"loser")
    (folder / "sealed" / "notes.txt").write_bytes(b"private")
    keys = ["shards/0001-000000.deadbeef.zarr.zip", "notes.txt", "shards/", "shards", "tables/none"]
    keys += ["plans/000009.json", "commits/0001-000000.9.json", "commits/x.json", "plans/1.json"]
    keys += ["shards/..%2fstore.json", "shards/%2e%2e/notes.txt", "tables/..%2f..%2fnotes.txt"]
    for key in keys:
        got = client.get(f"{url}/sealed/{key}")
        assert got.status_code == 404, key
        assert got.headers["content-type"] == "application/problem+json"
        assert "private" not in got.text.replace("private,", "")
    stray.unlink()
    (folder / "sealed" / "notes.txt").unlink()


def test_a_store_that_is_not_there(url, client):
    got = client.get(f"{url}/absent/index.json")
    assert (got.status_code, got.json()["kind"]) == (503, "not-a-store")
    assert int(got.headers["retry-after"]) >= 1
    assert "absent'" not in got.text
    got = client.get(f"{url}/nobody/index.json")
    assert (got.status_code, got.json()["kind"]) == (404, "store-not-found")
    with pytest.raises(NotFoundError, match="not-a-store"):
        logitstore.store.open(f"{url}/nobody")


def test_single_ranges(client, shard):
    address, data = shard
    size = len(data)
    for header, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=100-", 100, size),
        (f"bytes=5-{size + 1000}", 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size * 2}", 0, size),
        (f"bytes=3-4, {size}-", 3, 5),  # one of two can be satisfied
    ]:
        got = client.get(address, headers={"Range": header})
        assert got.status_code == 206, header
        assert got.content == data[start:stop]
        assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert int(got.headers["content-length"]) == stop - start


def test_headers_that_are_no_ranges_are_ignored(client, shard):
    address, data = shard
    for header in ["bytes=", "bytes=a-b", "bytes=5-3", "items=0-1", "0-1", "bytes=-", "bytes=1-2;"]:
        got = client.get(address, headers={"Range": header})
        assert (got.status_code, got.content) == (200, data), header


def test_ranges_that_cannot_be_sent(client, shard):
    address, data = shard
    many = ",".join(f"{i}-{i}" for i in range(0, 10_000, 2))
    for header in [
        f"bytes={len(data)}-",
        "bytes=-0",
        f"bytes={10**17}-",
        f"bytes={many}",  # more than the cap
        "bytes=0-,0-",  # longer than the whole
    ]:
        got = client.get(address, headers={"Range": header})
        assert got.status_code == 416, header[:40]
        assert got.headers["content-range"] == f"bytes */{len(data)}"
        assert got.json()["kind"] == "range-not-satisfiable"


def test_several_ranges_are_sent_as_parts(client, shard):
    address, data = shard
    got = client.get(address, headers={"Range": "bytes=0-9, 50-59, -5"})
    assert got.status_code == 206
    assert int(got.headers["content-length"]) == len(got.content)
    kind = got.headers["content-type"]
    assert re.match(r"multipart/byteranges; boundary=\S+$", kind)
    message = message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n" + got.content)
    parts = message.get_payload()
    assert [part["Content-Range"] for part in parts] == [
        f"bytes 0-9/{len(data)}",
        f"bytes 50-59/{len(data)}",
        f"bytes {len(data) - 5}-{len(data) - 1}/{len(data)}",
    ]
    boundary = kind.partition("boundary=")[2].encode()
    bodies = [part.split(b"\r\n\r\n", 1)[1] for part in got.content.split(b"--" + boundary)[1:-1]]
    assert [body[:-2] for body in bodies] == [data[:10], data[50:60], data[-5:]]


def test_conditions(client, shard):
    address, _ = shard
    tag = client.head(address).headers["etag"]
    part = {"Range": "bytes=0-3"}

    def status(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.get(address, headers={**named, **part}).status_code

    assert status(If_Range=tag) == 206
    assert status(If_Range='"other"') == 200
    assert status(If_Range=f"W/{tag}") == 200  # a weak validator cannot vouch for bytes
    assert status(If_Range="Tue, 24 Nov 2026 00:00:00 GMT") == 200
    assert status(If_Match=f'"other", {tag}') == 206
    assert status(If_Match="*") == 206
    assert status(If_Match='"other"') == 412
    assert status(If_Match=f"W/{tag}") == 412
    assert status(If_None_Match=f'"other",{tag}') == 304
    assert status(If_None_Match="*") == 304
    assert status(If_None_Match='"other"') == 206
    refused = client.get(address, headers={"If-Match": '"other"'})
    assert refused.json()["kind"] == "precondition-failed"


def test_the_etag_survives_copy_touch_and_restart(folder, tmp_path, client, shard):
    copied = tmp_path / "copy"
    shutil.copytree(folder / "sealed", copied, copy_function=shutil.copyfile)
    name = shard[0].rpartition("/")[2]
    os.utime(copied / "shards" / name, (1, 1))
    with serving(f"s={copied}") as (base, _):
        got = client.head(f"{base}/v1/stores/s/shards/{name}")
    assert got.headers["etag"] == client.head(shard[0]).headers["etag"]


@pytest.mark.parametrize("key", ["store.json", "index.json", "plans/000001.json"])
def test_documents_are_compressed_as_the_client_likes(url, client, key):
    address = f"{url}/sealed/{key}"
    plain = client.get(address).content

    def get(accepts: str) -> tuple[str, bytes, str]:
        with client.stream("GET", address, headers={"Accept-Encoding": accepts}) as got:
            assert got.headers["vary"] == "Accept-Encoding"
            coding = got.headers.get("content-encoding", "")
            body = b"".join(got.iter_raw())
            assert len(body) == int(got.headers["content-length"])
            return coding, body, got.headers["etag"]

    tags = set()
    for accepts, expected in [
        ("gzip", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=1.0, zstd;q=0.5", "gzip"),
        ("gzip;q=0, zstd;q=0", ""),
        ("identity;q=1, gzip;q=0.5", ""),
        ("*", "zstd"),
        ("*;q=0, gzip", "gzip"),
        ("br", ""),
    ]:
        coding, body, tag = get(accepts)
        assert coding == expected, accepts
        tags.add(tag)
        if coding == "gzip":
            body = gzip.decompress(body)
        elif coding == "zstd":
            body = pa.Codec("zstd").decompress(body, decompressed_size=len(plain), asbytes=True)
        assert body == plain
        again = client.get(address, headers={"Accept-Encoding": accepts, "If-None-Match": tag})
        assert again.status_code == 304
    assert len(tags) == 3  # one for each form
    part = client.get(address, headers={"Accept-Encoding": "gzip", "Range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, plain[2:10])
    assert "content-encoding" not in part.headers
    refused = client.get(address, headers={"Accept-Encoding": "identity;q=0"})
    assert (refused.status_code, refused.json()["kind"]) == (406, "not-acceptable")


def test_a_damaged_object_is_an_error_before_the_first_byte(tmp_path, client):
    store_push.push(str(tmp_path / "s"), "zarr")
    view = logitstore.store.open(tmp_path / "s").shards[0]
    path = tmp_path / "s" / "shards" / view.object
    path.write_bytes(path.read_bytes()[:-1])
    with serving(f"s={tmp_path / 's'}") as (base, _):
        got = client.get(f"{base}/v1/stores/s/shards/{view.object}")
        path.unlink()
        gone = client.get(f"{base}/v1/stores/s/shards/{view.object}")
    assert (got.status_code, got.json()["kind"]) == (500, "object-size-mismatch")
    assert (gone.status_code, gone.json()["kind"]) == (500, "object-missing")
    assert str(tmp_path) not in got.text + gone.text
