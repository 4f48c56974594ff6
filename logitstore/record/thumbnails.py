"""Small pictures beside records, so that people see what the teacher saw.

A thumbnail is the image itself up to 64 pixels a side, else means of square blocks of it. Only the
first view of an image carries one: the others follow from it.

Letters: H height, W width, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["THUMBNAIL_PIXELS", "thumbnail", "thumbnail_factor"]

# Longest side.
THUMBNAIL_PIXELS = 64


def thumbnail_factor(height: int, width: int) -> int:
    """Sides of the blocks of pixels that become one."""
    return -(-max(height, width) // THUMBNAIL_PIXELS)


def thumbnail(image: NDArray[Any], factor: int) -> NDArray[np.uint8]:
    """uint8 [h, w, C] of a uint8 image [H, W] or [H, W, C]; blocks at the end may be smaller.

    Means are rounded to nearest in integers, so that bytes are the same everywhere.
    """
    image_HWC = image if image.ndim == 3 else image[:, :, None]
    if factor == 1:
        return np.ascontiguousarray(image_HWC)
    height, width = image_HWC.shape[:2]
    rows, columns = np.arange(0, height, factor), np.arange(0, width, factor)
    sums = np.add.reduceat(image_HWC.astype(np.int64), rows, axis=0)
    sums = np.add.reduceat(sums, columns, axis=1)
    sizes = np.diff([*rows, height])[:, None] * np.diff([*columns, width])
    return ((2 * sums + sizes[:, :, None]) // (2 * sizes[:, :, None])).astype(np.uint8)
