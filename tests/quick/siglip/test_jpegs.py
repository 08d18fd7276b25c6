"""JPEGs: their kinds, what shrinking may write to, files without an end marker, and blocks that Pillow stumbles on."""

from __future__ import annotations

import itertools
import re
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits
from siglip.images.decode import DecodeMode, ImageRejected, decode_image
from siglip.images.decoder import Decoder
from siglip.images.formats import jpeg
from tests.support.image_files import add_segment, change_frame
from tests.support.image_mutations import make_lossless_jpeg
from tests.support.images import assert_nearly_same, encode, make_rgb

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = ImageSpec(size=48)
RGB = make_rgb(160, 120)
PLAIN = encode(RGB, "JPEG", quality=90)
END = b"\xff\xd9"
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
}


def decode(data: bytes, mode: DecodeMode = "exact") -> np.ndarray:
    return decode_image(data, SPEC, Limits(), mode).pixels


def reject(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageRejected) as rejected:
        decode(data)
    return rejected.value.reason, rejected.value.detail


@pytest.mark.parametrize("mode", get_args(DecodeMode))
def test_a_lossless_jpeg_is_never_shrunk(mode: DecodeMode) -> None:
    """libjpeg-turbo ignores the wish to shrink one: the whole image went into the buffer of a smaller one."""
    data = make_lossless_jpeg(400, 390)
    decoder = Decoder(SPEC, Limits(), mode)
    [outcome] = decoder.decode([data])
    decoder.close()
    assert not isinstance(outcome, ImageRejected)
    expected = make_rgb(400, 390).resize((48, 48), Image.Resampling.BICUBIC)
    assert_nearly_same(outcome.pixels, np.asarray(expected))


def test_libjpeg_writes_to_a_buffer_for_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def empty(size: int, kind: Any) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size, kind)

    data = encode(make_rgb(801, 604), "JPEG")
    monkeypatch.setattr("siglip.images.formats.jpeg.np.empty", empty)
    pixels = jpeg.decode_jpeg(data, jpeg.read_header(data), 8)
    assert pixels is not None
    assert pixels.shape == (76, 101, 3)
    assert sizes == [801 * 604 * 3]


@pytest.mark.parametrize(
    ("data", "reason", "text"),
    [
        (change_frame(PLAIN, 4, b"\x0c"), "unsupported", "12 bits"),
        (change_frame(PLAIN, 1, b"\xc5"), "unsupported", "hierarchical"),
        (change_frame(PLAIN, 1, b"\xcb"), "unsupported", "lossless arithmetic"),
        (change_frame(PLAIN, 5, b"\0\0"), "unsupported", "DNL"),
        (change_frame(PLAIN, 9, b"\2"), "unsupported", "2 components"),
        (add_segment(PLAIN, 0xC0, b"\x08\0\x10\0\x10\1\1\x11\0"), "unsupported", "several frames"),
        (change_frame(PLAIN, 5, b"\xff\xff\xff\xff"), "too_many_pixels", "65535 x 65535"),
        (b"\xff\xd8\xff\xf7" + bytes(60), "unsupported", "JPEG-LS"),
        (PLAIN[:200], "truncated", "first scan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_that_are_not_read_are_named(data: bytes, reason: str, text: str) -> None:
    found, detail = reject(data)
    assert found == reason
    assert text in detail


def test_a_frame_behind_the_end_does_not_count() -> None:
    np.testing.assert_array_equal(decode(PLAIN + change_frame(PLAIN, 5, b"\xff\xff\xff\xff")), decode(PLAIN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_tagged_if_its_pixels_are_whole(kind: str, mode: str) -> None:
    data = encode(RGB.convert(mode), "JPEG", **({} if mode == "L" and kind == "4:4:4" else KINDS[kind]))
    expected = decode(data)
    for whole in (data[:-2], data[:-1], data[:-2] + bytes(5000), data + b"behind\xff\xd8\xff"):
        np.testing.assert_array_equal(decode(whole), expected)
    for cut in (data[:-4], data[:-12], data[: len(data) // 2]):
        for end in (b"", bytes(100_000)):
            assert reject(cut + end)[0] == "truncated"
    assert reject(data[: len(data) // 2] + END)[0] == "truncated", "an end marker does not bring back pixels"


def test_a_progressive_jpeg_that_ends_between_two_scans_is_truncated() -> None:
    data = encode(RGB, "JPEG", progressive=True)
    scans = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    for before, scan in itertools.pairwise(scans):
        tables = data.rfind(b"\xff\xc4", before, scan)
        assert reject(data[: tables if tables > 0 else scan])[0] == "truncated"


def test_a_jpeg_without_a_scan_of_a_component_is_unsupported() -> None:
    data = encode(RGB, "JPEG", progressive=True)
    scan = jpeg.read_header(data).scan
    assert data[scan + 4] == 3
    chroma = [
        m.start() for m in re.finditer(rb"\xff\xda", data) if data[m.start() + 4] == 1 and data[m.start() + 5] > 1
    ]
    only = data[:scan] + data[data.rfind(b"\xff\xc4", 0, chroma[0]) :]
    assert reject(only)[0] == "unsupported"


BLOCKS = {
    "multi-picture without entries": (0xE2, b"MPF\0II*\0\x08\0\0\0\3\0" + b"\xff" * 30),
    "multi-picture with fewer entries": (
        0xE2,
        b"MPF\0II*\0\x08\0\0\0\2\0\x01\xb0\4\0\1\0\0\0\x09\0\0\0\x02\xb0\7\0\x10\0\0\0\0\0\0\0\0\0\0\0",
    ),
    "colour profile without a number": (0xE2, b"ICC_PROFILE\0"),
    "short JFIF": (0xE0, b"JFIF"),
    "shorter JFIF": (0xE0, b"JFIF\0"),
    "image resources that end early": (0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1x"),
    "short Adobe": (0xEE, b"Adobe"),
    "FlashPix": (0xE2, b"FPXR\0"),
    "EXIF that ends early": (0xE1, b"Exif\0\0MM"),
    "empty comment": (0xFE, b""),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_broken_block_costs_no_image(name: str) -> None:
    marker, content = BLOCKS[name]
    np.testing.assert_array_equal(decode(add_segment(PLAIN, marker, content)), decode(PLAIN))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_broken_block_does_not_cost_the_orientation(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(RGB, "JPEG", exif=exif)
    marker, content = BLOCKS[name]
    if marker != 0xE1:
        decoded = decode_image(add_segment(data, marker, content), SPEC, Limits())
        assert (decoded.width, decoded.height) == (120, 160)


def test_a_segment_of_no_length_is_skipped_as_libjpeg_does() -> None:
    for length in (0, 1):
        data = PLAIN[:2] + b"\xff\xe5\0" + bytes([length]) + PLAIN[2:]
        np.testing.assert_array_equal(decode(data), decode(PLAIN))
