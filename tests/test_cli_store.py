"""inspect, stats, verify, seal and gc on the command line: data, JSON, exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from logitstore import store
from logitstore.record.new_header import new_header
from logitstore.record.statistics import merge
from logitstore.spec.header import TeacherInfo
from logitstore.spec.signals import parse_signal
from logitstore_cli.main import run
from tests import store_push
from tests.shard_records import random_record


@pytest.fixture
def sealed(tmp_path) -> str:
    location = str(tmp_path / "st")
    store_push.push(location, "zarr")
    return location


@pytest.fixture
def tell(capsys):
    """Runs a command; (exit code, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in args])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_inspect_shows_header_shards_and_a_sample_with_text(sealed, tell):
    code, told, _ = tell("inspect", sealed, "--sample", 9, "--rows", 3)
    assert code == 0
    lines = told.splitlines()
    opened = store.open(sealed)
    record = opened.sample(9)
    assert any(line.startswith("signal") and "topk:4 over 97 ids" in line for line in lines)
    assert any(line.split()[:4] == ["0001-000002", "1", "6", "72"] for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("sample 9 (0001-000001/1/0)"))
    for position, line in enumerate(lines[start + 2 : start + 5]):
        cells = line.split()
        text = store_push.TABLE.text([record["tokens"][position]])
        following = store_push.TABLE.text([record["tokens"][position + 1]])
        assert cells[:3] == [text, str(position), following]
        assert float(cells[3]) == pytest.approx(float(record["label_logprob"][position]), rel=1e-3)
    assert lines[start + 5].startswith("... and ")


def test_inspect_json_holds_the_whole_sample(sealed, tell):
    code, told, _ = tell("inspect", sealed, "--json")
    body = json.loads(told)
    assert (code, body["schema"]) == (0, "logitstore.inspect/1")
    record = store.open(sealed).sample(0)
    rows = body["sample"]["rows"]
    assert len(rows) == record.num_positions
    assert [row["id"] for row in rows] == record["tokens"].tolist()
    assert [row["label"] for row in rows] == [*record["tokens"][1:].tolist(), None]
    assert [e["id"] for e in rows[0]["kept"]] == record["ids"][0].tolist()
    assert [e["value"] for e in rows[0]["kept"]] == pytest.approx(
        np.exp(record["logprobs"][0].astype(float)).tolist()
    )
    assert store.Snapshot.from_state(body["snapshot"]) == store.open(sealed).snapshot


def test_ranks_are_shown_as_integers(tmp_path, tell):
    header = new_header(
        parse_signal("topk:4"),
        vocab_size=60_000,
        configuration={},
        teacher=TeacherInfo(name="numpy"),
        aux=["label_logprob", "label_rank"],
    )
    record = random_record(header.schema_, [3], seed=1, vocab_size=60_000)
    record["label_rank"][:] = [44_479, 3, 0]
    with store.create(tmp_path / "st", header) as writer:
        planned = writer.add_push_plan()
        with writer.begin("0001-000000", planned) as attempt:
            attempt.add(record)
            attempt.commit(statistics=merge([]))
    assert " 44,479 " in tell("inspect", tmp_path / "st")[1]
    rows = json.loads(tell("inspect", tmp_path / "st", "--json")[1])["sample"]["rows"]
    assert [row["fields"]["label_rank"] for row in rows] == [44_479, 3, 0]


def test_inspect_of_a_sample_that_is_not_there(sealed, tell):
    code, _, said = tell("inspect", sealed, "--sample", 18)
    assert code == 1
    assert "[sample-out-of-range]" in said


def test_inspect_of_an_empty_store(tmp_path, tell):
    store.create(tmp_path / "st", store_push.header(), store_push.tables()).close()
    code, told, _ = tell("inspect", tmp_path / "st")
    assert code == 0
    assert "0 shards, 0 samples" in told


def test_text_of_a_store_cannot_drive_the_terminal(tmp_path, tell):
    header = new_header(
        parse_signal("topk:4"),
        vocab_size=97,
        configuration={},
        teacher=TeacherInfo(name="evil\x1b[2J\x07"),
    )
    store.create(tmp_path / "st", header).close()
    code, told, _ = tell("inspect", tmp_path / "st")
    assert code == 0
    assert "\x1b" not in told
    assert "evil\\x1b[2J\\x07" in told


@pytest.mark.parametrize(
    ("signal", "value"),
    [
        ("topk:5,p=0.9", "probability"),
        ("dense", "logit"),
        ("sampled:20", "share of draws"),
        ("threshold:tau=1/10", "head probability"),
        ("scores:3", "score"),
        ("graph:k=2", None),
        ("graph:k=2,form=vocab", None),
    ],
)
def test_inspect_decodes_every_signal(signal, value, tmp_path, tell):
    header = new_header(
        parse_signal(signal), vocab_size=97, configuration={}, teacher=TeacherInfo(name="numpy")
    )
    record = random_record(header.schema_, [5, 7], seed=1, vocab_size=97)
    with store.create(tmp_path / "st", header) as writer:
        planned = writer.add_push_plan()
        with writer.begin("0001-000000", planned) as attempt:
            attempt.add(record)
            attempt.commit(statistics=merge([]))
    code, told, _ = tell("inspect", tmp_path / "st", "--sample", 1)
    assert code == 0
    assert "sample 1" in told
    code, told, _ = tell("inspect", tmp_path / "st", "--sample", 1, "--json")
    sample = json.loads(told)["sample"]
    assert (code, sample["kept_value"], len(sample["rows"])) == (0, value, 7)
    read = store.open(tmp_path / "st").sample(1)
    for position, row in enumerate(sample["rows"]):
        assert row["text"] == str(read["tokens"][position])
        for group, ids in (("ids", "ids"), ("heads", "head_ids")):
            if header.schema_.group(group):
                start, stop = read.group_offsets(group)[position : position + 2]
                assert {e["id"] for e in row["kept"]} == set(read[ids][start:stop].tolist())


