"""Scored candidates as a record: link-prediction contexts of an anchor, answer choices.

Letters: C candidates of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from logitstore.capture.chunks import sample_record
from logitstore.record import Record
from logitstore.spec.errors import TargetsError, TeacherError
from logitstore.spec.header import Header
from logitstore.spec.signals import EMPTY_SLOT, ScoresSpec

__all__ = ["scores_record"]


def scores_record(header: Header, key: str, ids: Any, scores: Any, label: int | None) -> Record:
    """One sample of a `scores` store.

    Args:
        header: of the store.
        key: of the sample; names it in errors.
        ids: integers [C], at most as many as the signal has slots; slots left over stay empty.
        scores: finite floats [C].
        label: where the store keeps labels.

    Raises: TargetsError wrong-length, token-out-of-range; TeacherError teacher-nonfinite.
    """
    assert isinstance(header.signal, ScoresSpec)
    slots = header.signal.candidates
    ids_C, scores_C = _array(ids), _array(scores)
    if ids_C.ndim != 1 or ids_C.shape != scores_C.shape or len(ids_C) > slots:
        raise TargetsError(
            "wrong-length",
            "candidates and scores do not belong together",
            where=f"sample {key}",
            got=f"ids {ids_C.shape}, scores {scores_C.shape}",
            expected=f"[C] both, C at most {slots} as signal {header.signal} says",
        )
    for name, values in (
        ("candidate", ids_C),
        ("label", np.array([0 if label is None else label])),
    ):
        whole = not values.size or np.issubdtype(values.dtype, np.integer)
        if not whole or ((values < 0) | (values >= header.vocab_size)).any():
            raise TargetsError(
                "token-out-of-range",
                f"no such {name}",
                where=f"sample {key}",
                got=values[:4].tolist(),
                expected=f"integers from 0 to {header.vocab_size - 1}",
            )
    if not np.isfinite(scores_C).all():
        raise TeacherError(
            "teacher-nonfinite",
            "a score is not finite",
            where=f"sample {key}",
            got=scores_C[~np.isfinite(scores_C)][:4].tolist(),
            expected="finite scores; leave candidates without one out",
        )
    padded_ids = np.full((1, slots), EMPTY_SLOT, np.uint32)
    padded_scores = np.zeros((1, slots), np.float32)
    padded_ids[0, : len(ids_C)] = ids_C
    padded_scores[0, : len(ids_C)] = scores_C
    columns: dict[str, Any] = {"ids": padded_ids, "scores": padded_scores}
    if label is not None:
        columns["label"] = np.array([label])
    return sample_record(header, [key], [1], columns)


def _array(values: Any) -> np.ndarray[Any, Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
