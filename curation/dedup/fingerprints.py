"""Fingerprints of thumbnails, which confirm that two images with close embeddings are copies.

An image is compared with another one whole, and with windows of it, because a copy may be cropped. A window has a
perceptual hash and coarse colours. The hash has a bit for each of 16 x 16 steps from left to right in a picture of 17 x
16 grey pixels: whether it becomes brighter (Krawetz, "Kind of like that", 2013). The colours are the means of 6 x 6
areas.

Measured on 250 rendered photos: JPEG at quality 40, half the size, 5 % cropped away and a watermark differ from their
original by at most 0.12 of the bits and 9 levels (root mean square over the areas), different photos by at least 41
levels.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from siglip.config import count_cores

HASH_SIDE, COLOR_SIDE = 16, 6
WINDOWS = (
    (0.0, 0.0, 1.0),
    *((x, y, 0.95) for x in (0.0, 0.025, 0.05) for y in (0.0, 0.025, 0.05)),
    *((x, y, 0.9) for x in (0.0, 0.05, 0.1) for y in (0.0, 0.05, 0.1)),
)
"""The windows, as left and top edge and side, in shares of the image. The first is the whole image."""
MOST_BITS, MOST_LEVELS = 0.12, 12.0
"""Two images are copies if they differ by at most so many of the bits and levels, one of them in one of its windows."""

FINGERPRINT = np.dtype(
    [
        ("bits", np.uint8, (len(WINDOWS), HASH_SIDE * HASH_SIDE // 8)),
        ("colors", np.uint8, (len(WINDOWS), 3 * COLOR_SIDE**2)),
    ]
)
"""The fingerprint of an image: for each window its hash and its colours. It has 2.7 kB."""


class Difference(NamedTuple):
    """How much images differ from one: shares of the bits and root mean square levels, float32 (N,) each."""

    bits: NDArray[np.float32]
    levels: NDArray[np.float32]

    def are_copies(self) -> NDArray[np.bool_]:
        """Tell which of the images are copies, bool (N,)."""
        return (self.bits <= MOST_BITS) & (self.levels <= MOST_LEVELS)


def take_fingerprints(thumbnails: list[bytes]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """Return the fingerprints of thumbnails, `FINGERPRINT` (N,), and which of them could be decoded, bool (N,)."""
    found = np.zeros(len(thumbnails), FINGERPRINT)
    readable = np.zeros(len(thumbnails), np.bool_)

    def take(place: int) -> None:
        try:
            with Image.open(io.BytesIO(thumbnails[place])) as image:
                found[place] = _take_fingerprint(image.convert("RGB"))
            readable[place] = True
        except (OSError, UnidentifiedImageError, ValueError):
            pass  # it is never a copy of another image

    with ThreadPoolExecutor(count_cores()) as pool:
        list(pool.map(take, range(len(thumbnails))))
    return found, readable


def _take_fingerprint(image: Image.Image) -> NDArray[np.void]:
    grey = image.convert("L")
    width, height = image.size
    found = np.zeros((), FINGERPRINT)
    for number, (left, top, side) in enumerate(WINDOWS):
        box = (left * width, top * height, (left + side) * width, (top + side) * height)
        steps = np.asarray(grey.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BILINEAR, box), np.int16)
        found["bits"][number] = np.packbits(steps[:, 1:] > steps[:, :-1])
        colors = np.asarray(image.resize((COLOR_SIDE, COLOR_SIDE), Image.Resampling.BOX, box))
        found["colors"][number] = colors.reshape(-1)
    return found


def compare_fingerprints(one: NDArray[np.void], others: NDArray[np.void]) -> Difference:
    """Compare a fingerprint, `FINGERPRINT` (), with others, (N,): each with the windows whose colours differ least."""
    first = _compare_windows(one["bits"][None], one["colors"][None], others["bits"][:, :1], others["colors"][:, :1])
    second = _compare_windows(others["bits"], others["colors"], one["bits"][None, :1], one["colors"][None, :1])
    better = first.levels <= second.levels
    return Difference(np.where(better, first.bits, second.bits), np.where(better, first.levels, second.levels))


def _compare_windows(
    bits: NDArray[np.uint8], colors: NDArray[np.uint8], whole: NDArray[np.uint8], whole_colors: NDArray[np.uint8]
) -> Difference:
    """Compare windows, (N or 1, W, ...), with whole images, (N or 1, 1, ...)."""
    levels = np.sqrt(np.mean(np.square(colors.astype(np.float32) - whole_colors.astype(np.float32)), axis=2))
    best = levels.argmin(axis=1)
    differing = np.bitwise_count(bits ^ whole).sum(axis=2) / np.float32(HASH_SIDE * HASH_SIDE)
    rows = np.arange(len(best))
    return Difference(differing[rows, best].astype(np.float32), levels[rows, best])
