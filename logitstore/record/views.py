"""Views of images that can be made again: the same crop and flip at capture and in training.

A view is a function of (seed, image, number of the view) alone, by the random function of the
format; so it depends neither on batches nor on workers. What it does moves pixels and computes
nothing, so it is bit-identical in any library and on any device.

Letters: B views, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.record.random import bits, key_of, uniform
from logitstore.record.record import Record
from logitstore.spec.errors import AlignmentError, UsageError
from logitstore.spec.header import Header
from logitstore.spec.images import Augmentation, Images
from logitstore.spec.schema import DType

__all__ = [
    "VIEW_COLUMNS",
    "Views",
    "apply_view",
    "apply_views",
    "check_views",
    "draw_views",
    "image_key",
    "sources_of",
    "view_key",
    "views_of",
    "views_problem",
]

# Stored columns -> their type; one value a sample.
VIEW_COLUMNS: dict[str, DType] = {
    "view": "uint16",
    "view_top": "uint16",
    "view_left": "uint16",
    "view_flip": "bool",
}

_TOP, _LEFT, _FLIP = range(3)


@dataclass(frozen=True)
class Views:
    """What was done to each of some images.

    Attributes:
        number: int64 [B], which view of its image; 0 is the image as it is.
        top, left: int64 [B], 0 to 2 * padding: where the view begins in the image with its border;
            `padding` means unmoved, more moves the content up and to the left.
        flip: bool [B], mirrored left to right, after the crop.
        padding: pixels of the border of zeros.
    """

    number: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]
    padding: int

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, rows: int | slice | Sequence[int] | NDArray[Any]) -> Views:
        """Some of them; a single number gives one view, still with its axis."""
        chosen: Any = [rows] if isinstance(rows, int | np.integer) else rows
        return Views(
            self.number[chosen],
            self.top[chosen],
            self.left[chosen],
            self.flip[chosen],
            self.padding,
        )

    def columns(self) -> dict[str, NDArray[Any]]:
        """As a record stores them."""
        columns = (self.number, self.top, self.left, self.flip)
        pairs = zip(VIEW_COLUMNS.items(), columns, strict=True)
        return {name: values.astype(dtype) for (name, dtype), values in pairs}

    def describe(self) -> list[str]:
        """Each view in words."""
        words = []
        for number, top, left, flip in zip(
            self.number.tolist(),
            self.top.tolist(),
            self.left.tolist(),
            self.flip.tolist(),
            strict=True,
        ):
            down, right = self.padding - top, self.padding - left
            # A flip follows the crop.
            right = -right if flip else right
            moves = [
                f"{abs(pixels)} px {names[pixels < 0]}"
                for pixels, names in ((down, ("down", "up")), (right, ("right", "left")))
                if pixels
            ]
            done = ["moved " + " and ".join(moves)] if moves else []
            done += ["mirrored"] if flip else []
            words.append(f"view {number}: " + (", ".join(done) or "the image as it is"))
        return words


def draw_views(augmentation: Augmentation, image_keys: Sequence[str]) -> Views:
    """All views of some images: those of the first, then those of the second, and so on.

    Draws 0, 1 and 2 of (seed, image key, view number) give top, left and flip.
    """
    keys = np.array([key_of(key) for key in image_keys], np.uint64)[:, None]
    number = np.arange(augmentation.views)[None]
    shifts, moved = 2 * augmentation.padding + 1, number > 0

    def shift(draw: int) -> NDArray[np.int64]:
        drawn = (uniform(augmentation.seed, keys, number, draw) * shifts).astype(np.int64)
        return np.where(moved, drawn, augmentation.padding).ravel()

    flip = (bits(augmentation.seed, keys, number, _FLIP) >> np.uint64(63)).astype(bool)
    return Views(
        number=np.broadcast_to(number, flip.shape).astype(np.int64).ravel(),
        top=shift(_TOP),
        left=shift(_LEFT),
        flip=(flip & moved & augmentation.flip).ravel(),
        padding=augmentation.padding,
    )


def apply_view(image: NDArray[Any], view: Views) -> NDArray[Any]:
    """One view of one image, [H, W] or [H, W, C] of any type; `view` holds one view.

    Raises: UsageError bad-argument for another number of views.
    """
    return apply_views(image[None], view)[0]


def apply_views(images: NDArray[Any], views: Views) -> NDArray[Any]:
    """A view of each image: [B, H, W] or [B, H, W, C] of any type, the same shape and type.

    Raises: UsageError bad-argument for another number of views than of images.
    """
    rows, columns, inside = sources_of(views, images.shape)
    out = images[np.arange(len(views))[:, None, None], rows, columns]
    out[~inside] = 0
    return out


def sources_of(
    views: Views, shape: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Where each pixel of the views comes from: (rows [B, H, 1], columns [B, 1, W], inside [B, H,
    W]); pixels that are not inside come from the border and are 0.

    Args:
        shape: of the images, [B, H, W] or [B, H, W, C].

    Raises: UsageError bad-argument.
    """
    if len(shape) not in (3, 4) or shape[0] != len(views):
        raise UsageError(
            "bad-argument",
            "images and views do not belong together",
            where="views",
            got=f"images {tuple(shape)}, {len(views)} views",
            expected=f"({len(views)}, height, width) or ({len(views)}, height, width, channels)",
        )
    height, width = shape[1:3]
    rows_BH = (views.top - views.padding)[:, None] + np.arange(height)
    along = np.where(views.flip[:, None], np.arange(width)[::-1], np.arange(width))
    columns_BW = (views.left - views.padding)[:, None] + along
    inside = (rows_BH >= 0) & (rows_BH < height)
    inside_BHW = inside[:, :, None] & ((columns_BW >= 0) & (columns_BW < width))[:, None, :]
    return (
        rows_BH.clip(0, height - 1)[:, :, None],
        columns_BW.clip(0, width - 1)[:, None, :],
        inside_BHW,
    )


