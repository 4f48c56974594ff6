"""The pictures that the teacher saw, from a user's own images and the views that a store keeps.

Letters: B samples, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.record.views import Views, apply_views, image_key, sources_of
from logitstore.spec.errors import NotFoundError, UsageError

__all__ = ["ImageSource", "replay"]

Pictures = TypeVar("Pictures", NDArray[Any], Tensor)


class ImageSource(Protocol):
    """Finds images by sample keys; `logitstore.corpora.ArrayFiles` does."""

    def of(self, sample_keys: Sequence[str]) -> NDArray[Any]:
        """The images that samples were made from, [B, H, W] or [B, H, W, C]."""
        ...


def replay(
    images: ImageSource | Mapping[str, Any] | NDArray[Any] | Tensor,
    sample_keys: Sequence[str],
    view: Views | None,
) -> Any:
    """What the teacher saw of each sample of a batch: bit for bit, in the images' own type.

    Args:
        images: the corpus: `ArrayFiles`; or its array, numpy or torch on any device, [N, H, W] or
            [N, H, W, C]; or, for a corpus of several files, their arrays by file name.
        sample_keys, view: of the batch. Without views the images are returned as they are.

    Returns: [B, H, W] or [B, H, W, C], an array or a tensor as `images` is.

    Raises: NotFoundError sample-out-of-range for a key of no such image; UsageError bad-argument
    for images of another shape.
    """
    if isinstance(images, np.ndarray | Tensor | Mapping):
        chosen = _chosen(images, sample_keys)
    else:
        chosen = images.of(sample_keys)
    if view is None:
        return chosen
    return _apply_torch(chosen, view) if isinstance(chosen, Tensor) else apply_views(chosen, view)


def _chosen(images: Mapping[str, Any] | NDArray[Any] | Tensor, keys: Sequence[str]) -> Any:
    places = [_place(key) for key in keys]
    names = {name for name, _ in places}
    if not isinstance(images, Mapping):
        if len(names) > 1:
            raise UsageError(
                "bad-argument",
                "samples of several files cannot come from one array",
                where="replay",
                got=", ".join(sorted(names)[:4]),
                expected="a dict of arrays by file name, or ArrayFiles",
            )
        images = dict.fromkeys(names, images)
    for (name, row), key in zip(places, keys, strict=True):
        if name not in images or row >= len(images[name]):
            raise NotFoundError(
                "sample-out-of-range",
                "no such image among those given",
                where="replay",
                got=key,
                expected=", ".join(f"{n} of {len(a)} images" for n, a in images.items()),
            )
    if len(names) == 1:
        return images[names.pop()][[row for _, row in places]]
    rows = [images[name][row] for name, row in places]
    return torch.stack(rows) if isinstance(rows[0], Tensor) else np.stack(rows)


def _place(sample_key: str) -> tuple[str, int]:
    """File name and row of a sample's image."""
    name, _, row = (image_key(sample_key) or sample_key).rpartition("#")
    if not row.isdecimal():
        name, _, row = sample_key.rpartition("#")
    if not row.isdecimal():
        raise NotFoundError(
            "sample-out-of-range",
            "this sample was not made from a row of an array",
            where="replay",
            got=sample_key,
            expected="<file>#<row> or <file>#<row>@<view>",
        )
    return name, int(row)


def _apply_torch(images_BHWC: Tensor, view: Views) -> Tensor:
    rows, columns, inside = (
        torch.from_numpy(places).to(images_BHWC.device)
        for places in sources_of(view, images_BHWC.shape)
    )
    at = torch.arange(len(view), device=images_BHWC.device)[:, None, None]
    out = images_BHWC[at, rows, columns]
    out[~inside] = 0
    return out
