"""Pillow-compatible resize with torch's uint8 kernels.

Resizing takes two thirds of Pillow's time for a photo. torch's kernels for the same filters on interleaved 8-bit
samples take a tenth of that. Import this module only in processes that decode images, because torch is large.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip.tensors import view_as_tensor
from siglip.torch_internals import RESIZE_BICUBIC, RESIZE_BILINEAR, ResizeOperator

Pixels = NDArray[np.uint8]

MIN_SHRINK = 1.25
"""A side must shrink by at least this factor for torch's kernels."""

_OPERATORS = {int(Image.Resampling.BILINEAR): RESIZE_BILINEAR, int(Image.Resampling.BICUBIC): RESIZE_BICUBIC}

_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""By EXIF orientation, the function that turns pixels upright. Each returns a view."""
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
ORIENTATIONS = tuple(_TURNS)


def resize(
    pixels: Pixels, size: tuple[int, int], resample: int, orientation: int = 1, out: Pixels | None = None
) -> Pixels:
    """Turn RGB pixels, uint8 (H, W, 3), upright and resize them to `size` (width, height): uint8 (height, width, 3).

    The result is in `out` if that is given. It is what Pillow's `transpose` and `resize` give, but the image is turned
    when it is small. About one sample of a hundred differs from Pillow's by one level, and one of a hundred thousand
    by two (in the worst images found, four of ten thousand). Pillow itself is used where torch has no such filter, and
    where a side shrinks by less than `MIN_SHRINK` or grows: such an image is small, and torch's rounding shows more.
    """
    width, height = size
    sideways = orientation in QUARTER_TURNS
    down, across = pixels.shape[1::-1] if sideways else pixels.shape[:2]
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    operator = _OPERATORS.get(resample)
    if operator is None or min(across / width, down / height) < MIN_SHRINK:
        upright = Image.fromarray(np.ascontiguousarray(_TURNS[orientation](pixels)))
        out[:] = np.asarray(upright.resize(size, Image.Resampling(resample)))
        return out
    # Pillow rounds to 8 bits and clips between its two passes, so their order changes the result. On the upright
    # image it resizes the columns first (since 13.0; found by experiment) where that leaves less to do.
    columns_first = down > max(height, 2 * across * height // width - height)
    shape = (width, height) if sideways else (height, width)
    if columns_first != sideways:
        pixels = _shrink(operator, pixels, (shape[0], pixels.shape[1]))
    if orientation == 1:
        return _shrink(operator, pixels, shape, out)
    out[:] = _TURNS[orientation](_shrink(operator, pixels, shape))
    return out


def _shrink(operator: ResizeOperator, pixels: Pixels, shape: tuple[int, int], out: Pixels | None = None) -> Pixels:
    """Resize uint8 pixels (H, W, 3) to `shape` (height, width): first along each row, then along each column.

    Writes to `out`, uint8 (height, width, 3), if it is given, and returns the result.
    """
    out = np.empty((*shape, 3), np.uint8) if out is None else out
    source, target = (view_as_tensor(array).permute(2, 0, 1).unsqueeze(0) for array in (pixels, out))  # (1, 3, H, W)
    operator(source, list(shape), False, out=target)
    return out
