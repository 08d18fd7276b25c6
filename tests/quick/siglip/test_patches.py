"""Patches for NaFlex models: the grid and the order of transformers, and what a decoder process may say about them."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.siglip2 import image_processing_pil_siglip2 as reference

from siglip.config import ImageSpec, Limits, PatchBudget
from siglip.images import decode as images
from siglip.images.decode import Decoded, ImageRejected, decode_image, resize_image
from siglip.images.decoder import Decoder
from siglip.images.opening import open_image
from siglip.images.patches import check_grids, fit_grid, pack_patches, read_grids
from siglip.images.protocol import ProtocolError, SlotResult
from tests.support.images import assert_nearly_same, awkward_cases, encode, make_rgb, plain_cases

BUDGET = PatchBudget(size=16, count=256)
SPEC = ImageSpec(patches=BUDGET, resample=2)


@pytest.mark.parametrize("budget", [BUDGET, PatchBudget(size=16, count=1024), PatchBudget(size=14, count=100)], ids=str)
def test_every_size_has_the_grid_of_transformers(budget: PatchBudget) -> None:
    rng = random.Random(0)
    sizes = [(1, 1), (1, 3000), (3000, 1), (1, 64_000_000), (64_000_000, 1), (8000, 8000), (65535, 900), (2200, 1700)]
    sizes += [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(300)]
    sizes += [(round(math.exp(rng.uniform(0, 9))), round(math.exp(rng.uniform(0, 9)))) for _ in range(700)]
    for width, height in sizes:
        down, across = reference.get_image_size_for_max_num_patches(height, width, budget.size, budget.count)
        grid = fit_grid(width, height, budget)
        assert grid == (down // budget.size, across // budget.size), (width, height)
        assert math.prod(grid) <= budget.count


def test_a_page_of_a4_at_200_dots_per_inch_is_smaller_than_many_expect() -> None:
    """A page of 2200 x 1700 becomes 288 x 224 pixels with 256 patches, which surprised people (big_vision#168)."""
    assert fit_grid(1700, 2200, BUDGET) == (18, 14)
    assert fit_grid(1700, 2200, PatchBudget(size=16, count=1024)) == (36, 28)


def test_patches_are_in_the_order_of_transformers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5 * 16, 7 * 16, 3), np.uint8)
    packed = pack_patches(pixels, BUDGET)
    expected = reference.convert_image_to_patches(np.moveaxis(pixels, -1, 0), 16)
    np.testing.assert_array_equal(packed[:35], expected)
    assert not packed[35:-1].any()
    assert read_grids(packed[None]).tolist() == [[5, 7]]
    check_grids(packed[None])
    used = np.full((257, 768), 255, np.uint8)
    assert pack_patches(pixels, BUDGET, used) is used
    np.testing.assert_array_equal(used, packed)  # nothing of an earlier image stays


def test_an_array_of_zeros_is_an_image_of_one_patch() -> None:
    zeros = np.zeros((2, *SPEC.shape), np.uint8)
    assert read_grids(zeros).tolist() == [[1, 1], [1, 1]]
    check_grids(zeros)


def unpack(pixels: np.ndarray) -> np.ndarray:
    """The image that an array holds, uint8 (H, W, 3)."""
    [[rows, columns]] = read_grids(pixels[None]).tolist()
    patches = pixels[: rows * columns].reshape(rows, columns, 16, 16, 3)
    return patches.swapaxes(1, 2).reshape(rows * 16, columns * 16, 3)


def cases() -> list[Any]:
    return [pytest.param(data, image, id=name) for name, data, image in [*plain_cases(), *awkward_cases()]]


@pytest.mark.parametrize(("data", "image"), cases())
def test_images_are_decoded_as_for_other_models(data: bytes, image: Image.Image) -> None:
    decoded = decode_image(data, SPEC, Limits())
    assert (decoded.width, decoded.height) == image.size
    rows, columns = fit_grid(*image.size, BUDGET)
    assert_nearly_same(unpack(decoded.pixels), np.asarray(image.resize((columns * 16, rows * 16), 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_grid_is_that_of_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(make_rgb(900, 300), "JPEG", quality=95, exif=exif.tobytes())
    decoded = decode_image(data, SPEC, Limits(), "auto")
    wide = orientation < 5
    assert read_grids(decoded.pixels[None]).tolist() == [[9, 27] if wide else [27, 9]]
    held = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(resize_image(held, SPEC), decode_image(data, SPEC, Limits()).pixels)


def test_libjpeg_shrinks_to_no_less_than_four_times_each_side() -> None:
    """A long image is small at one side. Both sides count, and the thumbnail."""
    for size, seen, expected in (
        ((4000, 3000), (288, 224), 2),
        ((3000, 4000), (224, 288), 2),
        ((9000, 512), (1024, 64), 2),
        ((9000, 500), (1024, 64), 1),
        ((1000, 1000), (256, 256), 1),
    ):
        opened = open_image(encode(make_rgb(*size), "JPEG"), 10**8)
        assert images._choose_shrink(opened, "auto", seen, 0) == expected


def test_an_image_that_is_too_long_for_its_patches_is_rejected() -> None:
    """The reference does not find a scale for it, and gives more patches than there is room for."""
    few = ImageSpec(patches=PatchBudget(size=2, count=4), resample=2)
    with pytest.raises(ImageRejected, match="is too long for 4 patches") as rejected:
        images._choose_size(50_000_000, 1, few)
    assert rejected.value.reason == "unsupported"


def test_a_decoder_process_gives_the_same_array() -> None:
    data = [encode(make_rgb(*size, seed), "JPEG") for seed, size in enumerate([(640, 480), (30, 900), (1, 1)])]
    decoder = Decoder(SPEC, Limits(max_seconds=300), thumbnail=32)
    try:
        outcomes = decoder.decode([*data, b"no image", *data])
    finally:
        decoder.close()
    for image, outcome in zip([*data, b"", *data], outcomes, strict=True):
        if image:
            assert isinstance(outcome, Decoded)
            np.testing.assert_array_equal(outcome.pixels, decode_image(image, SPEC, Limits()).pixels)
        else:
            assert isinstance(outcome, ImageRejected)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((640, 480), [99, 99]), ((640, 480), [17, 13]), ((640, 480), [0, 0]), ((9, 9), [13, 17])],
    ids=str,
)
def test_a_decoder_that_sends_another_grid_is_not_believed(size: tuple[int, int], grid: list[int]) -> None:
    """A hostile image may have taken the decoder over. Its grid must not spoil the images of other requests."""
    decoder = Decoder(SPEC, Limits())
    decoder._memory = np.zeros(decoder._layout.bytes, np.uint8)
    pixels, _ = decoder._layout.slot(decoder._memory, 0)
    pixels[-1, :4] = [13, 0, 17, 0]
    assert decoder._copy(0, SlotResult(640, 480, 0, 0.0), None).pixels.shape == SPEC.shape
    pixels[-1, :4] = [grid[0], 0, grid[1], 0]
    with pytest.raises(ProtocolError, match="another grid than an image of"):
        decoder._copy(0, SlotResult(*size, 0, 0.0), None)


@pytest.mark.parametrize(
    "values", [{}, {"size": 64, "patches": BUDGET}, {"patches": {"size": 16, "count": 3}}], ids=str
)
def test_a_spec_is_of_one_kind(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"either size or patches|greater than or equal to 4"):
        ImageSpec.model_validate(values)
