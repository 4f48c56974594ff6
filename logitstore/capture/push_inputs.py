"""What a user pushes, as arrays that can be stored, or a refusal that says what is wrong.

`key` names the sample in messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from logitstore.spec.errors import TargetsError, UsageError

__all__ = ["ascending", "booleans", "check_key", "check_length", "integers", "logits_of"]

_KEY_BYTES = 65_535


def check_key(sample_key: Any) -> None:
    """Raises: UsageError bad-argument for what is no name of a sample."""
    try:
        fits = 0 < len(sample_key.encode()) <= _KEY_BYTES
    except (AttributeError, UnicodeError):
        fits = False
    if not fits:
        raise UsageError(
            "bad-argument",
            "a sample's name is text",
            where="sample_key",
            got=repr(sample_key)[:80],
            expected=f"1 to {_KEY_BYTES} bytes of UTF-8",
        )


def _array(values: Any) -> np.ndarray[Any, Any]:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def integers(values: Any, name: str, key: str) -> np.ndarray[Any, Any]:
    """Values of an integer dtype as int64.

    Raises: UsageError bad-argument.
    """
    array = _array(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            "bad-argument",
            f"{name} must be integers",
            where=f"sample {key}",
            got=array.dtype,
            expected="an integer dtype",
        )
    return array.astype(np.int64)


def booleans(values: Any, key: str) -> np.ndarray[Any, Any]:
    """A loss mask as booleans.

    Raises: UsageError bad-argument.
    """
    array = _array(values)
    if array.size and not np.isin(array, (0, 1)).all():
        raise UsageError(
            "bad-argument",
            "loss_mask says of each row whether it counts",
            where=f"sample {key}",
            got=f"{array.dtype} {np.unique(array)[:4].tolist()}",
            expected="booleans, or 0 and 1",
        )
    return array.astype(np.bool_)


def ascending(values: Any, name: str, key: str) -> np.ndarray[Any, Any]:
    """Offsets: integers that never fall and fit uint32.

    Raises: UsageError bad-argument.
    """
    array = integers(values, name, key)
    if (np.diff(array, prepend=0) < 0).any() or (array >= 1 << 32).any():
        raise UsageError(
            "bad-argument",
            f"{name} must ascend, from 0 to 2^32 - 1",
            where=f"sample {key}",
            got=array[:8].tolist(),
        )
    return array


def logits_of(values: Any, key: str) -> torch.Tensor:
    """Raw logits as a tensor; numpy views that torch does not take are copied.

    Raises: TargetsError wrong-length for what is no array of real numbers.
    """
    if isinstance(values, np.ndarray) and (
        not values.flags.writeable or any(stride < 0 for stride in values.strides)
    ):
        values = values.copy()
    try:
        logits = torch.as_tensor(values)
        real = not logits.is_complex() and logits.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        real = False
    if not real:
        raise TargetsError(
            "wrong-length",
            "logits must be an array of real numbers",
            where=f"sample {key}",
            got=getattr(values, "dtype", type(values).__name__),
            expected="torch or numpy, [T, V], or [V] for classification",
        )
    return logits


def check_length(name: str, array: np.ndarray[Any, Any], key: str, length: int) -> None:
    """Raises: TargetsError wrong-length unless `array` is [length]."""
    if array.shape != (length,):
        raise TargetsError(
            "wrong-length",
            f"{name} has another length than tokens",
            where=f"sample {key}",
            got=array.shape,
            expected=(length,),
        )
