"""Views of images: the student sees what the teacher saw; a store of other views is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import logitstore
from logitstore import store as stores
from logitstore.corpora import ArrayFiles
from logitstore.record import Record
from logitstore.record.random import bits, key_of, uniform
from logitstore.record.thumbnails import thumbnail
from logitstore.record.views import Views, apply_view, draw_views
from logitstore.spec import header as header_module
from logitstore.spec.errors import AlignmentError, FormatError, NotFoundError, UsageError
from logitstore.spec.header import Augmentation, Header
from logitstore_cli.main import run

IMAGES = load_digits().images.astype(np.uint8)[:60]
LABELS = load_digits().target[:60]
VIEWS, PADDING = 3, 2
WEIGHTS = torch.from_numpy(np.random.default_rng(0).integers(-50, 50, (64, 10))).float()


class Exact:
    """Sums of whole numbers, which no order of additions rounds: logits tell pixels exactly."""

    num_classes = 10
    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() @ WEIGHTS


def capture(folder: Path, out: str, *more: str, signal: str = "dense:dtype=float32") -> Path:
    """A store of views of digits."""
    for name, array in (("images.npy", IMAGES), ("labels.npy", LABELS)):
        if not (folder / name).exists():
            np.save(folder / name, array)
    words = ["precompute", "--task", "classification", "--signal", signal, *more]
    words += [
        "--teacher",
        "py:tests.test_capture_classification_views:Exact",
        "--seed",
        "5",
        "--quiet",
    ]
    words += ["--corpus", str(folder / "images.npy"), "--labels", str(folder / "labels.npy")]
    words += ["--views", str(VIEWS), "--crop-padding", str(PADDING), "--threads-per-worker", "1"]
    assert run([*words, "--out", str(folder / out), "--progress", "none"]) == 0
    return folder / out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Digits as views, in both containers, with thumbnails."""
    place = tmp_path_factory.mktemp("views")
    capture(place, "zarr", "--keep-thumbnails")
    capture(place, "arrow", "--container", "arrow", "--keep-thumbnails", "--shard-samples", "50")
    return place


