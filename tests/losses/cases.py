"""What the tests of losses share: vectors, random cases, and a float64 softmax written here.

Letters: R rows, V vocabulary, K kept ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

VECTORS = Path(__file__).resolve().parent.parent / "vectors"


class Vectors:
    """One case of a vector file: `case("student_logits")` is a float64 or int64 tensor."""

    def __init__(self, file: str, prefix: str) -> None:
        with np.load(VECTORS / file) as arrays:
            self._arrays = {
                key.removeprefix(prefix + "_"): arrays[key]
                for key in arrays.files
                if key.startswith(prefix + "_")
            }

    def __call__(self, name: str) -> Tensor:
        value = torch.from_numpy(np.asarray(self._arrays[name]))
        return value.double() if value.is_floating_point() else value.long()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    """float64 normal logits."""
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def log_softmax64(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The definition, with no help from torch's softmax."""
    z = logits.double() / temperature
    z = z - z.max(-1, keepdim=True).values
    return z - z.exp().sum(-1, keepdim=True).log()


def value_and_gradient(function, student: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_vector(
    function, student: Tensor, targets, loss: Tensor, gradient: Tensor, **options
) -> None:
    """The agreed tolerances: 1e-10 and 1e-9 in float64, 1e-4 relative in float32."""
    got, got_gradient = value_and_gradient(function, student, targets, **options)
    assert abs(got - loss) <= 1e-10
    assert (got_gradient - gradient).abs().max() <= 1e-9
    got, got_gradient = value_and_gradient(function, student.float(), targets, **options)
    assert got_gradient.dtype == torch.float32
    assert abs(got - loss) <= 1e-4 * max(1.0, abs(loss))
    assert (got_gradient - gradient).abs().max() <= 1e-4 * gradient.abs().max()


# seeds of random cases and the sizes that go with them
seeds = st.integers(0, 2**20)
sizes = st.tuples(st.integers(1, 4), st.integers(3, 40)).flatmap(
    lambda rv: st.tuples(st.just(rv[0]), st.just(rv[1]), st.integers(1, rv[1] - 1))
)
