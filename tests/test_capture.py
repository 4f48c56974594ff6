"""The batch job: what is stored is what the teacher said, however the work was cut."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from logitstore import store as stores
from logitstore.capture import CaptureSettings, estimate, precompute
from logitstore.capture.progress import Progress
from logitstore.spec.errors import (
    CaptureError,
    CommitError,
    CorpusError,
    LogitstoreError,
    PartialError,
    StorageError,
    TeacherError,
    UsageError,
)
from tests.capture_teachers import BOS, VOCAB_SIZE, table

LINES = [f"line {i}: ünïcode " + "abc def "[: i % 8] * (1 + i % 5) for i in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return str(path)


def settings(corpus: str, out: Path, **options) -> CaptureSettings:
    options = {
        "teacher": "py:tests.capture_teachers:bigram",
        "signal": "topk:8",
        "seq_len": 32,
        "document_separator": "\n",
        "shard_tokens": 400,
        "batch_tokens": 96,
        "chunk_positions": 100,
        "threads_per_worker": 1,
        **options,
    }
    return CaptureSettings(corpus=(corpus,), out=str(out), **options)


def objects(location: Path) -> dict[str, str]:
    """shard -> SHA-256 of its object."""
    with stores.open(location) as store:
        return {view.shard: store.commit(i).object.sha256 for i, view in enumerate(store.shards)}


def everything(location: Path):
    """All samples of a store as one record."""
    from logitstore.record import Record

    with stores.open(location) as store:
        return Record.concat([store.sample(i) for i in range(len(store))])


def test_what_is_stored_is_what_the_teacher_said(corpus, tmp_path):
    """Tokens, segments, labels, top-K, aux: recomputed here from the corpus and the table."""
    aux = ("label_logprob", "label_rank", "entropy", "log_tail", "lse", "logit_mean", "byte_end")
    result = precompute(
        settings(corpus, tmp_path / "s", bos="document", aux=aux, lse_at=(2.0,), always_ids=(65, 0))
    )
    record = everything(tmp_path / "s")
    expected_tokens = [t for line in LINES for t in (BOS, *line.encode())]
    assert record["tokens"].tolist() == expected_tokens
    assert result.tokens == record.num_positions == len(expected_tokens)

    logits = table()[torch.tensor(expected_tokens)].double()
    logprobs = logits.log_softmax(-1)
    order = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    np.testing.assert_array_equal(record["ids"], order[:, :8])
    top = np.take_along_axis(logprobs.numpy(), order[:, :8], -1)
    np.testing.assert_allclose(record["logprobs"], top, rtol=1e-3)

    # A label is the next token of the same segment and window.
    offsets = record.sample_offsets()
    last = np.zeros(len(expected_tokens), bool)
    last[offsets[1:] - 1] = True
    segment = record["segment_ids"].astype(int)
    last[:-1] |= segment[1:] != segment[:-1]
    label = np.append(expected_tokens[1:], 0)
    label_logprob = np.where(last, 0, logprobs.numpy()[np.arange(len(label)), label])
    np.testing.assert_allclose(record["label_logprob"], label_logprob, rtol=1e-3)
    rank = np.where(last, 0, (order == label[:, None]).argmax(-1))
    np.testing.assert_array_equal(record["label_rank"], rank)

    entropy = -(logprobs.exp() * logprobs).sum(-1).numpy()
    np.testing.assert_allclose(record["entropy"], entropy, rtol=2e-3, atol=1e-4)
    tail = np.log1p(-np.exp(top).sum(-1))
    np.testing.assert_allclose(record["log_tail"], tail, rtol=2e-3)
    np.testing.assert_allclose(record["lse"], logits.logsumexp(-1), rtol=1e-6)
    np.testing.assert_allclose(record["lse_at_0"], (logits / 2).logsumexp(-1), rtol=1e-6)
    np.testing.assert_allclose(record["logit_mean"], logits.mean(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(record["always_logprobs"], logprobs[:, [65, 0]], rtol=1e-3)

    # Byte ends: per sample, one byte a token and none for BOS.
    for a, b in pairwise(offsets):
        assert record["byte_end"][a:b].tolist() == np.cumsum(record["tokens"][a:b] != BOS).tolist()
    keys = record.sample_keys()
    assert keys[0] == "corpus.txt#0@0"
    assert len(set(keys)) == len(keys)


def test_header_and_commits_say_how_it_was_made(corpus, tmp_path):
    precompute(settings(corpus, tmp_path / "s"))
    with stores.open(tmp_path / "s") as store:
        header = store.header
        assert header.vocab_size == VOCAB_SIZE
        assert header.tokenizer.bos == "none"
        assert header.packing.seq_len == 32
        assert header.teacher.threads_per_worker == 1
        assert header.configuration["teacher"]["fingerprint"] == header.teacher.fingerprint
        assert "name" not in header.configuration["teacher"]
        table_bytes = store.table("tokenizer.json")
        assert table_bytes.startswith(b'{"format":"logitstore-tokenizer"')
        (plan,) = store.plans()
        assert plan.corpus.documents == len(LINES)
        assert len(plan.shards) == len(store.shards) > 2
        statistics = store.statistics()
        assert statistics.measures["entropy"].count == store.num_positions
        chunks = [c for i in range(len(store.shards)) for c in store.commit(i).chunks]
        assert all(c.positions <= 100 for c in chunks)
    assert not stores.verify(tmp_path / "s", full=True).problems


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path, container):
    precompute(settings(corpus, tmp_path / "one", container=container))
    seen: list[Progress] = []
    result = precompute(
        settings(corpus, tmp_path / "two", container=container, workers=2),
        on_progress=seen.append,
    )
    assert objects(tmp_path / "one") == objects(tmp_path / "two")
    assert result.shards == seen[-1].shards == seen[-1].shards_total
    assert result.tokens == seen[-1].tokens == seen[-1].tokens_total


def test_any_number_of_workers_gives_the_same_bytes_for_a_language_model(tiny_lm_dir, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES * 4), encoding="utf-8")
    found = []
    for workers in (1, 2, 4):
        out = tmp_path / f"workers-{workers}"
        precompute(
            settings(str(path), out, teacher=f"hf:{tiny_lm_dir}", workers=workers, signal="topk:16")
        )
        found.append(objects(out))
    assert len(found[0]) >= 4
    assert found[0] == found[1] == found[2]


def test_a_stopped_capture_continues_with_what_is_missing(corpus, tmp_path, monkeypatch):
    precompute(settings(corpus, tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop_after_two(self, *args, **kwargs):
        if len(list((tmp_path / "s").glob("commits/*"))) == 2:
            raise Stop
        return commit(self, *args, **kwargs)

    commit = stores.ShardAttempt.commit
    monkeypatch.setattr(stores.ShardAttempt, "commit", stop_after_two)
    with pytest.raises(Stop):
        precompute(settings(corpus, tmp_path / "s"))
    monkeypatch.undo()
    left = [p.name for p in (tmp_path / "s" / "shards").iterdir()]
    assert len(left) == 2, "the attempt in work was cleared away"

    notes: list[str] = []
    result = precompute(settings(corpus, tmp_path / "s"), on_note=notes.append)
    whole = objects(tmp_path / "whole")
    assert result.skipped_shards == 2
    assert result.shards == len(whole) - 2
    assert any("2 of" in note and "skipped" in note for note in notes)
    assert objects(tmp_path / "s") == whole
    again = precompute(settings(corpus, tmp_path / "s"))
    assert (again.shards, again.skipped_shards) == (0, len(whole))
    with stores.append(tmp_path / "s") as writer:
        writer.seal()
    sealed = precompute(settings(corpus, tmp_path / "s"))
    assert (sealed.shards, sealed.skipped_shards) == (0, len(whole))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"signal": "topk:9"}, 'signal: "topk:8" -> "topk:9"'),
        ({"seq_len": 33}, "packing.seq_len: 32 -> 33"),
        ({"max_tokens": 50}, "packing.max_tokens: null -> 50"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"bos": "document"}, 'tokenizer.bos: "none" -> "document"'),
        ({"threads_per_worker": 2}, "teacher.threads_per_worker: 1 -> 2"),
        ({"teacher": "py:tests.capture_teachers_b:bigram"}, "teacher.fingerprint"),
        ({"container": "arrow"}, 'container: "zarr" -> "arrow"'),
    ],
)
def test_a_changed_configuration_is_refused_with_its_difference(
    corpus, tmp_path, change, says, monkeypatch
):
    precompute(settings(corpus, tmp_path / "s"))
    source = (Path(__file__).parent / "capture_teachers.py").read_text(encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "capture_teachers_b.py").write_text(source + "# changed\n")
    monkeypatch.syspath_prepend(tmp_path)
    if "capture_teachers_b" in change.get("teacher", ""):
        change = {"teacher": "py:capture_teachers_b:bigram"}
        monkeypatch.syspath_prepend(tmp_path / "tests")
    with pytest.raises(CommitError) as caught:
        precompute(settings(corpus, tmp_path / "s", **change))
    assert caught.value.kind == "configuration-changed"
    assert says in caught.value.message


def test_threads_are_taken_from_the_store_that_is_continued(corpus, tmp_path):
    precompute(settings(corpus, tmp_path / "s", threads_per_worker=1))
    precompute(settings(corpus, tmp_path / "s", threads_per_worker=None, workers=1))


def test_a_changed_corpus_is_refused_by_name(corpus, tmp_path):
    precompute(settings(corpus, tmp_path / "s"))
    Path(corpus).write_text("\n".join([*LINES, "more"]), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"corpus\.txt: content changed") as caught:
        precompute(settings(corpus, tmp_path / "s"))
    assert caught.value.kind == "corpus-changed"


def test_a_limit_takes_a_prefix_inside_a_document(corpus, tmp_path):
    precompute(settings(corpus, tmp_path / "whole", document_separator=None, shard_tokens=10**6))
    result = precompute(settings(corpus, tmp_path / "s", document_separator=None, max_tokens=77))
    assert result.tokens == 77
    whole, part = everything(tmp_path / "whole"), everything(tmp_path / "s")
    np.testing.assert_array_equal(part["tokens"], whole["tokens"][:77])
    np.testing.assert_array_equal(part["ids"], whole["ids"][:77])


def test_a_document_far_larger_than_a_shard_is_said(corpus, tmp_path):
    notes: list[str] = []
    precompute(settings(corpus, tmp_path / "lines"), on_note=notes.append)
    assert not any("one document alone" in note for note in notes)
    whole = settings(corpus, tmp_path / "whole", document_separator=None)
    assert precompute(whole, on_note=notes.append).shards == 1
    size = len("\n".join(LINES).encode())
    (said,) = [note for note in notes if "one document alone" in note]
    assert f"a shard of {size:,} tokens (others have 400)" in said


@pytest.mark.parametrize("teacher", ["poisoned", "crashing"])
def test_poison_samples_are_quarantined_and_the_rest_is_kept(tmp_path, teacher):
    lines = list(LINES)
    lines[10] += "\a"
    lines[41] += "\a"
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(PartialError) as caught:
        precompute(
            settings(str(path), tmp_path / "s", teacher=f"py:tests.capture_teachers:{teacher}")
        )
    assert caught.value.kind == "capture-partial"
    assert caught.value.exit_code == 3
    listed = caught.value.data["quarantined"]
    assert len(listed) == 2
    reasons = {"poisoned": "no distribution", "crashing": "cannot read a bell"}
    assert all(reasons[teacher] in entry["reason"] for entry in listed)
    with stores.open(tmp_path / "s") as store:
        committed = [q for i in range(len(store.shards)) for q in store.commit(i).quarantined]
        assert [q.sample_key for q in committed] == [entry["sample_key"] for entry in listed]
    kept = everything(tmp_path / "s")
    assert not set(kept.sample_keys()) & {entry["sample_key"] for entry in listed}

    clean = tmp_path / "clean.txt"
    clean.write_text("\n".join(lines).replace("\a", "!"), encoding="utf-8")
    precompute(settings(str(clean), tmp_path / "clean", container="zarr"))
    expected = everything(tmp_path / "clean")
    assert kept.num_samples == expected.num_samples - 2
    np.testing.assert_array_equal(kept["ids"][0], expected["ids"][0])


@pytest.mark.parametrize(
    ("teacher", "error", "kind"),
    [
        ("infinite", TeacherError, "teacher-nonfinite"),
        ("wide", TeacherError, "teacher-shape"),
        ("no_memory", TeacherError, "teacher-out-of-memory"),
    ],
)
def test_a_teacher_that_fails_on_everything_stops_the_capture(
    corpus, tmp_path, teacher, error, kind
):
    with pytest.raises(error) as caught:
        precompute(settings(corpus, tmp_path / "s", teacher=f"py:tests.capture_teachers:{teacher}"))
    assert isinstance(caught.value, LogitstoreError)
    assert caught.value.kind == kind


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(corpus, tmp_path):
    precompute(settings(corpus, tmp_path / "plain", batch_tokens=256))
    result = precompute(
        settings(
            corpus,
            tmp_path / "s",
            batch_tokens=256,
            teacher="py:tests.capture_teachers:small_memory",
        )
    )
    assert objects(tmp_path / "s") == objects(tmp_path / "plain")
    assert result.notes == (
        "micro-batch halved to 4 samples: out of memory",
        "micro-batch halved to 2 samples: out of memory",
    )
    with stores.open(tmp_path / "s") as store:
        assert store.commit(0).notes == result.notes


def test_the_wrong_bos_choice_is_refused_unless_told(corpus, tmp_path):
    options = {"teacher": "py:tests.capture_teachers:needs_bos"}
    with pytest.raises(TeacherError, match="--bos document") as caught:
        precompute(settings(corpus, tmp_path / "s", **options))
    assert caught.value.kind == "teacher-bos"
    assert caught.value.data["nll"] > caught.value.data["nll_other"] + np.log(10)
    assert not (tmp_path / "s").exists()
    precompute(settings(corpus, tmp_path / "a", **options, bos="document"))
    precompute(settings(corpus, tmp_path / "b", **options, check_bos=False))
    precompute(settings(corpus, tmp_path / "c", **options, bos="none"))


def test_a_full_disk_is_noticed_before_anything_is_written(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="per token") as caught:
        precompute(settings(corpus, tmp_path / "s"))
    assert caught.value.kind == "disk-full"
    assert not (tmp_path / "s").exists()


def test_a_worker_that_dies_is_named(corpus, tmp_path):
    with pytest.raises(CaptureError, match="exit code 7") as caught:
        precompute(
            settings(corpus, tmp_path / "s", teacher="py:tests.capture_teachers:dying", workers=2)
        )
    assert caught.value.kind == "capture-failed"


def test_two_captures_of_one_store_at_once_share_the_work(corpus, tmp_path):
    """Whatever each wins, every shard is there once and neither fails."""
    import threading

    results: list[object] = []

    def capture() -> None:
        results.append(precompute(settings(corpus, tmp_path / "s")))

    precompute(settings(corpus, tmp_path / "whole"))
    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert objects(tmp_path / "s") == objects(tmp_path / "whole")


def test_the_teacher_waits_when_encoding_is_slower(corpus, tmp_path, monkeypatch):
    """Back-pressure: at most the queue's two blocks and those in hand are ever alive."""
    import time

    from logitstore.capture import worker

    alive = peak = 0
    put, take = worker._WritingThread.put, worker._ShardWriter.take

    def counted_put(self, item):
        nonlocal alive, peak
        if isinstance(item, torch.Tensor):
            alive += 1
            peak = max(peak, alive)
        put(self, item)

    def slow_take(self, item):
        nonlocal alive
        if isinstance(item, torch.Tensor):
            time.sleep(0.01)
            alive -= 1
        take(self, item)

    monkeypatch.setattr(worker._WritingThread, "put", counted_put)
    monkeypatch.setattr(worker._ShardWriter, "take", slow_take)
    precompute(settings(corpus, tmp_path / "s", batch_tokens=32))
    assert 2 <= peak <= 4


