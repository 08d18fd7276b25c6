"""Pillow's resize by a faster hand.

Resizing is two thirds of what Pillow takes for a photo. torch has a kernel for the same filters on 8-bit samples in the
order in which they lie, which takes a tenth of that. Imported where images are decoded, in a process of its own, and
nowhere else: torch is large.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

LEAST_RATIO = 1.25
_FILTERS = {
    int(Image.Resampling.BILINEAR): torch.ops.aten._upsample_bilinear2d_aa.out,
    int(Image.Resampling.BICUBIC): torch.ops.aten._upsample_bicubic2d_aa.out,
}
"""The operators behind `torch.nn.functional.interpolate`, which puts colours into planes of their own: that, and
putting them back together, takes as long as the resize itself."""


def resize(
    image: Image.Image, size: tuple[int, int], resample: int, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """An RGB image resized to `size` (width, height), as `Image.resize` gives it: uint8 (height, width, 3).

    In `out`, if that is given. Samples differ from Pillow's by one level in about one of a hundred, and by two in one
    of a hundred thousand (in images of nothing but black and white noise, one of ten thousand). Where torch has no such
    filter, and where a side shrinks by less than a fifth or grows, it is Pillow itself: such an image is small, and
    torch's rounding shows more in it.
    """
    width, height = size
    across, down = image.size
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    shrink = _FILTERS.get(resample)
    if shrink is None or min(across / width, down / height) < LEAST_RATIO:
        out[:] = np.asarray(image.resize(size, Image.Resampling(resample)))
        return out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an image's memory may not be written to, which nobody does
        pixels = _to_tensor(np.asarray(image))
    # Between its two passes Pillow rounds to 8 bits and cuts off what is outside of them, so their order shows. It
    # takes the columns first (since 13.0; found by trying) where that leaves less to do.
    if down > max(height, 2 * across * height // width - height):
        columns = _to_tensor(np.empty((height, across, 3), np.uint8))
        pixels = shrink(pixels, [height, across], False, out=columns)
    shrink(pixels, [height, width], False, out=_to_tensor(out))
    return out


def _to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 (H, W, 3) as (1, 3, H, W), in the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
