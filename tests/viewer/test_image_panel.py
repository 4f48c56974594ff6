"""Pages of image samples: the picture is the view that the teacher saw, and words tell it."""

from __future__ import annotations

import html
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import logitstore
from logitstore import store
from logitstore_cli.main import run
from logitstore_server.viewer import viewer_app

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), np.uint8)
LARGE = np.random.default_rng(1).integers(0, 256, (2, 70, 130), np.uint8)


class Sums:
    """Logits from the sums of two halves."""

    num_classes = 3
    class_names = ("<i>left", "right", "neither")

    def __call__(self, images):
        flat = images.flatten(1).float()
        middle = flat.shape[1] // 2
        return np.stack([flat[:, :middle].mean(1), flat[:, middle:].mean(1), flat[:, 0]], 1) / 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    thumbnails = "--keep-thumbnails"
    for name, array, more in (
        ("colours", COLOURS, (thumbnails, "--views", "4", "--crop-padding", "3")),
        ("large", LARGE, (thumbnails, "--views", "3", "--crop-padding", "12")),
        ("unkept", COLOURS, ("--views", "2")),
        ("plain", COLOURS, ()),
    ):
        np.save(place / f"{name}.npy", array)
        np.save(place / f"{name}-labels.npy", np.arange(len(array)) % 3)
        words = ["precompute", "--task", "classification", "--signal", "dense", "--quiet"]
        words += ["--teacher", "py:tests.viewer.test_image_panel:Sums", "--progress", "none"]
        words += ["--corpus", str(place / f"{name}.npy"), *more, "--threads-per-worker", "1"]
        words += ["--labels", str(place / f"{name}-labels.npy"), "--out", str(place / name)]
        assert run(words) == 0
    return place


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    stores = {p.name: store.open(p) for p in sorted(folder.iterdir()) if p.is_dir()}
    yield TestClient(viewer_app(stores))
    for each in stores.values():
        each.close()


def picture(client: TestClient, address: str) -> np.ndarray:
    answer = client.get(address)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_the_picture_is_what_the_teacher_saw(client, folder):
    dataset = logitstore.LogitDataset(folder / "colours")
    batch = logitstore.collate([dataset[i] for i in range(len(dataset))])
    seen = logitstore.replay(COLOURS, batch.sample_keys, batch.view)
    for number in (0, 5, 11, 23):
        address = f"/stores/colours/samples/{number}"
        np.testing.assert_array_equal(picture(client, f"{address}/image.png"), seen[number])
        plain = picture(client, f"{address}/image.png?plain=1")
        np.testing.assert_array_equal(plain, COLOURS[number // 4])
        page, told = client.get(address).text, client.get(f"{address}.json").json()["picture"]
        assert told["view"] == batch.view[number].describe()[0]
        assert told["view"] in page
        assert f'src="{address}/image.png"' in page
        assert [view["sample"] for view in told["views"]] == [
            *range(number // 4 * 4, number // 4 * 4 + 4)
        ]
        assert "crop-flip 1, seed 0: 4 views, shifts up to 3 px, half of them mirrored" in page


def test_larger_images_are_shown_reduced(client):
    told = client.get("/stores/large/samples/1.json").json()["picture"]
    assert (told["size"], told["reduced"]) == ("130 × 70", 3)
    plain = picture(client, "/stores/large/samples/0/image.png")
    assert plain.shape == (24, 44)
    means = LARGE[0, :69, :129].reshape(23, 3, 43, 3).mean((1, 3))
    assert np.abs(plain[:23, :43] - means).max() <= 0.5
    moved = picture(client, "/stores/large/samples/1/image.png")
    assert moved.shape == plain.shape
    assert (moved != plain).mean() > 0.5


def test_a_store_without_pictures_says_how_to_keep_them(client):
    for name, view in (("unkept", "view 1: "), ("plain", None)):
        page = client.get(f"/stores/{name}/samples/1").text
        assert "--keep-thumbnails" in page
        assert "<img" not in page
        assert view is None or view in page
        answer = client.get(f"/stores/{name}/samples/1/image.png")
        assert answer.status_code == 404
        assert "keeps no picture" in answer.text


def test_classes_have_their_names_and_the_label_is_marked(client):
    kept = client.get("/stores/colours/samples/4/kept.json").json()["positions"][0]
    assert {entry["text"] for entry in kept["entries"]} == {"<i>left", "right", "neither"}
    assert kept["label"]["text"] == "right"
    assert [entry["text"] for entry in kept["entries"] if entry["label"]] == ["right"]
    assert "<i>left" not in client.get("/stores/colours/samples/4").text


def test_the_audit_that_a_page_names_runs_and_finds_the_record_true(client, folder, capsys):
    told = client.get("/stores/colours/samples/5.json").json()["copy"]["audit"]
    assert html.escape(told, quote=False) in client.get("/stores/colours/samples/5").text
    words = shlex.split(told)
    assert words[:3] == ["logitstore", "audit", str(folder / "colours")]
    # Files of a corpus are named as the plan does, without the folder that they share.
    words[words.index("--corpus") + 1] = str(folder / words[words.index("--corpus") + 1])
    assert run([*words[1:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["logprobs"]["count"]) == (1, 3)
    assert found["logprobs"]["max"] < 0.01
