"""Decoding: the pixels of every kind of image, the reasons of rejections, and that a bad image affects no other."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits
from siglip.images import decode as images
from siglip.images.decode import Decoded, DecodeMode, ImageRejected, decode_image
from siglip.images.decoder import Decoder
from siglip.images.decoder_server import DecoderServer
from siglip.images.formats.jpeg import decode_jpeg, read_header
from siglip.images.opening import open_image
from tests.support.images import assert_nearly_same, awkward_cases, encode, make_rgb, plain_cases

pytestmark = pytest.mark.filterwarnings("ignore")
"""Decoder processes ignore Pillow's warnings too."""
SPEC = ImageSpec(size=64)


def resize_by_pillow(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("name", "data", "rgb"), [*plain_cases()], ids=lambda v: v if isinstance(v, str) else "")
def test_plain_images_are_decoded_exactly(name: str, data: bytes, rgb: Image.Image) -> None:
    decoded = decode_image(data, SPEC, Limits())
    assert (decoded.width, decoded.height) == rgb.size
    assert_nearly_same(decoded.pixels, resize_by_pillow(rgb))


@pytest.mark.parametrize(("name", "data", "rgb"), [*awkward_cases()], ids=lambda v: v if isinstance(v, str) else "")
def test_unusual_images_become_the_expected_rgb(name: str, data: bytes, rgb: Image.Image) -> None:
    decoded = decode_image(data, SPEC, Limits())
    assert (decoded.width, decoded.height) == rgb.size
    # Compositing rounds once more than the expectation does.
    assert np.abs(decoded.pixels.astype(int) - resize_by_pillow(rgb).astype(int)).max() <= 2


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header has a size, with almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def flip_byte(png: bytes, position: int) -> bytes:
    """The PNG with one bit of its compressed pixels changed. All chunks stay in place."""
    start = png.index(b"IDAT") + 4 + position
    return png[:start] + bytes([png[start] ^ 0xFF]) + png[start + 1 :]


