"""What a file holds beside its pixels cannot cost the image; limits and memory have reasons of their own."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from siglip.config import ImageSpec, Limits
from siglip.images import decode as images
from siglip.images.decode import ImageRejected, decode_image
from tests.support.image_files import make_chunk, make_tiff
from tests.support.images import encode, make_rgb

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = ImageSpec(size=48)
RGB = make_rgb(84, 60)
PNG = encode(RGB)
LONG = "x" * 3_000_000
ANCILLARY = {
    "a wrong checksum": make_chunk(b"tEXt", b"Comment\0text")[:-1] + b"?",
    "a broken compression": make_chunk(b"zTXt", b"Comment\0\0broken"),
    "an unknown compression": make_chunk(b"zTXt", b"Comment\0\7text"),
    "a compressed text of 3 MB": make_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG.encode())),
    "a colour profile of 3 MB": make_chunk(b"iCCP", b"name\0\0" + zlib.compress(LONG.encode())),
    "a colour profile in an unknown compression": make_chunk(b"iCCP", b"name\0\7text"),
    "a gamma that is too short": make_chunk(b"gAMA", b"\0"),
    "chromaticities that are too short": make_chunk(b"cHRM", b"\0"),
    "a resolution that is too short": make_chunk(b"pHYs", b""),
    "an animation header that is too short": make_chunk(b"acTL", b""),
    "an animation frame out of turn": make_chunk(b"acTL", bytes(7) + b"\2") + make_chunk(b"fcTL", b"\xff" * 26),
    "a chunk that no one defined": make_chunk(b"abCd", bytes(100)),
}


def decode(data: bytes, limits: Limits | None = None) -> np.ndarray:
    return decode_image(data, SPEC, limits or Limits()).pixels


@pytest.mark.parametrize("name", ANCILLARY)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_s_other_chunks_cost_no_image(name: str, behind: bool) -> None:
    place = PNG.rindex(b"IEND") - 4 if behind else 33
    np.testing.assert_array_equal(decode(PNG[:place] + ANCILLARY[name] + PNG[place:]), decode(PNG))


@pytest.mark.parametrize("end", [b"", b"\0\0\0\0IEND", PNG[-12:] + b"behind the end" * 50])
def test_what_follows_a_png_s_pixels_costs_no_image(end: bytes) -> None:
    np.testing.assert_array_equal(decode(PNG[:-12] + end), decode(PNG))


def test_a_png_whose_pixels_or_palette_are_damaged_is_corrupt() -> None:
    palette = encode(RGB.quantize(16), transparency=3)
    for name in (b"IHDR", b"PLTE", b"tRNS"):
        place = palette.index(name) + 4
        damaged = palette[:place] + bytes([palette[place] ^ 1]) + palette[place + 1 :]
        with pytest.raises(ImageRejected, match=f"corrupt: the checksum of the PNG's {name.decode()}"):
            decode(damaged)
    with pytest.raises(ImageRejected, match="corrupt"):
        decode(PNG[:8] + b"<html>" * 10)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_orientation_in_a_long_xmp_packet_counts(compressed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", 'tiff:Orientation="6"' + LONG, zip=compressed)
    decoded = decode_image(encode(RGB, pnginfo=info), SPEC, Limits())
    assert (decoded.width, decoded.height) == (60, 84)


def test_a_tiff_s_other_tags_cost_no_image() -> None:
    pixels = RGB.convert("L").tobytes()
    plain = make_tiff(pixels, RGB.size, [8], 1)
    tags = [(700, 7, b"<<<" * 50), (34675, 7, b"zz" * 50), (34665, 4, [99_999_999]), (34377, 7, b"8BIM" + b"\xff" * 60)]
    np.testing.assert_array_equal(decode(make_tiff(pixels, RGB.size, [8], 1, *tags)), decode(plain))


def test_a_webp_s_broken_metadata_cost_no_image() -> None:
    data = encode(RGB, "WEBP", lossless=True, exif=b"Exif\0\0II*\0" + bytes(20), xmp=b"xmp " * 9)
    plain = decode(encode(RGB, "WEBP", lossless=True))
    place = data.index(b"XMP ")
    longer = data[: place + 4] + struct.pack("<I", 9999) + data[place + 8 :]
    for broken in (data.replace(b"EXIF", b"abcd"), longer, data[:place]):
        np.testing.assert_array_equal(decode(broken), plain)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "AVIF"])
def test_pillow_s_own_limit_does_not_count(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(RGB, format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(data).shape == (48, 48, 3)


def test_pillow_s_own_limit_is_named_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TIFF's, and a WebP's, which has never so many pixels. A decoder process has no such limit."""
    data = encode(RGB, "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageRejected, match=r"too_many_pixels.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        decode(data)


@pytest.mark.parametrize("error", [MemoryError(), OSError("could not allocate memory"), RuntimeError("out of Memory")])
def test_out_of_memory_is_not_corrupt(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(ImageRejected) as rejected:
        decode(PNG)
    assert rejected.value.reason == "out_of_memory"


def test_an_apng_is_its_default_image() -> None:
    turned = RGB.rotate(180)
    for default in (False, True):
        data = encode(RGB, save_all=True, append_images=[turned, RGB], default_image=default)
        np.testing.assert_array_equal(decode(data), decode(PNG))


def test_a_cut_avif_is_truncated() -> None:
    with pytest.raises(ImageRejected, match="truncated"):
        decode(encode(RGB, "AVIF")[:-200])


def test_limits_have_an_upper_end() -> None:
    assert Limits(max_pixels=700_000_000).max_pixels == 700_000_000
    for field in ("max_pixels", "max_bytes"):
        with pytest.raises(ValueError, match=field):
            Limits(**{field: 2**31})


def test_an_open_file_of_pillow_is_read_in_place_of_its_bytes() -> None:
    image = Image.open(io.BytesIO(make_tiff(bytes(range(200)) * 2, (20, 10), [16], 0)))
    assert images.resize_image(image, SPEC).shape == (48, 48, 3)
