"""Variants of formats: the pixels are right, or the image is rejected as `unsupported`. The truth is constructed."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits
from siglip.images.decode import DecodeMode, ImageRejected, decode_image, resize_image
from tests.support.image_files import make_bmp, make_chunk, make_png, make_tiff, pack_rows, pad_rows
from tests.support.images import encode, make_rgb

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = ImageSpec(size=48)
RGB = np.asarray(make_rgb(84, 60)).astype(int)
GREY = np.asarray(make_rgb(84, 60).convert("L")).astype(int)
SIZE = (84, 60)
RAMP = np.tile(np.linspace(0, 255, 84).astype(int), (60, 1))
RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (256, 3))
PALETTE: list[list[int]] = COLORS.tolist()


def to_rgb(grey: np.ndarray) -> np.ndarray:
    rgb: np.ndarray = np.dstack([grey] * 3)
    return rgb


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    shown: np.ndarray = rgb * (alpha / 255)[:, :, None] + 255 - alpha[:, :, None]
    return shown


def assert_decodes(data: bytes, truth: np.ndarray, mode: DecodeMode = "exact", levels: float = 1.0) -> None:
    expected = Image.fromarray(np.round(truth).clip(0, 255).astype(np.uint8))
    pixels = decode_image(data, SPEC, Limits(), mode).pixels.astype(int)
    assert np.abs(pixels - np.asarray(expected.resize((48, 48), Image.Resampling.BICUBIC))).mean() < levels


def assert_rejected(data: bytes, text: str, reason: str = "unsupported") -> None:
    with pytest.raises(ImageRejected) as rejected:
        decode_image(data, SPEC, Limits())
    assert rejected.value.reason == reason
    assert text in rejected.value.detail


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 0x100])
def test_a_grey_png_s_transparent_sample_is_compared_at_its_depth(bits: int, more: int) -> None:
    most = 2**bits - 1
    samples = GREY * most // 255
    key = int(np.bincount(samples.ravel()).argmax())
    if bits == 16:
        samples[5:9], more = key + 1, 0  # the same at 8 bits
    truth = to_rgb(samples * 255 / most)
    truth[samples == key] = 255
    assert_decodes(make_png(samples, bits, 0, make_chunk(b"tRNS", struct.pack(">H", key | more))), truth)


@pytest.mark.parametrize("bits", [8, 16])
def test_an_rgb_png_s_transparent_color_is_compared_at_its_depth(bits: int) -> None:
    samples = RGB * (257 if bits == 16 else 1)
    samples[10:30, 10:40] = [0x102, 0x304, 0x506] if bits == 16 else [1, 3, 5]
    samples[32:50, 10:40] = [0x103, 0x304, 0x506] if bits == 16 else [1, 3, 6]
    key = samples[12, 12].copy()
    truth = samples / (2**bits - 1) * 255
    truth[10:30, 10:40] = 255
    chunk = make_chunk(b"tRNS", struct.pack(">3H", *key))
    assert_decodes(make_png(samples, bits, 2, chunk), truth)
    assert_decodes(make_png(samples, bits, 2, after=chunk), samples / (2**bits - 1) * 255)


def test_a_palette_png_s_transparency() -> None:
    alpha = RNG.integers(0, 256, 10)
    chunks = make_chunk(b"PLTE", COLORS[:16].astype(np.uint8).tobytes()), make_chunk(b"tRNS", bytes(alpha.tolist()))
    truth = on_white(COLORS[GREY // 16], np.append(alpha, [255] * 6)[GREY // 16])
    assert_decodes(make_png(GREY // 16, 4, 3, *chunks), truth)
    assert_rejected(make_png(GREY // 16, 4, 3), "no palette")


def test_pngs_with_16_bit_alpha() -> None:
    assert_decodes(make_png(np.stack([GREY, RAMP], 2) * 257, 16, 4), on_white(to_rgb(GREY), RAMP))
    assert_decodes(make_png(np.dstack([RGB, RAMP]) * 257, 16, 6), on_white(RGB, RAMP))


def test_a_png_with_fewer_rows_than_its_header_says_is_truncated() -> None:
    assert_rejected(make_png(RGB, 8, 2, height=70), "fewer rows", "truncated")
    black = np.zeros((60, 84, 3), int)
    assert_decodes(make_png(black, 8, 2), black)
    assert_rejected(make_png(black, 8, 2, height=61), "fewer rows", "truncated")


@pytest.mark.parametrize("name", [b"IHDR", b"tRNS", b"PLTE"])
def test_a_png_with_a_chunk_twice_is_unsupported(name: bytes) -> None:
    contents = {b"IHDR": struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0), b"tRNS": bytes(6), b"PLTE": bytes(30)}
    chunk = make_chunk(name, contents[name])
    assert_rejected(make_png(RGB, 8, 2, chunk, chunk), f"two {name.decode()}")


def test_a_png_opened_by_pillow_whose_transparency_pillow_compares_wrongly() -> None:
    chunk = make_chunk(b"tRNS", struct.pack(">H", 2))
    with pytest.raises(ImageRejected, match="bytes"):
        resize_image(Image.open(io.BytesIO(make_png(GREY // 64, 2, 0, chunk))), SPEC)


@pytest.mark.parametrize("header", [56, 108, 124])
def test_a_bmp_s_alpha_counts_unless_it_is_zero_everywhere(header: int) -> None:
    def make(alpha: np.ndarray) -> bytes:
        rows = pack_rows(np.dstack([RGB[:, :, ::-1], alpha]), 8)
        masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        return make_bmp(pad_rows(rows), SIZE, 32, compression=3, masks=masks, header=header)

    assert_decodes(make(np.zeros_like(GREY)), RGB)
    assert_decodes(make(RAMP), on_white(RGB, RAMP))
    pixels = resize_image(Image.open(io.BytesIO(make(np.zeros_like(GREY)))), SPEC)
    assert pixels.mean() < 250


def test_bmps_of_16_bits() -> None:
    def make(masks: tuple[int, ...], shifts: tuple[int, int, int], header: int = 40) -> bytes:
        lost = [8 - bin(mask).count("1") for mask in masks]
        pixels = sum(RGB[:, :, n] >> lost[n] << shifts[n] for n in range(3)) | (masks[3] if len(masks) > 3 else 0)
        rows = pack_rows(np.asarray(pixels), 16, "<")
        return make_bmp(pad_rows(rows), SIZE, 16, compression=3, masks=masks, header=header)

    assert_decodes(make((0xF800, 0x7E0, 0x1F), (11, 5, 0)), RGB, levels=4)
    assert_decodes(make((0x7C00, 0x3E0, 0x1F), (10, 5, 0)), RGB, levels=4)
    assert_rejected(make((0x1F, 0x7E0, 0xF800), (0, 5, 11)), "bit fields 1f 7e0 f800")
    assert_rejected(make((0x7C00, 0x3E0, 0x1F, 0x8000), (10, 5, 0), 56), "bit fields")


def encode_runs(rows: np.ndarray, four_bits: bool = False) -> bytes:
    """Every row as one literal run of an odd length, then single runs."""
    out = b""
    for row in reversed(rows.tolist()):
        content = (
            bytes(a << 4 | b for a, b in zip(row[:13:2], [*row[1:13:2], 0], strict=True))
            if four_bits
            else bytes(row[:13])
        )
        out += bytes([0, 13]) + content + bytes(len(content) % 2)
        out += b"".join(bytes([1, value << 4 if four_bits else value]) for value in row[13:]) + b"\0\0"
    return out + b"\0\1"


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_bmps_in_run_length_compression(gap: int) -> None:
    eight, four = GREY.astype(int), GREY // 16
    assert_decodes(make_bmp(encode_runs(eight), SIZE, 8, compression=1, palette=PALETTE, gap=gap), COLORS[eight])
    assert_decodes(
        make_bmp(encode_runs(four, True), SIZE, 4, compression=2, palette=PALETTE[:16], gap=gap), COLORS[four]
    )


def test_rows_that_no_run_covers_count() -> None:
    indices = np.zeros((60, 84), int)
    runs = b""
    for y in range(60):
        if y == 20:
            runs += b"\0\2\x05\x02"  # five to the right, two rows up
        elif y in (21, 22):
            continue
        elif y % 7:
            runs += bytes([84, y])
            indices[59 - y] = y
        runs += b"\0\0"
    assert_decodes(make_bmp(runs + b"\0\1", SIZE, 8, compression=1, palette=PALETTE), COLORS[indices])
    assert_rejected(make_bmp(runs[:-10], SIZE, 8, compression=1, palette=PALETTE), "end before", "truncated")


@pytest.mark.parametrize(("bits", "palette"), [(8, [[0] * 3, [255] * 3]), (4, [[n] * 3 for n in range(16)])])
def test_a_bmp_s_palette_of_few_greys_does_not_change_its_depth(bits: int, palette: Any) -> None:
    indices = GREY * len(palette) // 256
    data = make_bmp(pad_rows(pack_rows(indices, bits)), SIZE, bits, palette=palette)
    assert_decodes(data, np.array(palette)[indices])


ORDERS = ["<", ">"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compression", [1, 8])
def test_tiffs_in_grey(order: str, compression: int) -> None:
    def make(samples: np.ndarray, bits: int, photometric: int, *tags: Any) -> bytes:
        pixels = b"".join(pack_rows(samples, bits, order))
        pixels = zlib.compress(pixels) if compression == 8 else pixels
        return make_tiff(pixels, SIZE, [bits], photometric, *tags, order=order, compression=compression)

    for bits in (1, 2, 4, 8, 16):
        samples = GREY * (2**bits - 1) // 255
        truth = to_rgb(samples * 255 / (2**bits - 1))
        assert_decodes(make(samples, bits, 1), truth)
        if (bits, order) == (16, ">"):
            assert_rejected(make(samples, bits, 0), "photometric 0, bits 16")
        else:
            assert_decodes(make(samples, bits, 0), 255 - truth)
    for most in (1023, 4095):
        assert_decodes(make(GREY * most // 255, 16, 1, (281, 3, [most])), to_rgb(GREY))
    assert_rejected(make(GREY * 16, 16, 1, (281, 3, [4000])), "MaxSampleValue of 4000")
    assert_rejected(make(GREY * 257, 16, 1, (281, 3, [4095])), "over its MaxSampleValue")
    assert_rejected(make(GREY // 16, 8, 1, (281, 3, [15])), "MaxSampleValue of 15")
    twelve = make(GREY * 4095 // 255, 12, 1)
    if order == "<":
        assert_decodes(twelve, to_rgb(GREY))
    else:
        assert_rejected(twelve, "bits 12")
    for bits in (10, 14):
        assert_rejected(make(GREY, 12, 1, (258, 3, [bits])), f"bits {bits}")
    for number, text in ((2, "signed"), (3, "format 3"), (4, "format 4")):
        assert_rejected(make(GREY, 8, 1, (339, 3, [number])), text)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [1, 2])
def test_tiffs_in_color(order: str, bits: int, planar: int) -> None:
    def make(samples: np.ndarray, photometric: int, *tags: Any) -> bytes:
        samples = samples * 257 if bits == 16 else samples
        planes = np.moveaxis(samples, 2, 0) if planar == 2 else samples[None]
        parts = [b"".join(pack_rows(plane, bits, order)) for plane in planes]
        count = samples.shape[2]
        tags = (*tags, (284, 3, [planar]))
        if planar == 2:
            extents = [(279, 4, [len(part) for part in parts]), (273, 4, [0] * count)]
            start = len(make_tiff(b"", SIZE, [bits] * count, photometric, *tags, *extents, order=order))
            extents[1] = (273, 4, [start + n * len(parts[0]) for n in range(count)])
            tags = (*tags, *extents)
        return make_tiff(b"".join(parts), SIZE, [bits] * count, photometric, *tags, order=order)

    alpha = np.dstack([RGB, RAMP])
    assert_decodes(make(RGB, 2), RGB)
    assert_decodes(make(alpha, 2, (338, 3, [2])), on_white(RGB, RAMP))
    premultiplied = np.dstack([RGB * RAMP[:, :, None] // 255, RAMP])
    assert_decodes(make(premultiplied, 2, (338, 3, [1])), on_white(RGB, RAMP), levels=1.5)
    ink = np.dstack([255 - RGB, np.zeros_like(GREY)])
    assert_decodes(make(ink, 5), RGB)
    assert_rejected(make(ink, 5, (332, 3, [2])), "other inks")
    assert_rejected(make(ink, 5, (336, 3, [255, 0])), "other inks")
    assert_rejected(make(RGB, 32803), "photometric 32803")
    if planar == 1:
        assert_decodes(make(np.dstack([RGB, np.zeros_like(GREY)]), 2), RGB)
        grey = make(np.stack([GREY, RAMP], 2), 1, (338, 3, [2]))
        if bits == 8:
            assert_decodes(grey, on_white(to_rgb(GREY), RAMP))
        else:
            assert_rejected(grey, "bits 16 16")


def test_tiffs_whose_strips_or_meaning_are_missing() -> None:
    pixels = b"".join(pack_rows(GREY, 8))
    assert_rejected(make_tiff(pixels, SIZE, [8], None), "PhotometricInterpretation")
    assert_rejected(make_tiff(pixels, SIZE, [8], 1, (278, 3, [30])), "fewer strips", "truncated")
    assert_rejected(make_tiff(pixels, SIZE, [8], 1, (273, 4, [0])), "sparse")
    assert_rejected(make_tiff(pixels, SIZE, [8], 1, (254, 4, [1])), "small copy")
    assert_rejected(make_tiff(pixels, SIZE, [8], 1, (50706, 1, [1, 4, 0, 0])), "DNG")
    assert_rejected(make_tiff(pixels, SIZE, [8], 1, compression=34712), "compression 34712")
    assert_rejected(b"MM\0\x2b\0\x08\0\0" + bytes(8) + bytes(100), "BigTIFF in big-endian")
    assert_rejected(b"II*\0\xff\xff\0\0" + bytes(20), "before its directory", "truncated")


def test_a_tiff_s_palette_of_8_bits() -> None:
    pixels = b"".join(pack_rows(GREY, 8))
    for factor in (1, 257):
        colors = (320, 3, (COLORS * factor).T.ravel().tolist())
        assert_decodes(make_tiff(pixels, SIZE, [8], 3, colors), COLORS[GREY])


def test_a_tiff_that_pillow_has_loaded_wrongly_is_unsupported() -> None:
    data = make_tiff(b"".join(pack_rows(GREY, 8)), SIZE, [8], 3, (320, 3, COLORS.T.ravel().tolist()))
    image = Image.open(io.BytesIO(data))
    right = resize_image(image, SPEC)
    np.testing.assert_array_equal(right, decode_image(data, SPEC, Limits()).pixels)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    with pytest.raises(ImageRejected, match="bytes"):
        resize_image(loaded, SPEC)


def test_tiffs_with_bits_in_reverse_order() -> None:
    reverse = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
    for bits in (1, 4, 8):
        samples = GREY * (2**bits - 1) // 255
        pixels = b"".join(pack_rows(samples, bits))
        for packed, compression in ((pixels, 1), (zlib.compress(pixels), 8)):
            data = make_tiff(packed.translate(reverse), SIZE, [bits], 1, (266, 3, [2]), compression=compression)
            assert_decodes(data, to_rgb(samples * 255 / (2**bits - 1)))


def test_uncompressed_tiffs_in_ycbcr() -> None:
    pixels = np.asarray(make_rgb(84, 60).convert("YCbCr")).tobytes()
    assert_decodes(make_tiff(pixels, SIZE, [8, 8, 8], 6, (530, 3, [1, 1])), RGB, levels=2)
    assert_rejected(make_tiff(pixels, SIZE, [8, 8, 8], 6), "subsampling")
    assert_rejected(make_tiff(pixels, SIZE, [8, 8, 8], 6, (530, 3, [2, 2])), "subsampling")
    own = (529, 11, [0.2126, 0.7152, 0.0722])
    assert_rejected(make_tiff(pixels, SIZE, [8, 8, 8], 6, (530, 3, [1, 1]), own), "coefficients")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "JPEG 2000"),
        (b"8BPS\0\1" + bytes(50), "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?>\n<svg width="9"/>', "SVG"),
        (b"  <svg/>", "SVG"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(50), "Canon"),
        (b"\0\0\0\x18ftypcrx " + bytes(50), "Canon"),
        (b"FUJIFILMCCD-RAW 0201", "Fujifilm"),
        (b"\x89PNG\r\n\x1a\n" + make_chunk(b"CgBI", bytes(4)) + bytes(50), "CgBI"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_that_are_not_read_are_named(data: bytes, name: str) -> None:
    assert_rejected(data, name)


def test_avif_and_webp_keep_their_colors() -> None:
    for format in ("AVIF", "WEBP"):
        rgba = make_rgb(84, 60)
        rgba.putalpha(Image.fromarray(RAMP.astype(np.uint8)))
        assert_decodes(encode(rgba, format, quality=95), on_white(RGB, RAMP), levels=3)
