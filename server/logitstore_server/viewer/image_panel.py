"""What a sample page shows of an image: the picture as the teacher saw it, and the view in words.

A store holds pixels only where thumbnails were kept, one for all views of an image; the picture of
a view is made from it as the view was made from the image.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import numpy as np

from logitstore.record import Record
from logitstore.record.views import Views, apply_view, image_key, views_of
from logitstore.spec.errors import NotFoundError
from logitstore.spec.plan import CorpusInfo
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["picture_data", "png"]

# Views of the same image that the page shows beside the sample's own.
_BESIDE = 16
# Corpora whose samples may be images.
_ARRAYS = ("npy", "npz", "idx")


class Sample(Protocol):
    """The sample of a page."""

    viewed: ViewedStore
    number: int
    record: Record


def picture_data(sample: Sample) -> dict[str, Any] | None:
    """What the page tells of the picture; None where samples are no images."""
    images = sample.viewed.header.images
    if images is None:
        nothing = dict.fromkeys(("size", "view", "made"))
        return {**nothing, "kept": False, "reduced": 1, "views": []} if _arrays(sample) else None
    view = views_of(sample.record, images)
    augmentation = images.augmentation
    return {
        "size": f"{images.width} × {images.height}",
        "view": None if view is None else view.describe()[0],
        "made": None
        if augmentation is None
        else f"{augmentation.name} {augmentation.version}, seed {augmentation.seed}: "
        f"{augmentation.views} views, shifts up to {augmentation.padding} px"
        + (", half of them mirrored" if augmentation.flip else ""),
        "kept": _kept_with(sample) is not None,
        "reduced": images.thumbnail_factor or 1,
        "views": _beside(sample, view),
    }


def png(sample: Sample, *, plain: bool) -> bytes:
    """The sample's picture; `plain`: the image that it is a view of.

    Raises: NotFoundError path-not-found where the store keeps none.
    """
    from PIL import Image

    kept = _kept_with(sample)
    if kept is None:
        raise NotFoundError(
            "path-not-found",
            "the store keeps no picture of this sample",
            where=f"sample {sample.number}",
            hint="capture with --keep-thumbnails",
        )
    images = sample.viewed.header.images
    assert images is not None
    picture_HWC = kept["thumbnail"][0]
    view = views_of(sample.record, images)
    if view is not None and not plain:
        picture_HWC = apply_view(picture_HWC, _reduced(view, images.thumbnail_factor or 1))
    # Two channels have no colours of their own: the first is shown.
    colours = picture_HWC.shape[2]
    picture = picture_HWC if colours > 2 else picture_HWC[:, :, 0]
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "PNG")
    return out.getvalue()


def _reduced(view: Views, factor: int) -> Views:
    """The view in pixels of a thumbnail."""
    if factor == 1:
        return view
    moved = [np.rint((offset - view.padding) / factor) for offset in (view.top, view.left)]
    padding = -(-view.padding // factor)
    top, left = (offsets.astype(np.int64) + padding for offsets in moved)
    return Views(view.number, top, left, view.flip, padding)


def _kept_with(sample: Sample) -> Record | None:
    """The record that carries the thumbnail of a sample's image: its own, or that of view 0."""
    if "thumbnail" not in sample.record:
        return None
    if len(sample.record["thumbnail"]):
        return sample.record
    first = sample.number - int(sample.record["view"][0]) if "view" in sample.record else -1
    if first < 0:
        return None
    record = sample.viewed.sample(first)
    # Where a view was quarantined, numbers are not those of the views.
    same = image_key(record.sample_keys()[0]) == image_key(sample.record.sample_keys()[0])
    return record if same and len(record["thumbnail"]) else None


def _beside(sample: Sample, view: Views | None) -> list[dict[str, Any]]:
    """Number of the sample and of the view, for the first views of the same image."""
    images = sample.viewed.header.images
    if view is None or images is None or images.augmentation is None:
        return []
    image = image_key(sample.record.sample_keys()[0])
    first = sample.number - int(view.number[0])
    found = []
    for number in range(max(first, 0), first + min(images.augmentation.views, _BESIDE)):
        if number >= sample.viewed.store.num_samples:
            break
        record = sample.viewed.sample(number)
        other = views_of(record, images)
        if other is not None and image_key(record.sample_keys()[0]) == image:
            said = other.describe()[0]
            found.append({"sample": number, "view": int(other.number[0]), "text": said})
    return found


def _arrays(sample: Sample) -> bool:
    """Whether samples are rows of arrays, which may be images."""
    corpus = sample.viewed.corpus
    return isinstance(corpus, CorpusInfo) and corpus.format in _ARRAYS
