"""Samples over HTTP: Arrow streams and JSON, whole or not at all, in bounded memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import psutil
import pyarrow as pa
import pytest

import logitstore.store
from logitstore.containers.arrow_shard import record_batch
from logitstore.record import Record
from logitstore.record.new_header import new_header
from logitstore.spec.header import TeacherInfo
from logitstore.spec.signals import parse_signal
from logitstore.spec.statistics import Statistics
from logitstore.store import Store
from tests import store_push
from tests.data_stores import make_header, make_store, random_samples
from tests.server.live import serving

ARROW = "application/vnd.apache.arrow.stream"
SIGNALS = {
    "topk": "topk:4",
    "nucleus": "topk:8,p=0.8",
    "sampled": "sampled:12",
    "threshold": "threshold:tau=1/10",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    store_push.push(str(root / "topk"), "zarr")
    for name in ("nucleus", "sampled", "threshold"):
        header = make_header(SIGNALS[name], container="arrow" if name == "sampled" else "zarr")
        make_store(root / name, random_samples(20), header=header, shards=2).close()
    return root


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(*(f"{name}={folder / name}" for name in SIGNALS)) as (base, _):
        yield f"{base}/v1/stores"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=60) as each:
        yield each


def read_stream(answer: httpx2.Response) -> pa.Table:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(ARROW)
    assert "content-encoding" not in answer.headers
    table = pa.ipc.open_stream(answer.content).read_all()
    table.validate(full=True)
    assert table.schema.metadata[b"logitstore.rows"] == str(len(table)).encode()
    assert answer.headers["logitstore-rows"] == str(len(table))
    return table


def expected(store: Store, samples: list[int]) -> pa.Table:
    batches = []
    for number in samples:
        batch = record_batch(store.sample(number))
        numbered = [pa.array([number], pa.uint64()), *batch.columns]
        batches.append(pa.RecordBatch.from_arrays(numbered, ["sample", *batch.schema.names]))
    return pa.Table.from_batches(batches)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_stream_holds_the_samples_in_the_order_asked_for(folder, url, client, name):
    with logitstore.store.open(folder / name) as store:
        count = store.num_samples
        for query, samples in [
            ("", list(range(count))),
            (f"?start=3&stop={count - 2}", list(range(3, count - 2))),
            ("?ids=7,0,17,3,3,1,2", [7, 0, 17, 3, 3, 1, 2]),
        ]:
            table = read_stream(client.get(f"{url}/{name}/samples{query}"))
            assert table.replace_schema_metadata().equals(expected(store, samples))
    empty = read_stream(client.get(f"{url}/{name}/samples?start=5&stop=5"))
    assert (len(empty), empty.schema) == (0, table.schema)


def test_only_the_columns_asked_for(folder, url, client):
    table = read_stream(client.get(f"{url}/threshold/samples?columns=tokens,head_ids&start=2"))
    assert table.column_names == ["sample", "sample_lengths", "tokens", "head_ids"]
    with logitstore.store.open(folder / "threshold") as store:
        whole = expected(store, list(range(2, store.num_samples)))
    assert table.replace_schema_metadata().equals(whole.select(table.column_names))


def test_a_sample_asked_for_many_times_does_not_grow_a_batch(folder, url, client):
    """A batch for each chunk, except that none is larger than its chunk."""
    with logitstore.store.open(folder / "topk") as store:
        shard, chunk, _ = store.locate(3)
        chunk_positions = store.commit(shard).chunks[chunk].positions
    answer = client.get(f"{url}/topk/samples?columns=tokens&ids={','.join(['3'] * 500)}")
    batches = list(pa.ipc.open_stream(answer.content))
    assert sum(len(batch) for batch in batches) == 500
    assert {number for batch in batches for number in batch["sample"].to_pylist()} == {3}
    assert max(sum(map(len, batch["tokens"].to_pylist())) for batch in batches) <= chunk_positions


@pytest.mark.parametrize("name", ["topk", "nucleus"])
def test_k_keeps_the_largest_ids_and_all_the_mass(folder, url, client, name):
    table = read_stream(client.get(f"{url}/{name}/samples?k=2&columns=ids,logprobs,log_tail"))
    with logitstore.store.open(folder / name) as store:
        whole = expected(store, list(range(store.num_samples)))
    positions = 0
    for short, full in zip(table.to_pylist(), whole.to_pylist(), strict=True):
        for i, ids in enumerate(full["ids"]):
            positions += 1
            assert short["ids"][i] == ids[:2]
            assert short["logprobs"][i] == full["logprobs"][i][:2]
            dropped = np.exp(np.array(full["logprobs"][i][2:], float)).sum()
            mass = np.exp(float(full["log_tail"][i])) + dropped
            assert np.exp(float(short["log_tail"][i])) == pytest.approx(mass, rel=2e-3)
    assert positions > 100
    tails = read_stream(client.get(f"{url}/{name}/samples?k=2&columns=log_tail"))
    assert tails.column_names == ["sample", "sample_lengths", "log_tail"]
    assert tails["log_tail"].equals(table["log_tail"])


@pytest.mark.parametrize(
    ("accept", "codec"),
    [
        (None, None),
        ("*/*", None),
        (ARROW, None),
        (f'{ARROW}; codecs="zstd"', "zstd"),
        (f"{ARROW};codecs=lz4", "lz4"),
        (f'{ARROW}; codecs="snappy, lz4, zstd"', "lz4"),
        (f"{ARROW}; codecs=snappy", None),  # uncompressed is always possible
        (f'application/json;q=0.5, {ARROW};codecs="identity"', None),
    ],
)
def test_codecs_are_those_that_the_client_reads(url, client, accept, codec):
    headers = {} if accept is None else {"Accept": accept}
    answer = client.get(f"{url}/topk/samples", headers=headers)
    echoed = ARROW if codec is None else f'{ARROW}; codecs="{codec}"'
    assert answer.headers["content-type"] == echoed
    assert read_stream(answer).equals(read_stream(client.get(f"{url}/topk/samples?codecs=none")))
    message = next(m for m in pa.ipc.MessageReader.open_stream(answer.content) if m.body)
    assert (b"BodyCompression" in bytes(message.metadata)) is False  # a table, not a name
    plain = client.get(f"{url}/topk/samples?codecs=none").content
    assert (answer.content != plain) == (codec is not None)


def test_small_answers_as_json(folder, url, client):
    answer = client.get(f"{url}/topk/samples?ids=4,2", headers={"Accept": "application/json"})
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    with logitstore.store.open(folder / "topk") as store:
        assert body["rows"] == expected(store, [4, 2]).to_pylist()
        assert body["snapshot"] == store.snapshot.digest
    assert body["num_rows"] == 2


def test_questions_without_an_answer(url, client):
    for path, status, kind in [
        ("topk/samples?ids=18", 404, "sample-out-of-range"),
        ("topk/samples?ids=1;2", 422, "bad-argument"),
        ("topk/samples?ids=-1", 422, "bad-argument"),
        ("topk/samples?start=-1", 422, "bad-argument"),
        ("topk/samples?ids=1&start=0", 422, "bad-argument"),
        ("topk/samples?columns=none", 422, "bad-argument"),
        ("topk/samples?k=5", 422, "k-exceeds-vocabulary"),
        ("sampled/samples?k=2", 422, "conversion-refused"),
        ("topk/samples?codecs=snappy", 422, "bad-argument"),
        ("nobody/samples", 404, "store-not-found"),
    ]:
        answer = client.get(f"{url}/{path}")
        assert (answer.status_code, answer.json()["kind"]) == (status, kind), path
    answer = client.get(f"{url}/topk/samples", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.json()["kind"]) == (406, "not-acceptable")
    many = ",".join(["1"] * 101)
    answer = client.get(f"{url}/topk/samples?ids={many}", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()["kind"]) == (422, "bad-argument")


def test_a_stream_that_is_cut_cannot_be_taken_for_a_whole_one(url, client):
    data = client.get(f"{url}/topk/samples").content
    for tenth in range(1, 10):
        cut = data[: len(data) * tenth // 10]
        try:
            reader = pa.ipc.open_stream(cut)
            rows = int(reader.schema.metadata[b"logitstore.rows"])
            got = sum(len(batch) for batch in reader)
        except (pa.ArrowInvalid, OSError):
            continue
        assert got < rows


def test_damage_in_the_middle_ends_the_connection(tmp_path, client):
    store_push.push(str(tmp_path / "s"), "zarr")
    with logitstore.store.open(tmp_path / "s") as store:
        row = store.commit(2).chunks[1]
        path = tmp_path / "s" / "shards" / store.shards[2].object
    data = bytearray(path.read_bytes())
    data[row.offset + row.bytes // 2] ^= 1
    path.write_bytes(data)
    with serving(f"s={tmp_path / 's'}") as (base, _):
        with pytest.raises(httpx2.RemoteProtocolError):
            client.get(f"{base}/v1/stores/s/samples")
        # Where it would be the first block, the error has a name.
        answer = client.get(f"{base}/v1/stores/s/samples?start=15")
    assert (answer.status_code, answer.json()["kind"]) == (500, "chunk-checksum-mismatch")
    assert str(tmp_path) not in answer.text


# A store whose one object is far larger than the memory a server may take: dense rows of zeros.

_POSITIONS, _VOCABULARY, _CHUNKS = 512, 65_536, 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 MiB in 4 chunks of one sample each."""
    location = tmp_path_factory.mktemp("large") / "large"
    header = new_header(
        parse_signal("dense:float16"),
        sample_kind="sequence",
        vocab_size=_VOCABULARY,
        configuration={},
        teacher=TeacherInfo(name="zeros"),
        container="arrow",
        chunk_positions=_POSITIONS,
        aux=(),
    )
    with logitstore.store.create(location, header) as writer:
        planned = writer.add_push_plan()
        with writer.begin("0001-000000", planned) as attempt:
            for chunk in range(_CHUNKS):
                key = np.frombuffer(f"{chunk}".encode(), np.uint8)
                values = {
                    "sample_lengths": [_POSITIONS],
                    "num_sample_key": [len(key)],
                    "sample_key": key,
                    "logits": np.zeros((_POSITIONS, _VOCABULARY), np.float16),
                }
                attempt.add(
                    Record(
                        header.schema_,
                        {
                            c.name: np.asarray(
                                values.get(c.name, np.zeros(_POSITIONS)), dtype=c.dtype
                            )
                            for c in header.schema_.columns
                        },
                    )
                )
            attempt.commit(statistics=Statistics())
        writer.seal()
    return location


