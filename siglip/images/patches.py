"""Images for NaFlex models: patches in the image's own proportions, in an array of one shape for all images.

The reference is transformers' `Siglip2ImageProcessorPil`. An image is resized so that its sides are whole numbers of
patches. As many patches are used as the budget allows, so small images are enlarged.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from siglip.config import PatchBudget

_LEAST_SCALE, _MOST_SCALE, _TOLERANCE = 1e-5 / 10, 100.0, 1e-5
"""Between which scales the reference looks for the largest that fits, and how closely. They decide about the grid."""
_GRID_BYTES = 4


@lru_cache(4096)
def fit_grid(width: int, height: int, patches: PatchBudget) -> tuple[int, int]:
    """Return the rows and columns of patches that an upright image of `width` x `height` pixels is resized to.

    It is the largest scale at which both sides, rounded up to whole patches, fit in the budget. The reference finds it
    by bisection, and this is the same bisection, so that the same rounding gives the same grid. An image of more than
    `count` times 1,000,000 patches may not fit: then the grid has more than `count` patches.
    """

    def count(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patches.size)) for side in (height, width))
        return rows, columns

    low, high = _LEAST_SCALE, _MOST_SCALE
    while high - low >= _TOLERANCE:
        scale = (low + high) / 2
        if math.prod(count(scale)) <= patches.count:
            low = scale
        else:
            high = scale
    return count(low)


def pack_patches(
    pixels: NDArray[np.uint8], patches: PatchBudget, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Cut an upright RGB image, uint8 (H, W, 3), into patches: uint8 (T + 1, 3 * P * P), in `out` if that is given.

    H and W are multiples of the patch's side P, and there are at most T patches, the budget's `count`. Each row is one
    patch, from left to right and from top to bottom, and a patch's samples are in the order of its pixels. Rows without
    a patch are zero. The last row says how many rows and columns of patches there are, each less one, as two
    little-endian uint16; so an array of zeros is valid: an image of one black patch.
    """
    side = patches.size
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    if out is None:
        out = np.empty((patches.count + 1, 3 * side**2), np.uint8)
    count = rows * columns
    cut = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    out[:count].reshape(cut.shape)[:] = cut
    out[count:] = 0
    out[-1, :_GRID_BYTES] = np.array([rows - 1, columns - 1], "<u2").view(np.uint8)
    return out


def read_grids(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the rows and columns of patches of images, uint8 (N, T + 1, 3 * P * P), as int64 (N, 2)."""
    grids = np.ascontiguousarray(images[:, -1, :_GRID_BYTES]).view("<u2")
    return grids.astype(np.int64) + 1


def check_grids(images: NDArray[np.uint8]) -> None:
    """Raise `ValueError` if an image, of uint8 (N, T + 1, 3 * P * P), says that it has more than T patches."""
    if (read_grids(images).prod(axis=1) >= images.shape[1]).any():
        raise ValueError(f"an image has a grid of more than {images.shape[1] - 1} patches")
