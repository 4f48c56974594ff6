"""Dense: every raw logit, for classifiers and small vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from logitstore.signals.encoder import Rows, register
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import Header
from logitstore.spec.signals import DenseSpec

__all__ = ["DenseEncoder"]


@register("dense")
class DenseEncoder:
    """Raw logits [R, V]."""

    def __init__(self, spec: DenseSpec, header: Header) -> None:
        self._half = spec.dtype == "float16"

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        largest = rows.z.masked_fill(torch.isneginf(rows.z), 0).abs().amax()
        if self._half and float(largest) > 65_504:
            raise TeacherError(
                "teacher-nonfinite",
                "a raw logit does not fit float16",
                got=float(largest),
                expected="at most 65504 in size",
                hint="capture with --signal dense:dtype=float32",
            )
        return {"logits": rows.z}
