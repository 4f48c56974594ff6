"""Capture: a teacher's distributions into a store, as a batch job or pushed from a loop."""

from logitstore.capture.progress import Progress
from logitstore.capture.push import PushWriter, writer
from logitstore.capture.run import (
    CaptureResult,
    Estimate,
    Slice,
    estimate,
    header_for,
    precompute,
    slice_of,
)
from logitstore.capture.settings import CaptureSettings

__all__ = [
    "CaptureResult",
    "CaptureSettings",
    "Estimate",
    "Progress",
    "PushWriter",
    "Slice",
    "estimate",
    "header_for",
    "precompute",
    "slice_of",
    "writer",
]
