"""Classification end to end on Fashion-MNIST: `python demo/classification.py`.

    a two-convolution teacher, trained for a minute on 60,000 images -> its logits of four views of
    each of the first 12,000 in a store -> verified -> a student a twentieth as large trained from
    the store, with the labels alone and with the teacher's logits of the very views that it sees
    -> demo-out/classification/report.md

The students never see the teacher. A second run finds teacher and store done. `--quick` takes a
thirtieth of everything, to see that it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import logitstore as ls  # noqa: E402  (runs from a checkout, which is not on the path yet)
from demo import fetch_assets  # noqa: E402
from demo.run import logitstore  # noqa: E402
from logitstore.corpora import ArrayFiles  # noqa: E402

# An environment variable, because the process that captures finds the weights by it, too.
OUT = Path(os.environ.get("LOGITSTORE_DEMO_OUT", REPOSITORY / "demo-out")) / "classification"
WEIGHTS = OUT / "teacher.safetensors"
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IMAGES = 12_000
VIEWS = 4
# Over all views; an image is seen VIEWS times in each.
STUDENT_EPOCHS = 5
SEEDS = 3

Loss = Callable[[Tensor, Any], Tensor]


def as_input(images: Any) -> Tensor:
    """uint8 [B, 28, 28], array or tensor -> float32 [B, 1, 28, 28] around 0."""
    return (torch.as_tensor(images).float() / 255 - 0.286)[:, None] / 0.353


def teacher_net() -> nn.Module:
    """The teacher: two convolutions, 206,922 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def student_net() -> nn.Module:
    """The student: two small convolutions, 9,098 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 49, 10),
    )  # fmt: skip


class FashionTeacher:
    """What `logitstore precompute --teacher py:demo.classification:teacher` runs."""

    num_classes = len(CLASSES)
    class_names = CLASSES

    def __init__(self) -> None:
        self.net = teacher_net()
        self.net.load_state_dict(load_file(WEIGHTS))
        self.net.eval()
        self.fingerprint = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """Raw logits [B, 10] of uint8 images [B, 28, 28]."""
        return self.net(as_input(images))


def teacher() -> FashionTeacher:
    """The trained teacher."""
    return FashionTeacher()


def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of images whose class comes out on top."""
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x).argmax(-1) == y).sum())
            for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)
        )
    return right / len(labels)


