"""Copies of stores: between disks, buckets and servers; stopped, damaged, repeated."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitstore import store
from logitstore.data import LogitDataset, loader
from logitstore.spec.errors import CommitError, IntegrityError, UsageError
from logitstore.store import retry, steps
from logitstore_cli.main import run
from tests import store_push
from tests.data_stores import add_shard, make_store, random_samples
from tests.remote_host import FaultProxy, StaticHost, digests
from tests.store_report import report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of 3 shards in `st`."""
    folder = tmp_path_factory.mktemp("host")
    tables = {"t.json": b"[1, 2, 3]"}
    make_store(folder / "st", random_samples(60), shards=3, tables=tables).close()
    with store.append(folder / "st") as writer:
        writer.seal()
    return folder


@pytest.fixture
def host(folder: Path) -> Iterator[StaticHost]:
    host = StaticHost(folder)
    yield host
    host.stop()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import boto3
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="data")
    client.close()
    yield endpoint
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    return "s3://data/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def epoch(location: str | Path) -> list[str]:
    with LogitDataset(location, shuffle=True) as dataset:
        return digests(loader(dataset, 7))


def test_disk_to_bucket_to_disk_and_down_from_a_server(folder, bucket, host, tmp_path):
    expected = epoch(folder / "st")
    for source, target in (
        (folder / "st", bucket),
        (bucket, tmp_path / "from-bucket"),
        (f"{host.url}/st", tmp_path / "from-server"),
        (folder / "st", tmp_path / "from-disk"),
    ):
        seen: list[tuple[int, int]] = []
        done = store.copy(source, target, progress=lambda *p, seen=seen: seen.append(p))
        assert (done.ok, done.sealed, done.copied, done.present) == (True, True, 3, 0)
        assert seen[-1] == (done.bytes, done.bytes)
        assert store.verify(target, full=True).ok
        assert epoch(target) == expected
        again = store.copy(source, target)
        assert (again.copied, again.present, again.bytes, again.sealed) == (0, 3, 0, True)
    for name in ("from-bucket", "from-server", "from-disk"):
        assert files(tmp_path / name) == files(folder / "st")


def test_only_what_is_missing_is_read(folder, host, tmp_path):
    with FaultProxy(host.url) as proxy:
        url = f"{proxy.url}/st"
        store.copy(url, tmp_path / "copy")
        objects = [path for _, _, path in proxy.requests if "shards/" in path]
        assert len(set(objects)) == 3
        damaged = sorted((tmp_path / "copy" / "shards").iterdir())[1]
        damaged.write_bytes(damaged.read_bytes()[:-1])
        proxy.requests.clear()
        assert store.copy(url, tmp_path / "copy").copied == 1
        objects = [path for _, _, path in proxy.requests if "shards/" in path]
        assert {Path(path).name for path in objects} == {damaged.name}
        assert files(tmp_path / "copy") == files(folder / "st")


def test_a_growing_store_is_copied_in_turns(bucket, tmp_path):
    samples = random_samples(40)
    plan_store = tmp_path / "grows"
    make_store(plan_store, samples[:20], shards=2).close()
    first = store.copy(plan_store, bucket)
    assert (first.sealed, first.copied) == (False, 2)
    add_shard(plan_store, samples[20:])
    with store.append(plan_store) as writer:
        writer.seal()
    second = store.copy(plan_store, bucket)
    assert (second.sealed, second.copied, second.present) == (True, 1, 2)
    assert epoch(bucket) == epoch(plan_store)


def _die_at(source: str, target: str, kill_at: int) -> None:
    count = 0

    def hook(name: str) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.hook = hook
    store.copy(source, target)