def view_key(image: str, number: int) -> str:
    """The sample key of a view."""
    return f"{image}@{number}"


def image_key(sample_key: str) -> str:
    """The key of the image that a view is of."""
    return sample_key.rpartition("@")[0]


def views_of(record: Record | Mapping[str, NDArray[Any]], images: Images | None) -> Views | None:
    """The views of a record's samples; None where they are no views."""
    if images is None or images.augmentation is None or "view" not in record:
        return None
    return Views(
        number=record["view"].astype(np.int64),
        top=record["view_top"].astype(np.int64),
        left=record["view_left"].astype(np.int64),
        flip=record["view_flip"],
        padding=images.augmentation.padding,
    )


def views_problem(record: Record, images: Images | None) -> str | None:
    """What of a record's views lies outside the augmentation's limits, or None."""
    if images is None or images.augmentation is None:
        return None
    limits = {"view": images.augmentation.views - 1}
    limits |= dict.fromkeys(("view_top", "view_left"), 2 * images.augmentation.padding)
    for name, limit in limits.items():
        values = record.get(name)
        if values is not None and len(values) and int(values.max()) > limit:
            return f"{name} is {int(values.max())}, at most {limit} is possible"
    return None


def check_views(record: Record, header: Header, *, where: str) -> None:
    """Draw the views of a record again and compare; nothing to do for a store without views.

    Raises: AlignmentError store-misaligned.
    """
    stored = views_of(record, header.images)
    if stored is None:
        return
    assert header.images is not None
    assert header.images.augmentation is not None
    keys = record.sample_keys()
    of = [image_key(key) for key in keys]
    place = {
        image: i * header.images.augmentation.views for i, image in enumerate(dict.fromkeys(of))
    }
    every = draw_views(header.images.augmentation, list(place))
    drawn = every[np.array([place[image] for image in of], np.int64) + stored.number]
    wrong = (drawn.top != stored.top) | (drawn.left != stored.left) | (drawn.flip != stored.flip)
    named = zip(of, stored.number.tolist(), strict=True)
    wrong |= np.array(keys) != np.array([view_key(*each) for each in named])
    if wrong.any():
        number = int(wrong.argmax())
        raise AlignmentError(
            "store-misaligned",
            "stored views are not those that images and seed give",
            where=where,
            got=f"{int(wrong.sum())} of {len(keys)} differ, first sample {keys[number]}: "
            + stored[number].describe()[0],
            expected=drawn[number].describe()[0],
            hint="capture again: a student would not see what the teacher saw",
        )
