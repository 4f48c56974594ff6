"""What a header says of samples that are images: their size, and how views of them are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from logitstore.spec.document import Strict

__all__ = ["IMAGES_FEATURE", "Augmentation", "Images"]

# Readers that do not know it would take views of one image for samples of their own.
IMAGES_FEATURE = "images"

Pixels = Annotated[int, Field(ge=1, le=1 << 16)]


class Augmentation(Strict):
    """How the views of an image differ: shifted inside a border of zeros, and mirrored.

    Attributes:
        name, version: of the rules by which random bits become a view and a view moves pixels.
        seed: of the counter-based random function.
        views: of each image, numbered from 0; number 0 is the image as it is.
        padding: pixels of the border, of which as many are cut off again: a view is shifted by
            -padding to padding pixels on each axis.
        flip: whether half of the other views are mirrored left to right.
    """

    name: Literal["crop-flip"] = "crop-flip"
    version: Literal[1] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    views: Annotated[int, Field(ge=1, le=1 << 16)]
    padding: Annotated[int, Field(ge=0, lt=1 << 15)]
    flip: bool


class Images(Strict):
    """Samples are images, or views of images.

    Attributes:
        height, width: of an image, pixels.
        channels: values of a pixel; None: one, without an axis of its own.
        thumbnail_factor: stored thumbnails are means of blocks of so many by so many pixels; None:
            the store keeps no thumbnails.
        augmentation: how views are made; None: every sample is an image as it is.
    """

    height: Pixels
    width: Pixels
    channels: Annotated[int, Field(ge=1, le=4)] | None = None
    thumbnail_factor: Annotated[int, Field(ge=1, le=1 << 12)] | None = None
    augmentation: Augmentation | None = None

    @property
    def thumbnail_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of the column `thumbnail`, None when there is none."""
        factor = self.thumbnail_factor
        if factor is None:
            return None
        return -(-self.height // factor), -(-self.width // factor), self.channels or 1