def train_teacher(inputs: Tensor, labels: Tensor, epochs: int = 2) -> None:
    """Train on labels and keep the weights."""
    torch.manual_seed(0)
    net = teacher_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    steps = epochs * (len(inputs) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(128)[: steps // epochs]:
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    save_file(net.state_dict(), WEIGHTS)


def capture(images: Path, labels: Path, samples: int) -> Path:
    """The teacher's logits of views of the first images, verified."""
    store = OUT / "store"
    logitstore(
        "precompute",
        "--task", "classification",
        "--teacher", "py:demo.classification:teacher",
        "--corpus", str(images),
        "--labels", str(labels),
        "--signal", "dense",
        "--max-samples", str(samples),
        "--views", str(VIEWS),
        "--crop-padding", "1",
        "--keep-thumbnails",
        "--out", str(store),
    )  # fmt: skip
    logitstore("verify", str(store), "--full")
    return store


def train_student(
    store: Path, images: Path, loss: Loss, seed: int, *, plain: bool = False
) -> nn.Module:
    """A student from the store: its views, made again from the images; or the plain images alone,
    as many steps."""
    only = [("view", "==", 0)] if plain else None
    epochs = STUDENT_EPOCHS * (VIEWS if plain else 1)
    dataset = ls.LogitDataset(store, shuffle=True, seed=seed, filter=only)
    inputs = ArrayFiles.open([str(images)])
    torch.manual_seed(seed)
    net = student_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for batch in ls.loader(dataset, batch_size=128):
            seen = ls.replay(inputs, batch.sample_keys, batch.view)
            student_BV = net(as_input(seen))
            optimizer.zero_grad()
            loss(student_BV, batch).backward()
            optimizer.step()
    return net


def label_loss(student_BV: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of the labels; no teacher."""
    return ls.losses.cross_entropy(student_BV, batch.targets, labels=batch.labels)


def kd_loss(student_BV: Tensor, batch: Any) -> Tensor:
    """Hinton's: softened forward KL, with a tenth of the labels' cross-entropy."""
    soft = ls.losses.forward_kl(student_BV, batch.targets, temperature=4.0, missing="none")
    return 0.9 * soft + 0.1 * label_loss(student_BV, batch)


def ttm_loss(student_BV: Tensor, batch: Any) -> Tensor:
    """Transformed teacher matching: the teacher's power transform, the student as it is."""
    return ls.losses.ttm(student_BV, batch.targets, gamma=0.25) + label_loss(student_BV, batch)


# arm -> what it is, its loss, whether it sees plain images only
ARMS: dict[str, tuple[str, Loss, bool]] = {
    "ce-plain": ("student, plain images, labels alone", label_loss, True),
    "ce": ("student, views, labels alone", label_loss, False),
    "kd": ("student, views, teacher's logits (forward KL at T = 4, 0.1 labels)", kd_loss, False),
    "ttm": ("student, views, teacher's logits (TTM, gamma 1/4, plus labels)", ttm_loss, False),
}


def main() -> None:
    """Everything; prints and keeps the accuracies on the 10,000 test images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a thirtieth of everything, one seed")
    part = 30 if parser.parse_args().quick else 1
    start_s = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    folder = fetch_assets.fashion_mnist()
    images, labels = (folder / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    test_x, test_y = (
        torch.from_numpy(ArrayFiles.open([str(folder / f"t10k-{name}-ubyte.gz")]).array(0).copy())
        for name in ("images-idx3", "labels-idx1")
    )
    test_x, test_y = as_input(test_x), test_y.long()
    if not WEIGHTS.exists():
        train_x, train_y = (ArrayFiles.open([str(f)]).array(0).copy() for f in (images, labels))
        size = len(train_x) // part
        train_teacher(as_input(train_x[:size]), torch.from_numpy(train_y[:size]).long())
    found = {"teacher": [accuracy(teacher().net, test_x, test_y)]}
    store = capture(images, labels, IMAGES * VIEWS // part)
    stats = json.loads(logitstore("stats", str(store), "--json"))
    for arm, (_, loss, plain) in ARMS.items():
        found[arm] = [
            accuracy(train_student(store, images, loss, seed, plain=plain), test_x, test_y)
            for seed in range(SEEDS if part == 1 else 1)
        ]
    table = report(found, stats)
    print("\n" + table)
    print(f"{OUT / 'report.md'}; {time.perf_counter() - start_s:.0f} s")


def report(found: dict[str, list[float]], stats: dict[str, Any]) -> str:
    """Writes report.md; returns its table."""
    names = {"teacher": "teacher, 60,000 images"} | {
        arm: text for arm, (text, _, _) in ARMS.items()
    }
    rows = ["| what | test accuracy | seeds |", "|---|---|---|"]
    for arm, values in found.items():
        mean = sum(values) / len(values)
        each = ", ".join(f"{value:.2%}" for value in values)
        rows.append(f"| {names[arm]} | {mean:.2%} | {each} |")
    table = "\n".join(rows) + "\n"
    columns = {column["name"]: column["bytes_per_position"] for column in stats["columns"]}
    (OUT / "report.md").write_text(
        f"# Classification demo\n\nFashion-MNIST; students train on {stats['samples']:,} views of "
        f"{stats['samples'] // VIEWS:,} images for {STUDENT_EPOCHS} epochs. The store: "
        f"{stats['bytes']:,} bytes, {stats['bytes_per_position']:.1f} a sample, of which "
        f"thumbnails take {columns['thumbnail']:.1f}.\n\n{table}"
    )
    return table


if __name__ == "__main__":
    main()