def test_an_estimate_is_close_and_writes_nothing(tiny_lm_dir, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES * 40), encoding="utf-8")
    chosen = settings(
        str(path),
        tmp_path / "s",
        teacher=f"hf:{tiny_lm_dir}",
        signal="topk:16",
        seq_len=128,
        shard_tokens=20_000,
        batch_tokens=2048,
        chunk_positions=2048,
    )
    guess = estimate(chosen)
    assert not (tmp_path / "s").exists()
    result = precompute(chosen)
    assert guess.tokens == result.tokens
    assert guess.shards == result.shards
    assert guess.stored_bytes == pytest.approx(result.stored_bytes, rel=0.1)
    assert 4000 < guess.pilot_tokens < 4500


def test_large_corpora_are_sized_from_a_sample(corpus, tmp_path, monkeypatch):
    from logitstore.capture import planning

    monkeypatch.setattr(planning, "_EXACT_BYTES", 500)
    guess = estimate(settings(corpus, tmp_path / "s"))
    result = precompute(settings(corpus, tmp_path / "s"))
    assert not guess.exact_tokens
    assert guess.tokens == pytest.approx(result.tokens, rel=0.1)
    assert guess.shards == pytest.approx(result.shards, abs=1)


def test_settings_that_cannot_work_are_refused(corpus, tmp_path):
    for options, says in [
        ({"workers": 0}, "--workers"),
        ({"seq_len": 1}, "--seq-len"),
        ({"seq_len": 100_000}, "65536"),
        ({"lse_at": (-1.0,)}, "--lse-at"),
    ]:
        with pytest.raises(UsageError, match=says) as caught:
            settings(corpus, tmp_path / "s", **options)
        assert caught.value.kind == "bad-argument"
    with pytest.raises(UsageError, match="at most 260") as caught:
        precompute(settings(corpus, tmp_path / "s", signal="topk:261"))
    assert caught.value.kind == "k-exceeds-vocabulary"
