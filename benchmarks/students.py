"""What the error of a record is worth: a small student, trained from records of equal size.

The student is a linear layer over a fixed random projection of what the teacher's own output layer
sees, so that it can come close to the teacher and the noise of its targets shows. Losses are the
product's. Letters: T positions of a window, d features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from real_rows import Window
from torch import Tensor

from logitstore.losses import forward_kl
from logitstore.losses.contract import Missing
from logitstore.targets import DenseTargets, Targets

__all__ = ["Lesson", "Student", "full_lesson", "gradient_angle", "gradient_of", "train_student"]


@dataclass(frozen=True)
class Lesson:
    """How an arm teaches.

    Attributes:
        targets: number of a window -> its targets; None teaches labels alone.
        missing: treatment of what a top-K list leaves out.
    """

    targets: Callable[[int], Targets] | None
    missing: Missing = "ghost"

    def loss(self, logits_1TV: Tensor, number: int, window: Window) -> Tensor:
        """Mean over the window's positions that have a label."""
        labels = torch.from_numpy(window.labels)[None]
        labels = torch.where(labels >= 0, labels, -100)
        if self.targets is None:
            return F.cross_entropy(logits_1TV[0], labels[0])
        targets = self.targets(number).padded()
        loss = forward_kl(logits_1TV, targets, labels=labels, missing=self.missing)
        assert isinstance(loss, Tensor)
        return loss


class Student:
    """z = W x, x a fixed projection of the teacher's last hidden state to d features."""

    def __init__(self, windows: Sequence[Window], features: int) -> None:
        size = windows[0].hidden.shape[1]
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(size, features, generator=generator) / size**0.5
        hidden = [torch.from_numpy(np.array(w.hidden)) for w in windows]
        scale = torch.cat(hidden).std()
        self.x = [h / scale @ projection for h in hidden]
        self.weight_Vd = torch.zeros(windows[0].logits.shape[1], features, requires_grad=True)

    def logits(self, number: int) -> Tensor:
        """[1, T, V] of a window."""
        return (self.x[number] @ self.weight_Vd.T)[None]


def full_lesson(windows: Sequence[Window]) -> Lesson:
    """The teacher's whole distributions."""

    def targets(number: int) -> Targets:
        logits = torch.from_numpy(np.array(windows[number].logits))
        lengths = torch.tensor([len(logits)])
        return DenseTargets(logits=logits, vocab_size=logits.shape[1], lengths=lengths)

    return Lesson(targets)


def train_student(
    lesson: Lesson,
    windows: Sequence[Window],
    held_out: Sequence[int],
    *,
    features: int,
    epochs: int,
    seed: int,
) -> tuple[Student, float, float]:
    """(student, KL to the teacher and label log-loss on the held-out windows), nats."""
    student = Student(windows, features)
    taught = [i for i in range(len(windows)) if i not in set(held_out)]
    optimizer = torch.optim.Adam([student.weight_Vd], lr=0.03)
    steps = epochs * len(taught)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(taught), generator=generator).tolist():
            number = taught[index]
            optimizer.zero_grad()
            lesson.loss(student.logits(number), number, windows[number]).backward()
            optimizer.step()
            schedule.step()
    scores = []
    with torch.no_grad():
        for number in held_out:
            logits = student.logits(number)
            measures = (full_lesson(windows), Lesson(None))
            scores.append([float(m.loss(logits, number, windows[number])) for m in measures])
    kl, label_loss = np.mean(scores, axis=0)
    return student, float(kl), float(label_loss)


def gradient_of(student: Student, lesson: Lesson, windows: Sequence[Window]) -> Tensor:
    """Gradient with respect to W of the mean loss over every second window."""
    student.weight_Vd.grad = None
    for number, window in list(enumerate(windows))[::2]:
        lesson.loss(student.logits(number), number, window).backward()
    assert student.weight_Vd.grad is not None
    return student.weight_Vd.grad.clone()


def gradient_angle(gradient: Tensor, full: Tensor) -> tuple[float, float]:
    """(degrees between the two, norm ratio)."""
    a, b = gradient.double().flatten(), full.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()))
    return float(np.degrees(np.arccos(min(1.0, cosine)))), float(a.norm() / b.norm())
