"""The push writer: what is added is there, what is refused leaves no trace."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

import logitstore
from logitstore import store as stores
from logitstore.record import Record
from logitstore.record.sequences import labels
from logitstore.spec.errors import (
    CaptureError,
    CommitError,
    LogitstoreError,
    StorageError,
    TargetsError,
    TeacherError,
    UsageError,
)

V = 50


def rows(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, V, generator=generator) * 2


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, length)


def open_writer(path, **options):
    return logitstore.writer(path, signal="topk:4", vocab_size=V, **options)


def everything(path) -> Record:
    with stores.open(path) as store:
        return Record.concat([store.sample(i) for i in range(len(store))])


@pytest.mark.parametrize("container", ["zarr", "arrow"])
@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.bfloat16, torch.Tensor.clone])
def test_samples_come_back_as_they_were_added(tmp_path, container, make):
    with open_writer(tmp_path / "s", container=container) as w:
        for n in (5, 9, 1):
            w.add(tokens(n, n), make(rows(n, n)))
        assert w.num_samples == 0
    assert (w.num_samples, w.num_positions) == (3, 15)
    record = everything(tmp_path / "s")
    assert record["sample_lengths"].tolist() == [5, 9, 1]
    assert record.sample_keys() == ["push/1/0", "push/1/1", "push/1/2"]
    np.testing.assert_array_equal(
        record["tokens"], np.concatenate([tokens(n, n) for n in (5, 9, 1)])
    )
    logits = torch.cat([torch.as_tensor(make(rows(n, n))).float() for n in (5, 9, 1)])
    order = np.argsort(-logits.numpy(), -1, kind="stable")[:, :4]
    np.testing.assert_array_equal(record["ids"], order)
    logprobs = logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(
        record["logprobs"], np.take_along_axis(logprobs, order, -1), rtol=1e-3
    )
    label = labels(record)
    has = label >= 0
    np.testing.assert_allclose(record["label_logprob"][has], logprobs[has, label[has]], rtol=1e-3)
    assert not stores.verify(tmp_path / "s", full=True).problems


def test_segments_masks_byte_ends_and_keys(tmp_path):
    aux = ["label_logprob", "byte_end"]
    with open_writer(tmp_path / "s", loss_mask=True, aux=aux) as w:
        w.add(
            [1, 2, 3, 4, 5],
            rows(5),
            segment_ids=[0, 0, 1, 1, 1],
            loss_mask=[True, True, False, True, True],
            byte_end=[1, 2, 3, 4, 9],
            sample_key="my/näme",
        )
    record = everything(tmp_path / "s")
    assert labels(record).tolist() == [2, -100, 4, 5, -100]
    assert record["loss_mask"].tolist() == [True, True, False, True, True]
    assert record["byte_end"].tolist() == [1, 2, 3, 4, 9]
    assert record.sample_keys() == ["my/näme"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "kind"),
    [
        (([1, 2, 3], rows(4)), {}, TargetsError, "wrong-length"),
        (([], rows(0)), {}, TargetsError, "wrong-length"),
        (([[1, 2]], rows(2)), {}, TargetsError, "wrong-length"),
        (([1, 2], rows(2)[None]), {}, TargetsError, "wrong-length"),
        (([1, V], rows(2)), {}, TargetsError, "token-out-of-range"),
        (([1, -1], rows(2)), {}, TargetsError, "token-out-of-range"),
        (([1.0, 2.0], rows(2)), {}, UsageError, "bad-argument"),
        (([1, 2], rows(2)[:, :-1]), {}, TeacherError, "teacher-shape"),
        (([1, 2], rows(2) * torch.nan), {}, TeacherError, "teacher-nonfinite"),
        (([1, 2], rows(2) + torch.inf), {}, TeacherError, "teacher-nonfinite"),
        (([1, 2], rows(2) - torch.inf), {}, TeacherError, "teacher-nonfinite"),
        (([1, 2], rows(2)), {"segment_ids": [0]}, TargetsError, "wrong-length"),
        (([1, 2], rows(2)), {"segment_ids": [1, 0]}, UsageError, "bad-argument"),
        (([1, 2], rows(2)), {"loss_mask": [True, True]}, UsageError, "bad-argument"),
        (([1, 2], rows(2)), {"byte_end": [1, 2]}, UsageError, "bad-argument"),
    ],
)
def test_a_bad_sample_is_refused_and_the_writer_goes_on(tmp_path, arguments, options, error, kind):
    with open_writer(tmp_path / "s") as w:
        w.add([1, 2, 3], rows(3))
        with pytest.raises(error) as caught:
            w.add(*arguments, **options)
        assert isinstance(caught.value, LogitstoreError)
        assert caught.value.kind == kind
        assert "push/1/1" in caught.value.message
        w.add([4, 5], rows(2))
    record = everything(tmp_path / "s")
    assert record["tokens"].tolist() == [1, 2, 3, 4, 5]
    assert record.sample_keys() == ["push/1/0", "push/1/1"]


def test_a_masked_writer_wants_its_mask(tmp_path):
    with open_writer(tmp_path / "s", loss_mask=True) as w:
        with pytest.raises(UsageError, match="keeps a loss_mask"):
            w.add([1, 2], rows(2))
        with pytest.raises(TargetsError, match="another length"):
            w.add([1, 2], rows(2), loss_mask=[True])


def test_shards_are_committed_when_they_are_full(tmp_path):
    with open_writer(tmp_path / "s", shard_positions=20, chunk_positions=8) as w:
        for n in range(10):
            w.add(tokens(6, n), rows(6, n))
        assert w.num_positions == 48
        with stores.open(tmp_path / "s") as store:
            assert [s.positions for s in store.shards] == [24, 24]
            assert [c.positions for c in store.commit(0).chunks] == [6, 6, 6, 6]
    with stores.open(tmp_path / "s") as store:
        assert [s.positions for s in store.shards] == [24, 24, 12]


def test_an_exception_keeps_what_was_committed_and_drops_the_rest(tmp_path):
    class Oops(Exception):
        pass

    def loop() -> None:
        with open_writer(tmp_path / "s") as w:
            w.add([1, 2, 3], rows(3))
            w.flush()
            w.add([4, 5], rows(2))
            raise Oops

    with pytest.raises(Oops):
        loop()
    assert everything(tmp_path / "s")["tokens"].tolist() == [1, 2, 3]
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 1


@pytest.mark.parametrize("moment", ["add", "close"])
def test_a_full_disk_closes_the_writer_and_leaves_nothing_behind(tmp_path, monkeypatch, moment):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    w = open_writer(tmp_path / "s", chunk_positions=4)
    w.add([1, 2, 3], rows(3))
    w.flush()
    w.add([4, 5, 6], rows(3))
    if moment == "add":
        monkeypatch.setattr("logitstore.containers.zarr_shard._Writer.add", full)
    else:
        monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageError) as caught:
        w.add([7, 8, 9], rows(3)) if moment == "add" else w.close()
    monkeypatch.undo()
    assert caught.value.kind == "disk-full"
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 1
    with pytest.raises(CaptureError, match="writer-closed"):
        w.add([1], rows(1))
    assert everything(tmp_path / "s")["tokens"].tolist() == [1, 2, 3]


def test_sessions_append_under_plans_of_their_own(tmp_path):
    for session in range(3):
        with open_writer(tmp_path / "s") as w:
            w.add([session, 1], rows(2, session))
    with stores.open(tmp_path / "s") as store:
        assert [p.kind for p in store.plans()] == ["push"] * 3
        assert [s.shard for s in store.shards] == ["0001-000000", "0002-000000", "0003-000000"]
    assert everything(tmp_path / "s").sample_keys() == ["push/1/0", "push/2/0", "push/3/0"]


def test_sessions_at_once_do_not_meet(tmp_path):
    with open_writer(tmp_path / "s") as one, open_writer(tmp_path / "s") as two:
        one.add([1], rows(1))
        two.add([2], rows(1))
    assert sorted(everything(tmp_path / "s")["tokens"].tolist()) == [1, 2]


def test_another_configuration_is_refused(tmp_path):
    with open_writer(tmp_path / "s", configuration={"teacher": "a"}):
        pass
    with pytest.raises(CommitError, match=r'given\.teacher: "a" -> "b"') as caught:
        open_writer(tmp_path / "s", configuration={"teacher": "b"})
    assert caught.value.kind == "configuration-changed"
    with pytest.raises(UsageError) as too_many:
        logitstore.writer(tmp_path / "t", signal="topk:51", vocab_size=V)
    assert too_many.value.kind == "k-exceeds-vocabulary"
    with pytest.raises(UsageError) as unknown:
        logitstore.writer(tmp_path / "t", signal="topq:5", vocab_size=V)
    assert unknown.value.kind == "unknown-signal"
    assert not (tmp_path / "t").exists()


def test_a_closed_writer_says_so(tmp_path):
    with open_writer(tmp_path / "s") as w:
        w.add([1], rows(1))
    w.close()
    with pytest.raises(CaptureError) as caught:
        w.add([1], rows(1))
    assert caught.value.kind == "writer-closed"
    assert len(everything(tmp_path / "s")["tokens"]) == 1


def test_a_store_that_was_sealed_meanwhile(tmp_path):
    w = open_writer(tmp_path / "s")
    w.add([1], rows(1))
    with stores.append(tmp_path / "s") as other:
        other.seal()
    with pytest.raises(CommitError) as caught:
        w.close()
    assert caught.value.kind == "store-sealed"
    with pytest.raises(StorageError) as unsupported:
        open_writer("ftp://host/store")
    assert unsupported.value.kind == "unsupported-url"


def test_a_read_only_array_is_taken(tmp_path):
    logits = rows(3).numpy()
    logits.flags.writeable = False
    with open_writer(tmp_path / "s") as w:
        w.add([1, 2, 3], logits)
    assert everything(tmp_path / "s").num_positions == 3


def test_the_tokenizer_is_kept_and_left_as_it_was(tmp_path, tiny_lm_dir):
    from transformers import AutoTokenizer

    from logitstore.spec.tokenizer_table import TokenizerTable

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    tokenizer.backend_tokenizer.enable_truncation(5)
    with logitstore.writer(
        tmp_path / "s", signal="topk:4", vocab_size=len(tokenizer), tokenizer=tokenizer
    ):
        pass
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    with stores.open(tmp_path / "s") as store:
        table = TokenizerTable.decode(store.table("tokenizer.json"), where="table")
        assert table.fingerprint == store.header.tokenizer.fingerprint
    assert table.special == {0, 1}


def test_classification_samples(tmp_path):
    logits = rows(3)
    with open_writer(tmp_path / "s", sample_kind="classification") as w:
        for label, row in zip([3, 0, 49], logits, strict=True):
            w.add(label, row)
        with pytest.raises(TargetsError):
            w.add([1, 2], logits[:2])
    record = everything(tmp_path / "s")
    assert record["label"].tolist() == [3, 0, 49]
    assert record["sample_lengths"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(record["ids"][:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    ("arguments", "options", "kind"),
    [
        ({"loss_mask": [1, 0.5]}, {"loss_mask": True}, "bad-argument"),
        ({"byte_end": [0.5, 2]}, {"aux": "byte_end"}, "bad-argument"),
        ({"byte_end": [2, 1]}, {"aux": ["byte_end"]}, "bad-argument"),
        ({"byte_end": [1, 1 << 32]}, {"aux": ["byte_end"]}, "bad-argument"),
        ({"sample_key": ""}, {}, "bad-argument"),
        ({"sample_key": 7}, {}, "bad-argument"),
        ({"sample_key": "é" * 40_000}, {}, "bad-argument"),
        ({"logits": rows(2).numpy().astype(complex)}, {}, "wrong-length"),
        ({"logits": [["a"]]}, {}, "wrong-length"),
        ({"logits": rows(2) * 1e30}, {"signal": "graph:k=3"}, "teacher-nonfinite"),
    ],
)
def test_values_that_would_be_stored_wrong_are_refused(tmp_path, arguments, options, kind):
    with logitstore.writer(tmp_path, **{"signal": "topk:4", "vocab_size": V, **options}) as w:
        with pytest.raises(LogitstoreError) as caught:
            w.add([1, 2], **{"logits": rows(2), **arguments})
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    "options",
    [
        {"signal": None},
        {"signal": 64},
        {"vocab_size": 8.5},
        {"container": "parquet"},
        {"sample_kind": "image"},
        {"seed": -1},
        {"chunk_positions": 0},
        {"always_ids": "12"},
        {"always_ids": [1.5]},
        {"lse_at": [0.0]},
        {"lse_at": [float("nan")]},
        {"lse_at": [2.0, 2.0]},
        {"lse_at": 2.0},
        {"configuration": {"a": {1, 2}}},
    ],
)
def test_a_writer_refuses_what_no_store_can_have(tmp_path, options):
    with pytest.raises(UsageError) as caught:
        logitstore.writer(tmp_path, **{"signal": "topk:4", "vocab_size": V, **options})
    assert caught.value.kind in ("bad-argument", "unknown-signal")
    assert not any(tmp_path.iterdir())


def test_arrays_are_taken_wherever_numbers_are(tmp_path):
    options = {"always_ids": np.array([3, 1]), "lse_at": np.array([2.0], np.float32)}
    backwards = rows(2).numpy()[::-1]
    with logitstore.writer(tmp_path, signal="topk:4", vocab_size=V, **options) as w:
        w.add([1, 2], backwards)
    record = everything(tmp_path)
    expected = torch.log_softmax(torch.from_numpy(backwards.copy()), -1)[:, [3, 1]]
    assert torch.allclose(torch.from_numpy(record["always_logprobs"]).float(), expected, atol=1e-2)
