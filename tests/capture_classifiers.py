"""Classifiers for tests, named on the command line as `py:tests.capture_classifiers:NAME`.

`digits` reads scikit-learn's 8 x 8 digits, `letters` reads texts; what they answer is fixed, so
that a test can compute what must be stored.
"""

from __future__ import annotations

import torch

NUM_CLASSES = 10
POISON = "poison"


def weights() -> torch.Tensor:
    """float32 [64, 10]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, NUM_CLASSES, generator=generator) / 8


class Digits:
    """A linear map of the pixels."""

    num_classes = NUM_CLASSES

    def __init__(self) -> None:
        self.weights = weights()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() @ self.weights


class Letters:
    """Logits are counts of vowels; a text that holds POISON makes a NaN."""

    num_classes = 5
    class_names = tuple("aeiou")

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[float(text.count(v)) for v in self.class_names] for text in texts]
        logits = torch.tensor(rows)
        logits[[POISON in text for text in texts], 0] = torch.nan
        return logits


class Narrow(Digits):
    """Answers with a class too few."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return super().__call__(images)[:, 1:]


digits, letters, narrow = Digits, Letters, Narrow


def no_classes() -> object:
    """Not a classifier: num_classes is missing."""
    return torch.nn.Identity()
