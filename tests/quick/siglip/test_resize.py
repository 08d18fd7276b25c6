"""Resizing by torch's kernels compared with Pillow's, for many sizes and kinds of images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from siglip.images.resize import ORIENTATIONS, resize
from tests.support.images import make_rgb

BILINEAR, BICUBIC, LANCZOS = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
sides = st.one_of(st.integers(1, 40), st.integers(1, 900))


def difference(image: Image.Image, size: tuple[int, int], resample: int) -> NDArray[np.int_]:
    ours = resize(np.asarray(image), size, resample)
    assert ours.shape == (size[1], size[0], 3)
    assert ours.dtype == np.uint8
    return np.asarray(np.abs(ours.astype(int) - np.asarray(image.resize(size, Image.Resampling(resample))).astype(int)))


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.sampled_from([16, 64, 224]), st.sampled_from([BILINEAR, BICUBIC, LANCZOS]), st.integers(0, 99))
def test_results_equal_pillow_s_except_for_rounding(w: int, h: int, size: int, resample: int, seed: int) -> None:
    found = difference(make_rgb(w, h, seed), (size, size), resample)
    assert found.max() <= 2
    assert (found > 0).mean() < 0.15
    assert (found > 1).sum() <= 1 + 5e-4 * found.size


@settings(max_examples=80, deadline=None)
@given(sides, sides, st.sampled_from([16, 64, 224]), st.sampled_from([BILINEAR, BICUBIC]), st.integers(0, 99))
def test_results_for_black_and_white_noise(w: int, h: int, size: int, resample: int, seed: int) -> None:
    """The worst case: every pass clips values outside 8 bits, so the order of the passes changes the result."""
    noise = np.random.default_rng(seed).integers(0, 2, (h, w, 3), np.uint8) * 255
    found = difference(Image.fromarray(noise), (size, size), resample)
    assert found.max() <= 2
    assert (found > 1).sum() <= 2 + 3e-4 * found.size


@pytest.mark.parametrize("ratio", [1.1, 1.3, 1.5, 1.9, 2.5, 4.0])
@pytest.mark.parametrize("across", [70, 96, 128, 192, 256])
def test_the_order_of_the_passes_is_that_of_pillow(across: int, ratio: float) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (int(across * ratio), across, 3), np.uint8) * 255
    assert difference(Image.fromarray(noise), (64, 64), BICUBIC).max() <= 2


def test_results_that_are_not_square() -> None:
    for size in ((100, 37), (37, 100), (120, 90), (1, 1)):
        assert difference(make_rgb(120, 90), size, BICUBIC).max() <= 2


@settings(max_examples=120, deadline=None)
@given(sides, sides, st.just((64, 64)), st.sampled_from(ORIENTATIONS), st.booleans())
def test_turning_after_resizing_equals_turning_before(
    w: int, h: int, size: tuple[int, int], orientation: int, noise: bool
) -> None:
    image = make_rgb(w, h)
    if noise:
        image = Image.fromarray(np.random.default_rng(w).integers(0, 2, (h, w, 3), np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    upright = ImageOps.exif_transpose(image)
    ours = resize(np.asarray(image), size, BICUBIC, orientation).astype(int)
    found = np.abs(ours - np.asarray(upright.resize(size, BICUBIC)))
    assert found.max() <= 2
    assert (found > 1).sum() <= 2 + 3e-4 * found.size