JPEG = encode(make_rgb(), "JPEG")
BAD = [
    ("empty", b""),
    ("not_an_image", b"<html>404</html>"),
    ("not_an_image", b"\0" * 100),
    ("not_an_image", encode(make_rgb(), "PPM")),
    ("truncated", JPEG[: len(JPEG) // 2]),
    ("truncated", encode(make_rgb(600, 600), "PNG")[:-2000]),
    ("truncated", encode(make_rgb(), "WEBP")[:-50]),
    ("corrupt", flip_byte(encode(make_rgb(200, 100)), 36)),
    ("too_many_pixels", png_header(100_000, 100_000)),
    ("too_many_pixels", encode(Image.new("1", (10_000, 10_000)))),
    ("unsupported", encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF")),
    ("too_many_bytes", JPEG + bytes(20_000_000)),
]


@pytest.mark.parametrize(("reason", "data"), BAD, ids=[f"{reason}-{n}" for n, (reason, _) in enumerate(BAD)])
def test_bad_images_are_rejected_with_a_reason(reason: str, data: bytes) -> None:
    with pytest.raises(ImageRejected) as rejected:
        decode_image(data, SPEC, Limits(max_bytes=20_000_000))
    assert rejected.value.reason == reason


def test_the_extension_does_not_matter_but_the_bytes_do() -> None:
    assert decode_image(encode(make_rgb(), "BMP"), SPEC, Limits()).width == 120


def test_a_reason_must_be_documented() -> None:
    with pytest.raises(KeyError):
        ImageRejected("because")


def test_fast_decoding_keeps_the_size_and_nearly_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_rgb(1600, 1200), "JPEG", quality=95, exif=exif)
    exact, fast = (decode_image(data, SPEC, Limits(), mode) for mode in ("exact", "fast"))
    assert (exact.width, exact.height) == (fast.width, fast.height) == (1200, 1600)
    assert np.abs(exact.pixels.astype(int) - fast.pixels.astype(int)).mean() < 2


@pytest.mark.parametrize(("side", "auto", "fast"), [(1023, 1, 2), (1024, 1, 2), (2047, 1, 2), (2048, 2, 4)])
def test_libjpeg_shrinks_at_most_as_much_as_the_mode_allows(side: int, auto: int, fast: int) -> None:
    spec = ImageSpec(size=256)
    cases: list[tuple[DecodeMode, int]] = [("exact", 1), ("auto", auto), ("fast", fast)]
    for mode, shrink in cases:
        if (side, mode) == (1023, "fast"):
            shrink = 1
        data = encode(make_rgb(2 * side, side), "JPEG", quality=95)
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (2 * side // shrink, side // shrink))
        assert image.size == (-(-2 * side // shrink), -(-side // shrink))
        expected = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))
        assert_nearly_same(decode_image(data, spec, Limits(), mode).pixels, expected, levels=2)


def jpegs() -> Iterator[tuple[str, bytes]]:
    """JPEGs of many kinds, as (name, bytes)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for width, height in ((1, 1), (17, 31), (333, 222), (1601, 1203)):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            data = encode(make_rgb(width, height), "JPEG", quality=85, subsampling=subsampling)
            yield f"{subsampling} {width}x{height}", data
    large = make_rgb(1601, 1203)
    yield "progressive", encode(large, "JPEG", progressive=True)
    yield "optimized", encode(large, "JPEG", optimize=True, quality=30)
    yield "with restarts", encode(large, "JPEG", restart_marker_blocks=7)
    yield "grey", encode(large.convert("L"), "JPEG")
    yield "RGB without YCbCr", encode(large, "JPEG", keep_rgb=True)
    yield "on its side", encode(large, "JPEG", exif=exif)
    yield "two pictures in one", encode(large, "MPO", save_all=True, append_images=[make_rgb(20, 20)])
    yield "with bytes after its end", encode(large, "JPEG") + b"after the end"


@pytest.mark.parametrize("mode", get_args(DecodeMode))
@pytest.mark.parametrize(("name", "data"), [*jpegs()], ids=lambda value: value if isinstance(value, str) else "")
def test_pixels_of_a_jpeg_equal_pillow_s(name: str, data: bytes, mode: DecodeMode) -> None:
    image = Image.open(io.BytesIO(data))
    opened = open_image(data, 10**8)
    assert opened.jpeg is not None
    shrink = images._choose_shrink(opened, mode, (64, 64), 0)
    assert (shrink > 1) == (max(image.size) > 1000 and mode != "exact"), "also a file that contains two images"
    pixels = decode_jpeg(data, opened.jpeg, shrink)
    assert pixels is not None, "decoded without Pillow"
    if shrink > 1:
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_pillow_decodes_images_that_are_not_plain_jpegs() -> None:
    data = encode(make_rgb().convert("CMYK"), "JPEG")
    assert decode_jpeg(data, read_header(data), 1) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 9}], ids=str)
def test_a_damaged_jpeg_gives_pillow_s_pixels_or_a_rejection(options: dict[str, Any]) -> None:
    """libjpeg warns about some of these files and decodes them nevertheless; Pillow does not accept all of them."""
    rng = np.random.default_rng(0)
    data = encode(make_rgb(400, 300), "JPEG", **options)
    tagged, reasons = 0, set[str]()
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(2, len(data), rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        damaged = damaged[: rng.integers(len(data) // 2, 2 * len(data))]
        try:
            expected = resize_by_pillow(Image.open(io.BytesIO(damaged)).convert("RGB"))
        except Exception:
            with pytest.raises(ImageRejected):
                decode_image(bytes(damaged), SPEC, Limits())
        else:
            try:
                decoded = decode_image(bytes(damaged), SPEC, Limits())
            except ImageRejected as rejected:
                reasons.add(rejected.reason)
                continue
            assert_nearly_same(decoded.pixels, expected, levels=2)
            tagged += 1
    assert tagged > 20
    assert reasons <= {"truncated", "unsupported"}


def test_a_thumbnail_has_the_requested_size() -> None:
    data = encode(make_rgb(2400, 2000), "JPEG")
    for mode in get_args(DecodeMode):
        decoded = decode_image(data, SPEC, Limits(), mode, thumbnail=1000)
        assert decoded.thumbnail is not None
        assert Image.open(io.BytesIO(decoded.thumbnail)).size == (1000, 833)


def test_thumbnails_are_small_jpegs_of_the_upright_image() -> None:
    decoded = decode_image(encode(make_rgb(800, 200)), SPEC, Limits(), thumbnail=100)
    assert decoded.thumbnail is not None
    image = Image.open(io.BytesIO(decoded.thumbnail))
    assert (image.format, image.size) == ("JPEG", (100, 25))


@pytest.fixture
def hostile_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder whose process aborts on images 13 pixels wide and hangs on images 14 pixels wide.

    A real crash needs a bug in a C library. Here Python's `sitecustomize` adds the faults to the decoder server.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "from PIL import PngImagePlugin\n"
        "original = PngImagePlugin.PngImageFile.load\n"
        "def load(self, *arguments):\n"
        "    if self.width == 13:\n"
        "        os.abort()\n"
        "    if self.width == 14:\n"
        "        time.sleep(600)\n"
        "    return original(self, *arguments)\n"
        "PngImagePlugin.PngImageFile.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("siglip.images.decoder.SERVER", DecoderServer())  # one that is started with the faults
    return Decoder(SPEC, Limits(max_seconds=2))


@pytest.mark.alone
def test_a_crash_or_a_hang_rejects_one_image(hostile_decoder: Decoder) -> None:
    widths = [20, 13, 21, 14, 22, 13, 23]
    outcomes = hostile_decoder.decode([encode(make_rgb(width, 30)) for width in widths])
    reasons = [o.reason if isinstance(o, ImageRejected) else None for o in outcomes]
    assert reasons == [None, "decoder_crashed", None, "decoder_timeout", None, "decoder_crashed", None]
    assert [o.width for o in outcomes if isinstance(o, Decoded)] == [20, 21, 22, 23]
    hostile_decoder.close()


def test_a_decoder_process_gives_the_same_results_as_decode_image() -> None:
    decoder = Decoder(SPEC, Limits())
    cases = [data for _, data, _ in plain_cases()] + [data for _, data in BAD]
    for data, outcome in zip(cases, decoder.decode(cases), strict=True):
        if isinstance(outcome, ImageRejected):
            with pytest.raises(ImageRejected) as here:
                decode_image(data, SPEC, Limits())
            assert (outcome.reason, outcome.detail) == (here.value.reason, here.value.detail)
        else:
            np.testing.assert_array_equal(outcome.pixels, decode_image(data, SPEC, Limits()).pixels)
    decoder.close()