def whole(location: Path, **options) -> logitstore.data.Batch:
    dataset = logitstore.LogitDataset(location, **options)
    return logitstore.collate([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_the_student_sees_what_the_teacher_saw(folder, container):
    batch = whole(folder / container)
    assert len(batch) == VIEWS * len(IMAGES)
    assert batch.labels.tolist() == np.repeat(LABELS, VIEWS).tolist()
    assert batch.sample_keys[:4] == (
        "images.npy#0@0",
        "images.npy#0@1",
        "images.npy#0@2",
        "images.npy#1@0",
    )
    seen = logitstore.replay(IMAGES, batch.sample_keys, batch.view)
    assert seen.dtype == np.uint8
    assert torch.equal(batch.targets.logits, Exact()(torch.from_numpy(seen)))
    plain = batch.view.number == 0
    np.testing.assert_array_equal(seen[plain], IMAGES)
    assert (seen[~plain] != np.repeat(IMAGES, VIEWS - 1, 0)).any((1, 2)).mean() > 0.9
    shuffled = next(
        iter(
            logitstore.loader(logitstore.LogitDataset(folder / container, shuffle=True, seed=1), 16)
        )
    )
    rows = [batch.sample_keys.index(key) for key in shuffled.sample_keys]
    seen_again = logitstore.replay(IMAGES, shuffled.sample_keys, shuffled.view)
    np.testing.assert_array_equal(seen_again, seen[rows])


def test_images_may_come_from_files_arrays_or_tensors(folder):
    batch = whole(folder / "zarr")
    wanted = logitstore.replay(IMAGES, batch.sample_keys, batch.view)
    files = ArrayFiles.open([str(folder / "images.npy")])
    colour = np.stack([IMAGES, IMAGES // 2, 255 - IMAGES], -1)
    for images, expected in (
        (files, wanted),
        ({"images.npy": IMAGES}, wanted),
        (torch.from_numpy(IMAGES).float(), wanted.astype(np.float32)),
        (colour, np.stack([wanted, wanted // 2], -1)),
        (torch.from_numpy(colour), np.stack([wanted, wanted // 2], -1)),
    ):
        seen = logitstore.replay(images, batch.sample_keys, batch.view)
        assert isinstance(seen, torch.Tensor) == isinstance(images, torch.Tensor)
        np.testing.assert_array_equal(np.asarray(seen)[..., : expected.shape[-1]], expected)
    with pytest.raises(NotFoundError, match=r"images\.npy#59@0"):
        logitstore.replay(IMAGES[:59], batch.sample_keys, batch.view)
    with pytest.raises(NotFoundError):
        logitstore.replay({"other.npy": IMAGES}, batch.sample_keys, batch.view)
    with pytest.raises(UsageError, match="several files"):
        logitstore.replay(IMAGES, ["a.npy#0@0", "b.npy#0@0"], batch.view[:2])
    with pytest.raises(UsageError, match="do not belong together"):
        logitstore.replay(IMAGES.reshape(60, 64), batch.sample_keys, batch.view)


def test_a_view_is_the_padded_crop_then_the_flip():
    image = np.arange(1, 5 * 7 * 2 + 1, dtype=np.int16).reshape(5, 7, 2)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    for top, left, flip in ((0, 6, False), (5, 1, True), (3, 3, True), (6, 0, True)):
        one = Views(*(np.array([x]) for x in (1, top, left, flip)), padding=3)
        expected = padded[top : top + 5, left : left + 7]
        found = apply_view(image, one)
        assert found.dtype == image.dtype
        np.testing.assert_array_equal(found, expected[:, ::-1] if flip else expected)
    words = Views(*map(np.array, ([0, 1, 2], [3, 1, 3], [3, 3, 5], [False, False, True])), 3)
    assert words.describe() == [
        "view 0: the image as it is",
        "view 1: moved 2 px down",
        "view 2: moved 2 px right, mirrored",
    ]


def test_views_are_drawn_as_the_format_says():
    augmentation = Augmentation(seed=9, views=40, padding=4, flip=True)
    drawn = draw_views(augmentation, ["a.npy#3", "b.npy#0"])
    assert len(drawn) == 80
    key = key_of("b.npy#0")
    for v in range(1, 40):
        row = drawn[40 + v]
        assert (row.number[0], row.top[0]) == (v, int(uniform(9, key, v, 0) * 9))
        assert row.left[0] == int(uniform(9, key, v, 1) * 9)
        assert row.flip[0] == bool(int(bits(9, key, v, 2)) >> 63)
    assert {*drawn.top} == {*drawn.left} == {*range(9)}
    assert 20 < drawn.flip.sum() < 60
    still = dataclasses.replace(drawn, padding=4)[[0, 40]]
    assert still.describe() == ["view 0: the image as it is"] * 2
    never = draw_views(Augmentation(seed=9, views=40, padding=4, flip=False), ["a.npy#3"])
    assert not never.flip.any()
    np.testing.assert_array_equal(never.top, drawn.top[:40])


def test_views_do_not_depend_on_shards_or_batches(folder):
    many = capture(folder, "many", "--shard-samples", "20", "--batch-samples", "7")
    a, b = whole(folder / "zarr"), whole(many)
    assert a.sample_keys == b.sample_keys
    for name in ("number", "top", "left", "flip"):
        np.testing.assert_array_equal(getattr(a.view, name), getattr(b.view, name))
    with stores.open(many) as store:
        # Views of an image stay together, so that 20 samples mean 7 images.
        assert {shard.samples for shard in store.shards} == {21, 60 * 3 % 21}


def forged(folder: Path, name: str, change) -> Path:
    """A copy of the store whose records were changed."""
    with (
        stores.open(folder / "zarr") as source,
        stores.create(folder / name, source.header, {}) as writer,
    ):
        for plan in source.plans():
            writer.add_plan(plan)
        commit = source.commit(0)
        with writer.begin(commit.shard, source.plans()[0]) as attempt:
            record = source.read_chunk(0, 0)
            arrays = {key: values.copy() for key, values in record.arrays.items()}
            change(arrays)
            attempt.add(Record(record.schema, arrays))
            attempt.commit(statistics=commit.statistics)
    return folder / name


def test_views_that_the_seed_does_not_give_are_refused_on_open(folder, capsys):
    def move(arrays):
        arrays["view_left"][4] ^= 1

    place = forged(folder, "moved", move)
    with pytest.raises(AlignmentError) as caught:
        logitstore.LogitDataset(place)
    assert caught.value.kind == "store-misaligned"
    assert "1 of 180 differ, first sample images.npy#1@1" in caught.value.got
    capsys.readouterr()
    assert run(["verify", "--full", "--json", str(place)]) == 4
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["kind"] == "store-misaligned"

    def exchange(arrays):
        arrays["view"][[1, 2]] = arrays["view"][[2, 1]]

    with pytest.raises(AlignmentError, match="2 of 180"):
        logitstore.LogitDataset(forged(folder, "exchanged", exchange))

    def leave(arrays):
        arrays["view_top"][7] = 2 * PADDING + 1

    with pytest.raises(FormatError, match="view_top is 5, at most 4"):
        forged(folder, "outside", leave)


def test_readers_without_the_feature_refuse_by_name(folder, monkeypatch):
    with stores.open(folder / "zarr") as store:
        held = store.header
    assert held.images.augmentation.model_dump() == {
        "name": "crop-flip",
        "version": 1,
        "seed": 5,
        "views": VIEWS,
        "padding": PADDING,
        "flip": True,
    }
    assert "images" in held.reader_features
    for changes in ({"images": None}, {"reader_features": ()}):
        with pytest.raises(FormatError, match="document-invalid"):
            Header.decode(held.model_copy(update=changes).encode(), where="here")
    monkeypatch.setattr(header_module, "READER_FEATURES", frozenset({"pairs"}))
    with pytest.raises(FormatError, match="unknown-reader-feature"):
        stores.open(folder / "zarr")


def test_holdout_keeps_views_of_an_image_together_and_filters_choose_views(folder):
    train = whole(folder / "zarr", holdout=0.3)
    held = whole(folder / "zarr", holdout=0.3, split="validation")
    sides = [{key.partition("@")[0] for key in batch.sample_keys} for batch in (train, held)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held) == VIEWS * len(IMAGES)
    assert len(held) == VIEWS * len(sides[1])
    plain = whole(folder / "zarr", filter=[("view", "==", 0)])
    assert set(plain.view.number.tolist()) == {0}
    assert len(plain) == len(IMAGES)


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_thumbnails_are_kept_once_an_image_and_not_read_for_training(folder, container):
    with stores.open(folder / container) as store:
        kept = []
        for shard in range(len(store.shards)):
            record = store.read_chunk(shard, 0)
            assert record["num_thumbnail"].tolist() == (record["view"] == 0).tolist()
            kept.append(record["thumbnail"])
            assert store.commit(shard).column_bytes["thumbnail"] > 0
        np.testing.assert_array_equal(np.concatenate(kept), IMAGES[..., None])
    item = logitstore.LogitDataset(folder / container)[1]
    assert item.view.number.tolist() == [1]
    assert "thumbnail" not in item.row.chunk.record


def test_larger_images_have_thumbnails_of_block_means():
    image = np.random.default_rng(0).integers(0, 256, (7, 10, 3), np.uint8)
    small = thumbnail(image, 3)
    assert small.shape == (3, 4, 3)
    np.testing.assert_array_equal(small[1, 2], image[3:6, 6:9].mean((0, 1)).round())
    np.testing.assert_array_equal(small[2, 3], image[6, 9])


def test_converted_stores_keep_views(folder):
    target = folder / "narrow"
    assert run(["convert", str(folder / "zarr"), str(target), "--signal", "topk:3", "--quiet"]) == 0
    a, b = whole(folder / "zarr"), whole(target)
    np.testing.assert_array_equal(a.view.left, b.view.left)
    assert torch.equal(a.targets.logits.argmax(-1), b.targets.ids[:, 0])


@pytest.mark.parametrize(
    ("array", "more", "kind", "told"),
    [
        (np.zeros((9, 3, 8, 8), np.uint8), ("--views", "2"), "corpus-malformed", "transpose"),
        (np.zeros((9, 64), np.uint8), ("--views", "2"), "corpus-malformed", "(64,)"),
        (np.zeros((9, 8, 8), np.float32), ("--keep-thumbnails",), "corpus-malformed", "uint8"),
        (IMAGES, ("--no-flip",), "bad-argument", "--views"),
        (IMAGES, ("--views", "0"), "bad-argument", "--views"),
        (None, ("--views", "2"), "bad-argument", "rows of text"),
        (None, ("--keep-thumbnails",), "bad-argument", "rows of text"),
    ],
)
def test_what_has_no_views_is_refused(tmp_path, capsys, array, more, kind, told):
    corpus, teacher = tmp_path / "x.npy", "digits"
    if array is None:
        corpus, teacher = tmp_path / "x.jsonl", "letters"
        corpus.write_text('{"text": "a"}\n')
    else:
        np.save(corpus, array)
    words = ["precompute", "--task", "classification", "--signal", "dense", *more]
    words += ["--teacher", f"py:tests.capture_classifiers:{teacher}", "--corpus", str(corpus)]
    assert run([*words, "--out", str(tmp_path / "s")]) in (1, 2)
    printed = capsys.readouterr().err
    assert f"[{kind}]" in printed
    assert told in printed
    assert not (tmp_path / "s").exists()
