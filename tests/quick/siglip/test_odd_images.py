"""Images with odd or broken EXIF are decoded; AVIF and HEIC."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits
from siglip.images import opening
from siglip.images.decode import ImageRejected, decode_image, readable_suffixes
from siglip.images.decoder import Decoder
from tests.support.images import assert_nearly_same, encode, make_rgb

pytestmark = pytest.mark.filterwarnings("ignore")
"""Decoder processes ignore Pillow's warnings too."""
SPEC = ImageSpec(size=64)
RGB = make_rgb()


def make_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF block with one directory: entries of (tag, type, count, four bytes of value or offset)."""
    fields = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0"


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack("<HH", value, 0))


BLOCKS: dict[str, tuple[bytes, Any]] = {
    # ResolutionUnit is a SHORT. This one is a LONG whose value does not fit in a SHORT.
    "cannot be written back": (make_exif(orientation(6), (0x0128, 4, 1, struct.pack("<I", 70_000))), 6),
    "a sub-directory that is nowhere": (make_exif(orientation(6), (0x8769, 4, 1, b"\xf0\xff\xff\x7f")), 6),
    "orientation 0": (make_exif(orientation(0)), 1),
    "orientation 9": (make_exif(orientation(9)), 1),
    "orientation is text": (make_exif((0x0112, 2, 2, b"6\0\0\0")), 1),
    "two orientations": (make_exif((0x0112, 3, 2, struct.pack("<HH", 6, 6))), 6),
    "orientation is a float": (make_exif((0x0112, 11, 1, struct.pack("<f", 6))), 6),
    "orientation lies outside": (make_exif((0x0112, 3, 9, b"\xff\xff\xff\x7f")), 1),
    "endless": (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", 1),
    "no TIFF": (b"Exif\0\0garbage", 1),
    "empty": (b"Exif\0\0", 1),
}
TURN = Image.Transpose.ROTATE_270


def with_png_chunk(kind: bytes, data: bytes) -> bytes:
    png = encode(RGB)
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + chunk + png[33:]


def with_block(format: str, block: bytes) -> bytes:
    if format == "PNG":
        return with_png_chunk(b"eXIf", block.removeprefix(b"Exif\0\0"))
    if format == "JPEG":
        jpeg = encode(RGB, "JPEG", quality=100)
        return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    return encode(RGB, format, quality=100, exif=block)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", BLOCKS)
def test_odd_exif_never_rejects_an_image(format: str, name: str) -> None:
    block, expected = BLOCKS[name]
    data = with_block(format, block)
    decoded = decode_image(data, SPEC, Limits(), thumbnail=32)
    upright = Image.open(io.BytesIO(encode(RGB, format, quality=100))).convert("RGB")
    upright = upright.transpose(TURN) if expected == 6 else upright
    assert (decoded.width, decoded.height) == upright.size
    expected_pixels = np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decoded.pixels - expected_pixels).max() <= 1
    assert decoded.thumbnail is not None
    assert Image.open(io.BytesIO(decoded.thumbnail)).size == ((24, 32) if expected == 6 else (32, 24))


def test_pillow_s_exif_transpose_still_fails_on_such_a_block() -> None:
    """If this fails, Pillow was corrected, and `_read_orientation` can be made simpler."""
    from PIL import ImageOps

    failed = []
    for name, (block, _) in BLOCKS.items():
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(with_block("JPEG", block))))
        except Exception:
            failed.append(name)
    assert "cannot be written back" in failed


@pytest.mark.parametrize(
    "packet",
    [b'<x tiff:Orientation="9"/>', b"\xff\xfe not text", b"<unclosed", b'tiff:Orientation="0"', b""],
)
def test_odd_xmp_never_rejects_an_image(packet: bytes) -> None:
    raw = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    jpeg = encode(RGB, "JPEG")
    block = b"http://ns.adobe.com/xap/1.0/\0" + packet
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    for data in (with_png_chunk(b"iTXt", raw), jpeg, encode(RGB, "WEBP", xmp=packet)):
        assert decode_image(data, SPEC, Limits()).width == RGB.width


def test_odd_raw_profiles_never_reject_an_image() -> None:
    for text in (b"\nexif\n   4\nzzzz\n", b"\n", b"exif"):
        data = with_png_chunk(b"tEXt", b"Raw profile type exif\0" + text)
        assert decode_image(data, SPEC, Limits()).width == RGB.width


@pytest.mark.parametrize("value", [0, 9, "6"])
def test_a_tiff_with_an_odd_orientation(value: Any) -> None:
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = value
    tags.tagtype[0x0112] = 2 if isinstance(value, str) else 3
    decoded = decode_image(encode(RGB, "TIFF", tiffinfo=tags), SPEC, Limits())
    assert (decoded.width, decoded.height) == RGB.size


def test_a_rotated_tiff_with_a_broken_exif_pointer() -> None:
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6
    tags[0x8769] = 0x7FFFFFF0
    tags.tagtype[0x8769] = 4
    data = encode(RGB, "TIFF", tiffinfo=tags)
    assert struct.pack("<I", 0x7FFFFFF0) in data
    decoded = decode_image(data, SPEC, Limits())
    upright = RGB.transpose(TURN)
    assert (decoded.width, decoded.height) == upright.size
    assert_nearly_same(decoded.pixels, np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_avif_and_heif_are_read_and_turned_once(format: str) -> None:
    if format == "HEIF":
        opening._register_heif()
    plain = decode_image(encode(RGB, format, quality=95), SPEC, Limits())
    assert (plain.width, plain.height) == RGB.size
    expected = np.asarray(RGB.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(plain.pixels - expected).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(RGB, format, quality=95, exif=exif.tobytes()), SPEC, Limits())
    upright = RGB.transpose(TURN)
    assert (turned.width, turned.height) == upright.size
    expected = np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(turned.pixels - expected).mean() < 3


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("name", ["endless", "orientation 9", "a sub-directory that is nowhere"])
def test_odd_exif_never_rejects_an_avif_or_heif(format: str, name: str) -> None:
    if format == "HEIF":
        opening._register_heif()
    # No library writes a broken block, so a valid one of the same length is written and then overwritten.
    block = BLOCKS[name][0].removeprefix(b"Exif\0\0")
    marker = make_exif((0x010E, 2, 4, b"mark")).removeprefix(b"Exif\0\0")
    marker += b"\0" * (len(block) - len(marker))
    data = encode(RGB, format, quality=95, exif=b"Exif\0\0" + marker)
    assert marker in data
    data = data.replace(marker, block + marker[len(block) :])
    assert decode_image(data, SPEC, Limits()).width in RGB.size


def test_a_heic_without_the_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    opening._register_heif()
    data = encode(RGB, "HEIF")
    assert {"avif", "heic", "heif"} <= readable_suffixes()
    monkeypatch.setattr(opening, "readable_suffixes", lambda: opening._SUFFIXES)
    with pytest.raises(ImageRejected) as rejected:
        decode_image(data, SPEC, Limits())
    assert (rejected.value.reason, rejected.value.detail) == ("unsupported", "HEIC: install sightline[heic]")


def test_a_decoder_process_reads_heic_and_rejects_a_damaged_one() -> None:
    opening._register_heif()
    data = encode(make_rgb(900, 700), "HEIF")
    decoder = Decoder(SPEC, Limits())
    whole, short = decoder.decode([data, data[: len(data) // 2]])
    decoder.close()
    assert not isinstance(whole, ImageRejected)
    assert (whole.width, whole.height) == (900, 700)
    assert isinstance(short, ImageRejected)
    with pytest.raises(ImageRejected, match="too_many_pixels"):
        decode_image(data, SPEC, Limits(max_pixels=1000))


def test_importing_siglip_loads_neither_torch_nor_transformers() -> None:
    modules = (
        "siglip, siglip.actor, siglip.checkpoint, siglip.images.decoder, siglip.images.decode, siglip.labels, "
        "siglip.families"
    )
    code = (
        f"import sys, {modules}; print({{'torch', 'transformers', 'pillow_heif', 'ray', 'boto3'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
