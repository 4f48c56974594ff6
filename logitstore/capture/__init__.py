"""Capture: a teacher's distributions into a store, as a batch job or pushed from a loop."""

from logitstore.capture.progress import Progress
from logitstore.capture.push import PushWriter, writer
from logitstore.capture.run import CaptureResult, Estimate, estimate, precompute
from logitstore.capture.settings import CaptureSettings

__all__ = [
    "CaptureResult",
    "CaptureSettings",
    "Estimate",
    "Progress",
    "PushWriter",
    "estimate",
    "precompute",
    "writer",
]