def test_killed_anywhere_and_run_again(folder, tmp_path):
    expected = files(folder / "st")
    kills = 0
    for kill_at in range(3, 200, 11):
        target = tmp_path / f"copy{kill_at}"
        process = store_push.PROCESSES.Process(
            target=_die_at, args=(str(folder / "st"), str(target), kill_at)
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            assert files(target) == expected
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (target / "store.json").exists():
            assert store.verify(target, full=True).ok  # fewer shards, none of them half
        assert store.copy(folder / "st", target).sealed
        left = files(target)
        assert {n: left[n] for n in expected} == expected
        assert store.verify(target, full=True).ok
    assert 6 <= kills < 15
    report("copy killed", f"{kills} kills, {kills} completed by the same call, 0 files differ")


def test_an_object_without_commit_is_taken_only_when_it_is_whole(folder, tmp_path):
    target = tmp_path / "copy"
    store.copy(folder / "st", target)
    for path in (target / "commits").iterdir():
        path.unlink()
    (target / "index.json").unlink()
    flipped = sorted((target / "shards").iterdir())[0]
    data = bytearray(flipped.read_bytes())
    data[50] ^= 1
    flipped.write_bytes(data)
    done = store.copy(folder / "st", target)
    assert (done.copied, done.sealed) == (3, True)
    assert files(target) == files(folder / "st")


def test_a_damaged_source_is_refused_by_name(folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(folder / "st", source)
    path = sorted((source / "shards").iterdir())[1]
    whole = path.read_bytes()
    row = store.open(source).commit(1).chunks[1]
    cases = {
        "chunk-checksum-mismatch": row.offset + 5,
        "object-hash-mismatch": len(whole) - 10,  # the archive's directory, in no chunk
    }
    for kind, place in cases.items():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        target = tmp_path / kind
        assert run(["copy", str(source), str(target), "--json"]) == 4
        told = json.loads(capsys.readouterr().out)
        assert (told["schema"], told["ok"], told["sealed"]) == ("logitstore.copy/1", False, False)
        [problem] = told["problems"]
        assert (problem["shard"], problem["kind"]) == ("0001-000001", kind)
        assert path.name in problem["where"]
        assert told["copied"] == 2
        assert store.verify(target, full=True).ok
        assert [s.shard for s in store.open(target).shards] == ["0001-000000", "0001-000002"]
        # Mended, the same command completes it.
        path.write_bytes(whole)
        assert run(["copy", str(source), str(target)]) == 0
        assert "1 of 3 shards copied" in capsys.readouterr().out
        assert files(target) == files(folder / "st")
    path.unlink()
    assert run(["copy", str(source), str(tmp_path / "gone")]) == 4
    assert "[object-missing]" in capsys.readouterr().out
    (source / "plans" / "000001.json").write_bytes(b"{}")
    with pytest.raises((IntegrityError, ValueError), match=r"plans/000001\.json"):
        store.copy(source, tmp_path / "none")


def test_a_server_that_fails_and_damages_is_outlasted(folder, host, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    seen: Counter[str] = Counter()

    def rule(method, path, headers) -> str | int | float:
        seen[path] += 1
        return {1: 503, 2: 0.4, 3: "flip"}.get(seen[path], "pass")

    with FaultProxy(host.url, rule) as proxy:
        assert store.copy(f"{proxy.url}/st", tmp_path / "copy").sealed
    assert files(tmp_path / "copy") == files(folder / "st")
    # Refused, asked when to come back, cut, damaged, whole.
    assert all(count >= 4 for path, count in seen.items() if "shards/" in path)


def test_where_a_copy_may_not_go(folder, host, tmp_path):
    make_store(tmp_path / "other", random_samples(4), shards=1).close()
    before = files(tmp_path / "other")
    with pytest.raises(CommitError, match="store-exists"):
        store.copy(folder / "st", tmp_path / "other")
    assert files(tmp_path / "other") == before
    with pytest.raises(UsageError, match="cannot be written"):
        store.copy(folder / "st", f"{host.url}/new")
    shutil.copytree(tmp_path / "other", folder / "unsealed")
    with pytest.raises(IntegrityError, match="sealed"):
        store.copy(f"{host.url}/unsealed", tmp_path / "copy")