def peak_while(client: httpx2.Client, address: str, process: psutil.Process) -> tuple[int, int]:
    """(bytes received, greatest resident size of the server) of one answer."""
    size = peak = 0
    with client.stream("GET", address) as answer:
        assert answer.status_code == 200
        for block in answer.iter_raw():
            size += len(block)
            peak = max(peak, process.memory_info().rss)
    return size, peak


def test_memory_stays_flat_while_much_is_sent(large, client):
    with serving(f"s={large}") as (base, process):
        address = f"{base}/v1/stores/s"
        name = logitstore.store.open(large).shards[0].object
        client.get(f"{address}/samples?ids=0&columns=tokens")
        before = process.memory_info().rss
        size, peak = peak_while(client, f"{address}/shards/{name}", process)
        assert size > 250 << 20
        assert peak - before < 24 << 20
        # Samples take a chunk (64 MiB) as it is stored, decoded and on its way.
        size, peak = peak_while(client, f"{address}/samples", process)
        assert size > 250 << 20
        assert peak - before < 200 << 20


@pytest.mark.parametrize("path", ["shards/OBJECT", "samples"])
def test_a_client_that_goes_away_stops_the_producer(large, path):
    name = logitstore.store.open(large).shards[0].object
    with serving(f"s={large}") as (base, process):
        parts = urlsplit(base)
        assert parts.hostname
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            target = f"/v1/stores/s/{path.replace('OBJECT', name)}"
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        # A producer that went on would make and drop all of it, using the processor.
        deadline_s = time.monotonic() + 20
        used = -1.0
        while used != (now := sum(process.cpu_times()[:2])):
            assert time.monotonic() < deadline_s
            used = now
            time.sleep(0.3)
        assert httpx2.get(f"{base}/healthz", timeout=60).status_code == 200
