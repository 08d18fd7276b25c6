"""Fingerprints of thumbnails, which confirm that two images with close embeddings are copies.

An image is compared with another one whole, and with windows of it, because a copy may be cropped. A window has a
perceptual hash and coarse colours. The hash has a bit for each of 16 x 16 steps from left to right in a picture of 17 x
16 grey pixels: whether it becomes brighter (Krawetz, "Kind of like that", 2013). The colours are the means of 6 x 6
areas.

Both are coarse: on a plain ground, two figures of one colour differ in few bits and areas. So images that agree in them
are compared once more, in small pictures: what differs is set against the contrast of the pictures, and not against a
whole range of levels. And the ratio of their sides must be nearly the same.

Measured on 250 rendered photos: JPEG at quality 40, half the size, 5 % cropped away and a watermark differ from their
original by at most 0.12 of the bits and 9 levels (root mean square over the areas), different photos by at least 41
levels. Of 40 photos, flat figures and pages each, those copies have a residual of at most 0.07, but for watermarks on
flat figures (one in ten over 0.08) and cropped pages (one in twenty). Different figures of one kind and colour on a
plain ground, of which the first comparison had taken six for copies, have 0.07 to 0.45.
"""

from __future__ import annotations

import io
import math
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
PIXEL_SIDE, COMPARED_SIDE = 32, 24
"""Sides of the small picture of an image, and of the pictures that are made of it to compare windows."""
MOST_RESIDUAL = 0.08
"""The most that copies differ in these, as a share: the mean square of the difference, of the geometric mean of the two
variances. A tint or another exposure is a part of the difference."""
MOST_ASPECT = 1.13
"""The most by which the ratios of the sides of copies differ: a tenth is cropped away along one side, and rounding."""

FINGERPRINT = np.dtype(
    [
        ("bits", np.uint8, (len(WINDOWS), HASH_SIDE * HASH_SIDE // 8)),
        ("colors", np.uint8, (len(WINDOWS), 3 * COLOR_SIDE**2)),
        ("pixels", np.uint8, (PIXEL_SIDE, PIXEL_SIDE, 3)),
        ("aspect", np.float32),
    ]
)
"""The fingerprint of an image: for each window its hash and its colours, a small picture, and the ratio of width and
height. It has 5.8 kB."""


class Difference(NamedTuple):
    """How much images differ from one: shares of the bits, root mean square levels, and residuals, float32 (N,) each.

    The residual is infinite for images that the other two, or the ratios of the sides, tell apart.
    """

    bits: NDArray[np.float32]
    levels: NDArray[np.float32]
    residual: NDArray[np.float32]

    def are_copies(self) -> NDArray[np.bool_]:
        """Tell which of the images are copies, bool (N,)."""
        return self.residual <= MOST_RESIDUAL


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
    found["pixels"] = np.asarray(image.resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BILINEAR))
    found["aspect"] = width / height
    return found


def compare_fingerprints(one: NDArray[np.void], others: NDArray[np.void]) -> Difference:
    """Compare a fingerprint, `FINGERPRINT` (), with others, (N,): each with the windows whose colours differ least."""
    first = _compare_windows(one["bits"][None], one["colors"][None], others["bits"][:, :1], others["colors"][:, :1])
    second = _compare_windows(others["bits"], others["colors"], one["bits"][None, :1], one["colors"][None, :1])
    better = first.levels <= second.levels
    bits, levels = np.where(better, first.bits, second.bits), np.where(better, first.levels, second.levels)
    ratio = others["aspect"] / one["aspect"]
    alike = (bits <= MOST_BITS) & (levels <= MOST_LEVELS) & (np.maximum(ratio, 1 / ratio) <= MOST_ASPECT)
    residual = np.full(len(others), np.inf, np.float32)
    for place in np.flatnonzero(alike).tolist():
        pixels, other = one["pixels"], others["pixels"][place]
        residual[place] = min(_find_residual(pixels, other), _find_residual(other, pixels))
    return Difference(bits, levels, residual)


def _find_residual(whole: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> float:
    """Return how much a small picture differs from that window of another one from which it differs least."""
    side = (COMPARED_SIDE, COMPARED_SIDE)
    first = np.asarray(Image.fromarray(whole).resize(side, Image.Resampling.BILINEAR), np.float32)
    variance = _find_variance(first)
    other, lowest = Image.fromarray(pixels), np.inf
    for left, top, share in WINDOWS:
        box = (PIXEL_SIDE * left, PIXEL_SIDE * top, PIXEL_SIDE * (left + share), PIXEL_SIDE * (top + share))
        window = np.asarray(other.resize(side, Image.Resampling.BILINEAR, box), np.float32)
        # In pictures of one colour there is no contrast, and differences of less than a level are noise.
        contrast = max(1.0, math.sqrt(variance * _find_variance(window)))
        lowest = min(lowest, float(np.square(first - window).mean()) / contrast)
    return lowest


def _find_variance(pixels: NDArray[np.float32]) -> float:
    return float(np.square(pixels - pixels.mean(axis=(0, 1))).mean())


class _Windows(NamedTuple):
    """What `Difference` has for the windows whose colours differ least."""

    bits: NDArray[np.float32]
    levels: NDArray[np.float32]


def _compare_windows(
    bits: NDArray[np.uint8], colors: NDArray[np.uint8], whole: NDArray[np.uint8], whole_colors: NDArray[np.uint8]
) -> _Windows:
    """Compare windows, (N or 1, W, ...), with whole images, (N or 1, 1, ...)."""
    levels = np.sqrt(np.mean(np.square(colors.astype(np.float32) - whole_colors.astype(np.float32)), axis=2))
    best = levels.argmin(axis=1)
    differing = np.bitwise_count(bits ^ whole).sum(axis=2) / np.float32(HASH_SIDE * HASH_SIDE)
    rows = np.arange(len(best))
    return _Windows(differing[rows, best].astype(np.float32), levels[rows, best])