def test_commands_load_no_torch(sealed):
    code = (
        "import sys; from logitstore_cli.main import run\n"
        f"codes = [run([c, {sealed!r}]) for c in ('inspect', 'stats', 'verify', 'gc', 'seal')]\n"
        "assert codes == [0] * 5, codes\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_stats_agree_with_the_values(sealed, tell):
    code, told, _ = tell("stats", sealed, "--json")
    body = json.loads(told)
    assert (code, body["schema"]) == (0, "logitstore.stats/1")
    opened = store.open(sealed)
    samples = [opened.sample(i) for i in range(18)]
    logprobs = np.concatenate([s["label_logprob"][:-1] for s in samples]).astype(float)
    assert (body["positions"], body["labels"]) == (207, len(logprobs))
    assert body["nll"] == pytest.approx(-logprobs.mean())
    assert body["perplexity"] == pytest.approx(math.exp(-logprobs.mean()))
    entropy = np.concatenate([s["entropy"] for s in samples]).astype(float)
    assert body["measures"]["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert body["measures"]["entropy"]["std"] == pytest.approx(entropy.std())
    size = sum(p.stat().st_size for p in Path(sealed, "shards").iterdir())
    assert body["bytes"] == sum(c["bytes"] for c in body["columns"]) == size
    assert sum(c["share"] for c in body["columns"]) == pytest.approx(1)


def test_stats_read_no_object(sealed, tell):
    before = tell("stats", sealed)
    for path in Path(sealed, "shards").iterdir():
        path.unlink()
    assert tell("stats", sealed) == before
    assert "perplexity" in before[1]


def test_verify_passes_fails_and_says_why(sealed, tell):
    code, told, _ = tell("verify", sealed, "--full")
    assert code == 0
    assert "no problems" in told
    path = sorted(Path(sealed, "shards").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert tell("verify", sealed)[0] == 0
    code, told, _ = tell("verify", sealed, "--full")
    assert code == 4
    assert "0001-000001: [chunk-checksum-mismatch]" in told
    assert "0001-000001: [object-hash-mismatch]" in told
    code, told, _ = tell("verify", sealed, "--full", "--json")
    body = json.loads(told)
    assert (code, body["schema"], body["ok"]) == (4, "logitstore.verify/1", False)
    assert {p["shard"] for p in body["problems"]} == {"0001-000001"}
    assert body["megabytes_per_s"] > 0


def test_verify_tells_unfinished_from_damaged(tmp_path, tell):
    with store.create(tmp_path / "st", store_push.header()) as writer:
        planned = writer.add_plan(store_push.plan(writer.header, 3))
        store_push.commit_shard(writer, planned, "0001-000000")
    code, told, _ = tell("verify", tmp_path / "st")
    assert code == 0
    assert "2 planned shards are not captured yet" in told


def test_seal_once_and_again(tmp_path, tell):
    location = str(tmp_path / "st")
    store_push.push(location, "zarr", seal=False)
    code, told, _ = tell("seal", location)
    assert (code, told.split(":")[0]) == (0, "sealed")
    code, told, _ = tell("seal", location, "--json")
    body = json.loads(told)
    assert (code, body["schema"], body["already_sealed"]) == (0, "logitstore.seal/1", True)
    assert body["samples"] == 18


def test_seal_of_an_unfinished_store_is_refused(tmp_path, tell):
    with store.create(tmp_path / "st", store_push.header()) as writer:
        writer.add_plan(store_push.plan(writer.header, 3))
    code, _, said = tell("seal", tmp_path / "st")
    assert code == 1
    assert "[plan-incomplete]" in said
    assert "3 missing, first 0001-000000" in said


def test_gc_shows_first_and_deletes_with_yes(tmp_path, tell):
    location = tmp_path / "st"
    store_push.push(str(location), "zarr", seal=False)
    stray = location / "shards" / "0001-000000.00000000deadbeef.zarr.zip"
    stray.write_bytes(b"12345")
    code, told, said = tell("gc", location)
    assert code == 0
    assert told.startswith("0 files")
    assert "1 files spared: younger than 86,400 s" in said
    code, told, said = tell("gc", location, "--grace-s", 0)
    assert code == 0
    assert "losing-attempt" in told
    assert "add --yes" in said
    assert stray.exists()
    code, told, _ = tell("gc", location, "--grace-s", 0, "--yes", "--json")
    body = json.loads(told)
    assert (code, body["schema"], body["done"]) == (0, "logitstore.gc/1", True)
    assert [d["key"] for d in body["deletions"]] == [f"shards/{stray.name}"]
    assert not stray.exists()
    assert store.verify(location, full=True).ok


@pytest.mark.parametrize("command", ["inspect", "stats", "verify", "seal", "gc"])
def test_not_a_store_is_said_by_every_command(command, tmp_path, tell):
    code, told, said = tell(command, tmp_path / "nothing")
    assert (code, told) == (1, "")
    assert "[not-a-store]" in said
    assert tell(command)[0] == 2
    assert tell(command, "hdfs://x/y")[0] == 1
