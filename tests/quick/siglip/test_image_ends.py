"""Files with bytes that were never written or that changed, frames that do not cover the screen, and names of kinds.

A download that breaks off can leave a file of its full size that ends in zeros.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.config import JobConfig
from siglip.config import ImageSpec, Limits
from siglip.images.decode import ImageRejected, decode_image, resize_image
from siglip.images.opening import readable_suffixes
from tests.support.image_files import make_bmp, make_chunk, make_tiff, pack_rows, pad_rows
from tests.support.images import encode, make_rgb

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = ImageSpec(size=48)
RGB = make_rgb(320, 240)
LARGE = {
    "WEBP": encode(RGB, "WEBP", quality=95),
    "WEBP lossless": encode(RGB, "WEBP", lossless=True),
    "WEBP animated": encode(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)], quality=95),
    "AVIF": encode(RGB, "AVIF", quality=90),
    "PNG": encode(RGB),
    "GIF": encode(RGB.quantize(64), "GIF"),
    "JPEG": encode(RGB, "JPEG", quality=95),
}


def decode(data: bytes) -> np.ndarray:
    return decode_image(data, SPEC, Limits()).pixels


def reject(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageRejected) as rejected:
        decode(data)
    assert "\n" not in rejected.value.detail
    return rejected.value.reason, rejected.value.detail


def assert_shows(data: bytes, truth: Image.Image) -> None:
    expected = np.asarray(truth.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(data) - expected).mean() < 1


def encode_heic(image: Image.Image, **options: Any) -> bytes:
    assert "heic" in readable_suffixes()
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)
    return encode(image, "HEIF", **options)


@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_png_with_changed_pixels_is_corrupt(level: int, mode: str) -> None:
    image = RGB.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(image, compress_level=level)
    first, last = data.index(b"IDAT") + 8, len(data) - 20
    rng = random.Random(0)
    for place in [first, last, *(rng.randrange(first, last) for _ in range(20))]:
        assert reject(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])[0] == "corrupt"
        assert reject(data[:place] + b"\xff" * (len(data) - place))[0] == "corrupt", "Pillow shows black rows"
        moved = data[:place] + data[100 : 100 + min(500, last - place)] + data[place + min(500, last - place) :]
        assert moved == data or reject(moved)[0] == "corrupt"


def test_a_png_with_a_wrong_checksum_of_its_compressed_pixels_is_corrupt() -> None:
    """The chunk's own checksum is right. Black rows are those that Pillow leaves when it gives up."""
    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", 84, 60, 8, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(make_rgb(84, 60)))
    for pixels in (rows, bytes(len(rows))):
        packed = zlib.compress(pixels)
        for broken in (packed[:-4] + b"abcd", packed[: len(packed) // 2] + b"\xff" * 50):
            chunks = header + make_chunk(b"IDAT", broken) + make_chunk(b"IEND", b"")
            assert reject(b"\x89PNG\r\n\x1a\n" + chunks)[0] in ("corrupt", "truncated")


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_a_file_that_ends_in_zeros_that_were_never_written_is_truncated(name: str, part: float) -> None:
    data = LARGE[name]
    cut = int(len(data) * part * (0.5 if name == "WEBP animated" else 1))
    assert reject(data[:cut] + bytes(len(data) - cut))[0] == "truncated"
    decode(data + bytes(3000))


def test_a_heic_that_ends_in_zeros_is_truncated_and_one_with_a_hole_corrupt() -> None:
    data = encode_heic(RGB, quality=90)
    assert_shows(data, RGB)
    cut = len(data) // 2
    assert reject(data[:cut] + bytes(len(data) - cut))[0] == "truncated"
    assert reject(data[:cut] + bytes(600) + data[cut + 600 :]) == ("corrupt", "zeros in the coded pixels")


def make_flat_end(texture: str, part: float, color: int) -> Image.Image:
    """An image of which the last rows, a part of all of them, have one colour."""
    pixels = np.full((240, 320, 3), color, np.uint8)
    rows = round(240 * (1 - part))
    rng = np.random.default_rng(0)
    kinds = {
        "noise": rng.integers(0, 256, (240, 320, 3)),
        "ramp": np.tile(np.linspace(0, 255, 320)[:, None], (240, 1, 3)),
        "checks": (np.add.outer(np.arange(240) // 3, np.arange(320) // 5) % 2 * 255)[:, :, None],
    }
    pixels[:rows] = kinds[texture][:rows]
    return Image.fromarray(pixels)


def test_whole_files_that_end_in_zeros_or_in_one_color_are_tagged() -> None:
    """Encoders of WebP write thousands of zeros for one colour, up to nearly all of a file."""
    zeros = 0
    for texture in ("noise", "ramp", "checks"):
        for part in (0.02, 0.5, 0.95, 1):
            image = make_flat_end(texture, part, 128 if texture == "ramp" else 0)
            for options in (
                {"lossless": True, "method": 0, "quality": 0},
                {"quality": 1, "method": 0},
                {"quality": 99},
            ):
                data = encode(image, "WEBP", **options)
                zeros += data.endswith(bytes(128))
                decode(data)
            decode(encode(image, "AVIF", speed=10))
    assert zeros > 5


@pytest.mark.parametrize("compression", [8, 32946])
@pytest.mark.parametrize("order", [1, 2])
def test_a_deflated_tiff_with_a_wrong_checksum_is_corrupt(compression: int, order: int) -> None:
    reverse = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
    packed = zlib.compress(np.asarray(RGB).tobytes())
    size, tag = RGB.size, (266, 3, [order])
    for broken in (packed, packed[:-4] + b"abcd", packed[:50_000] + bytes(4096) + packed[54_096:]):
        written = broken.translate(reverse) if order == 2 else broken
        data = make_tiff(written, size, [8] * 3, 2, tag, compression=compression)
        if broken == packed:
            assert_shows(data, RGB)
        else:
            assert reject(data)[0] == "corrupt"


def test_a_tiff_in_a_compression_that_reads_any_bytes_with_a_strip_that_was_never_written() -> None:
    packed = b"\0\x80" * 84 * 60
    assert reject(make_tiff(packed, (84, 60), [8], 1, (273, 4, [0]), compression=32773))[0] == "unsupported"
    assert reject(make_tiff(packed, (84, 60), [8], 1, (278, 3, [30]), compression=32773))[0] == "truncated"
    assert reject(make_tiff(packed, (84, 60), [8], 1, compression=50001)) == ("unsupported", "TIFF in WebP compression")


@pytest.mark.parametrize("place", [(10, 5), (0, 0), (44, 30)])
def test_a_gif_whose_first_frame_does_not_cover_the_screen(place: tuple[int, int]) -> None:
    frame = make_rgb(40, 30).quantize(16)
    data = encode(frame, "GIF")
    start = data.index(b",\0\0\0\0" + struct.pack("<HH", 40, 30))
    data = data[:6] + struct.pack("<HH", 84, 60) + data[10:11] + b"\3" + data[12:]  # background: colour 3
    data = data[: start + 1] + struct.pack("<HH", *place) + data[start + 5 :]
    truth = Image.new("RGB", (84, 60), "white")
    truth.paste(frame.convert("RGB"), place)
    assert_shows(data, truth)
    np.testing.assert_array_equal(resize_image(Image.open(io.BytesIO(data)), SPEC), decode(data))


@pytest.mark.parametrize("flags", [0x02, 0x12], ids=["opaque", "alpha"])
def test_a_webp_whose_first_frame_does_not_cover_the_screen(flags: int) -> None:
    def make(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def numbers(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    pixels = encode(make_rgb(40, 30), "WEBP", lossless=True)[12:]
    screen = make(b"VP8X", bytes([flags, 0, 0, 0]) + numbers(83, 59))
    animation = make(b"ANIM", b"\x10\x20\x30\xff\0\0")
    body = b"WEBP" + screen + animation + make(b"ANMF", numbers(5, 2, 39, 29, 100) + b"\2" + pixels)
    truth = Image.new("RGB", (84, 60), "white")
    truth.paste(make_rgb(40, 30), (10, 4))
    assert_shows(b"RIFF" + struct.pack("<I", len(body)) + body, truth)


def set_brands(data: bytes, *brands: bytes) -> bytes:
    size = int.from_bytes(data[:4], "big")
    return data[:8] + brands[0] + data[12:16] + (b"".join(brands[1:]) * 9)[: size - 16] + data[size:]


def test_avif_and_heic_are_told_apart_by_their_items() -> None:
    avif, heic = encode(make_rgb(64, 48), "AVIF"), encode_heic(make_rgb(64, 48))
    for brands in ((b"mif1", b"miaf"), (b"avio", b"mif1"), (b"miaf", b"MA1B"), (b"heic", b"mif1")):
        np.testing.assert_array_equal(decode(set_brands(avif, *brands)), decode(avif))
    for brands in ((b"mif1", b"miaf"), (b"mif2", b"miaf"), (b"hevm", b"hevs"), (b"isom", b"mp42"), (b"avif", b"mif1")):
        np.testing.assert_array_equal(decode(set_brands(heic, *brands)), decode(heic))
    other = set_brands(heic, b"miaf", b"miaf").replace(b"hvc1", b"vvc1")
    assert reject(other) == ("unsupported", "HEIF with items of the types vvc1")
    assert reject(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(60))[0] == "not_an_image"


@pytest.mark.parametrize(
    "text",
    [
        "BMW is a car maker",
        "BM",
        "BMのテキスト" * 9,
        "II is two",
        "IIRO and IIRS",
        "MMORPG text goes on and on",
        "GIF8 is a text",
        "8BPS",
        "DDS means dentist",
        "BM\r\n\tlines\n",
    ],
)
def test_a_text_that_starts_as_an_image_does_is_no_image(text: str) -> None:
    for more in ("", " and so on" * 30):
        assert reject((text + more).encode())[0] == "not_an_image"


@pytest.mark.parametrize("step", [1, 16])
def test_a_bmp_of_os2_with_16_greys(step: int) -> None:
    palette = [[n * step] * 3 for n in range(16)]
    indices = np.asarray(make_rgb(84, 60).convert("L")).astype(int) // 16
    colors = b"".join(bytes(color) for color in palette)
    head = struct.pack("<IHHHH", 12, 84, 60, 1, 4) + colors
    pixels = pad_rows(pack_rows(indices, 4))
    data = b"BM" + struct.pack("<III", 14 + len(head) + len(pixels), 0, 14 + len(head)) + head + pixels
    assert_shows(data, Image.fromarray(np.array(palette, np.uint8)[indices]))
    assert_shows(make_bmp(pixels, (84, 60), 4, palette=palette), Image.fromarray(np.array(palette, np.uint8)[indices]))


def test_a_thumbnail_has_a_size_that_a_jpeg_can_have() -> None:
    with pytest.raises(ValueError, match="65500"):
        decode_image(encode(make_rgb(20, 10)), SPEC, Limits(), thumbnail=65501)
    settings: dict[str, Any] = {"input": "in", "output": "out", "labels": {"names": ["cat", "dog"]}}
    assert JobConfig(**settings, thumbnails=4096).thumbnails == 4096
    with pytest.raises(ValidationError, match="thumbnails"):
        JobConfig(**settings, thumbnails=4097)
