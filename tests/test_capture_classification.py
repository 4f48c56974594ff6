"""Classifiers through the command line: captured, verified, trained from, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from sklearn.datasets import load_digits

import logitstore
from logitstore import losses
from logitstore import store as stores
from logitstore.corpora import ArrayFiles
from logitstore.spec.errors import NotFoundError
from logitstore_cli.main import run
from tests.capture_classifiers import Letters, weights

DIGITS = load_digits()
IMAGES = DIGITS.images.astype(np.uint8)
TEXTS = ["banana", "eerie", "mississippi", "", "igloo", "oats", "unusual", "under", "aloe"]
LABELS = [0, 1, 2, None, 3, 3, 4, 4, 0]


@pytest.fixture
def arrays(tmp_path) -> Path:
    """A folder with digits as images.npy and labels.npy."""
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "labels.npy", DIGITS.target)
    return tmp_path


def words(folder: Path, out: str, *more: str, teacher: str = "digits", signal: str = "dense"):
    return [
        "precompute",
        "--task", "classification",
        "--teacher", f"py:tests.capture_classifiers:{teacher}",
        "--corpus", str(folder / "images.npy"),
        "--signal", signal,
        "--out", str(folder / out),
        *more,
    ]  # fmt: skip


def labelled(folder: Path) -> tuple[str, str]:
    return "--labels", str(folder / "labels.npy")


def expected_logits() -> torch.Tensor:
    return torch.from_numpy(IMAGES).flatten(1).float() @ weights()


def whole(location: Path, **options) -> logitstore.data.collate.Batch:
    dataset = logitstore.LogitDataset(location, **options)
    return logitstore.collate([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_a_batch_holds_the_teachers_logits_and_no_fields_of_sequences(arrays, container, capsys):
    options = ("--container", container, "--shard-samples", "700", *labelled(arrays))
    assert run(words(arrays, "s", *options, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["shards"], printed["tokens"]) == (3, len(IMAGES))
    assert run(["verify", "--full", str(arrays / "s")]) == 0
    batch = whole(arrays / "s")
    assert batch.labels.tolist() == DIGITS.target.tolist()
    assert batch.targets.logits.shape == (len(IMAGES), 10)
    torch.testing.assert_close(batch.targets.logits, expected_logits().half().float())
    assert batch.sample_keys[:2] == ("images.npy#0", "images.npy#1")
    for field in ("tokens", "loss_mask", "segment_ids", "position_ids"):
        assert getattr(batch, field) is None
    with stores.open(arrays / "s") as store:
        held = store.header.configuration
        assert (held["task"], held["inputs"]["label_files"]) == ("classification", True)
        assert store.header.tokenizer is store.header.packing is None


@pytest.mark.parametrize(
    "signal", ["topk:3", "topk:5,p=0.95", "topk:4,coding=q8", "sampled:30", "threshold:tau=1/8"]
)
@pytest.mark.parametrize("has_labels", [True, False])
def test_every_signal_with_and_without_labels(arrays, signal, has_labels):
    options = labelled(arrays) if has_labels else ()
    assert run(words(arrays, "s", "--max-samples", "300", *options, signal=signal)) == 0
    assert run(["verify", "--full", str(arrays / "s")]) == 0
    assert run(["inspect", str(arrays / "s"), "--sample", "7"]) == 0
    batch = whole(arrays / "s")
    assert batch.labels.tolist() == (DIGITS.target[:300].tolist() if has_labels else [-100] * 300)
    stored = batch.targets.dense()
    teacher = expected_logits()[:300].softmax(-1)
    assert stored.shape == (300, 10)
    # Unbiased signals meet the teacher on average, the others up to what they leave out.
    assert (stored.mean(0) - teacher.mean(0)).abs().max() < (0.05 if "topk:3" in signal else 0.02)
    has_column = (batch.targets.label_logprob is not None) == has_labels
    assert has_column


def test_unlabelled_samples_count_in_losses_statistics_and_filters(arrays, capsys):
    assert run(words(arrays, "s", "--aux", "entropy", "--max-samples", "200")) == 0
    capsys.readouterr()
    assert run(["stats", str(arrays / "s"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["positions"], stats["labels"]) == (200, 0)
    assert stats["measures"]["entropy"]["count"] == 200
    batch = whole(arrays / "s")
    chosen = whole(arrays / "s", filter=[("entropy.mean", "<", 0.2)])
    assert len(chosen) == int((batch.targets.entropy < 0.2).sum())
    assert 0 < len(chosen) < 200
    student = torch.zeros(200, 10, requires_grad=True)
    losses.forward_kl(student, batch.targets, missing="none").backward()
    assert (student.grad.abs().sum(-1) > 0).all()
    with pytest.raises(logitstore.spec.errors.UsageError, match="no field 'label'"):
        logitstore.LogitDataset(arrays / "s", filter=[("label", "==", 1)])


def test_filters_and_holdout_of_labels(arrays):
    assert run(words(arrays, "s", *labelled(arrays))) == 0
    some = whole(arrays / "s", filter=[("label", "in", [3, 5])])
    assert set(some.labels.tolist()) == {3, 5}
    assert len(some) == int(np.isin(DIGITS.target, [3, 5]).sum())
    held = whole(arrays / "s", holdout=0.2, split="validation")
    kept = whole(arrays / "s", holdout=0.2)
    assert len(held) + len(kept) == len(IMAGES)
    assert not set(held.sample_keys) & set(kept.sample_keys)


def test_losses_of_classification_papers_take_the_batches(arrays):
    assert run(words(arrays, "s", *labelled(arrays))) == 0
    batch = whole(arrays / "s", max_samples=64)
    torch.manual_seed(0)
    student = torch.randn(64, 10, requires_grad=True)
    for value in (
        losses.forward_kl(student, batch.targets, labels=batch.labels, missing="none"),
        losses.pld(student, batch.targets, labels=batch.labels),
        losses.ttm(student, batch.targets, gamma=0.5),
        losses.wttm(student, batch.targets, gamma=0.5),
        losses.cross_entropy(student, batch.targets, labels=batch.labels),
    ):
        (gradient,) = torch.autograd.grad(value, student)
        assert value > 0
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    scores = losses.cutmix_scores("teacher_entropy", teacher=batch.targets)
    picked = losses.cutmix_pick(scores, 8)
    assert scores[picked].min() >= np.partition(scores.numpy(), -8)[-8]
    sums = losses.cutmix_scores("kld", teacher=batch.targets, student_logits=student.detach())
    assert sums.shape == (64,)


def test_a_student_learns_the_teachers_classes_from_the_store(arrays):
    assert run(words(arrays, "s", *labelled(arrays), signal="topk:3")) == 0
    inputs = ArrayFiles.open([str(arrays / "images.npy")])
    train = logitstore.LogitDataset(arrays / "s", shuffle=True, holdout=0.2)
    torch.manual_seed(0)
    student = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for epoch in range(6):
        train.set_epoch(epoch)
        for batch in logitstore.loader(train, batch_size=64):
            images = torch.from_numpy(inputs.of(batch.sample_keys)).flatten(1).float() / 16
            loss = losses.forward_kl(student(images), batch.targets, missing="ghost")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    held = whole(arrays / "s", holdout=0.2, split="validation")
    images = torch.from_numpy(inputs.of(held.sample_keys)).flatten(1).float() / 16
    agreement = (student(images).argmax(-1) == held.targets.ids[:, 0]).float().mean()
    assert agreement > 0.85


def test_bytes_do_not_depend_on_workers_or_on_where_the_files_are(arrays):
    options = ("--shard-samples", "300", "--threads-per-worker", "1")
    assert run(words(arrays, "one", *options, *labelled(arrays), signal="sampled:8")) == 0
    other = arrays / "elsewhere"
    other.mkdir()
    for name in ("images.npy", "labels.npy"):
        shutil.copy(arrays / name, other / name)
    many = words(other, "many", *options, *labelled(other), "--workers", "2", signal="sampled:8")
    assert run(many) == 0
    digests = []
    for place in (arrays / "one", other / "many"):
        with stores.open(place) as store:
            digests.append([store.commit(i).object.sha256 for i in range(len(store.shards))])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6


def test_the_same_command_continues_and_a_changed_label_file_is_refused(arrays, capsys):
    options = ("--shard-samples", "300", *labelled(arrays))
    assert run(words(arrays, "s", *options)) == 0
    removed = sorted((arrays / "s" / "commits").iterdir())[2]
    removed.unlink()
    capsys.readouterr()
    assert run(words(arrays, "s", *options, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["shards"], printed["skipped_shards"]) == (1, 5)
    assert whole(arrays / "s").labels.tolist() == DIGITS.target.tolist()
    np.save(arrays / "labels.npy", DIGITS.target[::-1].copy())
    assert run(words(arrays, "s", *options)) == 1
    told = capsys.readouterr().err
    assert "[corpus-changed]" in told
    assert "labels:labels.npy: content changed" in told


def test_a_dry_run_tells_samples(arrays, capsys):
    assert run(words(arrays, "s", "--dry-run", "--json", *labelled(arrays))) == 0
    guess = json.loads(capsys.readouterr().out)
    assert guess["tokens"] == guess["documents"] == len(IMAGES)
    assert guess["nll"] is None
    assert not (arrays / "s").exists()
    assert run(words(arrays, "s", "--dry-run", *labelled(arrays))) == 0
    assert "bytes per sample" in capsys.readouterr().out


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def test_formats_of_arrays_give_the_same_store(arrays):
    np.savez(arrays / "digits.npz", inputs=IMAGES, y=DIGITS.target)
    (arrays / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES), mtime=0))
    (arrays / "train-labels-idx1-ubyte").write_bytes(idx(DIGITS.target))
    halves = [str(arrays / f"half{i}.npy") for i in range(2)]
    for name, half in zip(halves, np.array_split(IMAGES, 2), strict=True):
        np.save(name, half)
    corpora = {
        "npy": [str(arrays / "images.npy"), *labelled(arrays)],
        "npz": [str(arrays / "digits.npz"), "--label-key", "y"],
        "idx": [
            str(arrays / "train-images-idx3-ubyte.gz"),
            "--labels",
            str(arrays / "train-labels-idx1-ubyte"),
        ],
        "two": [*halves],
    }
    base = words(arrays, "unused")
    for name, files in corpora.items():
        place = base.index("--corpus")
        call = [*base[:place], "--shard-samples", "400", *base[place + 2 :], "--corpus", *files]
        call[call.index("--out") + 1] = str(arrays / name)
        assert run(call) == 0, name
    expected = whole(arrays / "npy")
    for name in ("npz", "idx", "two"):
        batch = whole(arrays / name)
        torch.testing.assert_close(batch.targets.logits, expected.targets.logits)
        if name != "two":
            assert torch.equal(batch.labels, expected.labels)
    assert whole(arrays / "two").sample_keys[-1] == f"half1.npy#{len(IMAGES) // 2 - 1}"


def test_inputs_are_found_by_name(arrays):
    inputs = ArrayFiles.open([str(arrays / "images.npy")])
    np.testing.assert_array_equal(inputs.of(["images.npy#9", "images.npy#0"]), IMAGES[[9, 0]])
    for key in ("images.npy#1797", "other.npy#0", "images.npy#x", "images.npy"):
        with pytest.raises(NotFoundError):
            inputs.of([key])


def write_rows(path: Path, *, names: bool = True) -> None:
    rows = [
        {"body": text, "vowel": "aeiou"[label] if names else label}
        for text, label in zip(TEXTS, LABELS, strict=True)
        if label is not None
    ]
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def text_words(path: Path, *more: str) -> list[str]:
    return [
        "precompute",
        "--task", "classification",
        "--teacher", "py:tests.capture_classifiers:letters",
        "--corpus", str(path),
        "--text-key", "body",
        "--signal", "dense:dtype=float32",
        "--out", str(path.parent / "s"),
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("names", [True, False])
def test_rows_of_text_with_labels_by_name_or_number(tmp_path, suffix, names):
    path = tmp_path / f"rows{suffix}"
    write_rows(path, names=names)
    options = ("--label-key", "vowel", "--shard-samples", "3", "--max-samples", "7")
    assert run(text_words(path, *options)) == 0
    batch = whole(tmp_path / "s")
    kept = [(text, label) for text, label in zip(TEXTS, LABELS, strict=True) if text][:7]
    assert batch.labels.tolist() == [label for _, label in kept]
    torch.testing.assert_close(batch.targets.logits, Letters()([text for text, _ in kept]))
    assert batch.sample_keys[3] == f"rows{suffix}#3"
    with stores.open(tmp_path / "s") as store:
        assert [shard.samples for shard in store.shards] == [3, 3, 1]
        assert store.header.configuration["classes"] == list("aeiou")


def test_a_text_on_which_the_teacher_fails_is_quarantined(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "alpha"}\n{"body": "poison"}\n{"body": "omega"}\n')
    assert run(text_words(path)) == 3
    assert "rows.jsonl#1" in capsys.readouterr().err
    assert whole(tmp_path / "s").sample_keys == ("rows.jsonl#0", "rows.jsonl#2")


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        (("--seq-len", "64"), "bad-argument", 2),
        (("--bos", "none"), "bad-argument", 2),
        (("--text-key", "body"), "bad-argument", 2),
        (("--input-key", "x"), "bad-argument", 2),
        (("--label-key", "y"), "bad-argument", 2),
        (("--aux", "byte_end"), "unknown-aux", 2),
        (("--aux", "label_rank"), "unknown-aux", 2),
        (("--signal", "topk:11"), "k-exceeds-vocabulary", 2),
        (("--signal", "scores:3"), "unknown-signal", 2),
        (("--teacher", "py:tests.capture_classifiers:no_classes"), "teacher-load", 1),
        (("--teacher", "py:tests.capture_classifiers:narrow"), "teacher-shape", 1),
        (("--labels", "short.npy"), "corpus-malformed", 1),
        (("--labels", "large.npy"), "corpus-label", 1),
        (("--labels", "float.npy"), "corpus-malformed", 1),
        (("--labels", "short.npy", "--labels", "large.npy"), "bad-argument", 2),
        (("--corpus", "labels.npy"), "corpus-malformed", 1),
        (("--corpus", "rows.jsonl"), "bad-argument", 2),
    ],
)
def test_what_cannot_work_has_a_kind_and_writes_nothing(
    arrays, capsys, monkeypatch, more, kind, code
):
    np.save(arrays / "short.npy", DIGITS.target[:-1])
    np.save(arrays / "large.npy", DIGITS.target + 1)
    np.save(arrays / "float.npy", DIGITS.target / 2)
    (arrays / "rows.jsonl").write_text("{}\n")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.chdir(arrays)
    assert run(words(arrays, "s", *more)) == code
    printed = capsys.readouterr()
    assert f"[{kind}]" in printed.err
    assert not (arrays / "s").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b"\x93NUMPY"),
        ("a.npy", b""),
        ("a.npz", b"PK\x03\x04"),
        ("a.npz", b"no zip"),
        ("a-ubyte", b"\0\0\x08"),
        ("a-ubyte", b"\0\0\x07\x01\0\0\0\1x"),
        ("a-ubyte", b"\0\0\x08\x01\0\0\0\2x"),
        ("a-ubyte", b"\0\0\x08\x01\0\0\0\1xy"),
        ("a-ubyte.gz", b"no gzip"),
        ("a-ubyte.gz", gzip.compress(idx(np.zeros(9)), mtime=0)[:-9]),
    ],
)
def test_a_broken_file_of_arrays_is_named(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    call = words(tmp_path, "s")
    call[call.index("--corpus") + 1] = str(tmp_path / name)
    assert run(call) == 1
    told = capsys.readouterr().err
    assert "[corpus-malformed]" in told
    assert name in told


def test_objects_are_never_unpickled(tmp_path, capsys):
    bomb = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "images.npy", bomb, allow_pickle=True)
    assert run(words(tmp_path, "s")) == 1
    assert "[corpus-malformed]" in capsys.readouterr().err


def test_a_language_model_has_no_options_of_classifiers(arrays, capsys):
    call = words(arrays, "s", *labelled(arrays))
    call[call.index("classification")] = "language-model"
    assert run(call) == 2
    assert "belongs to --task classification" in capsys.readouterr().err
