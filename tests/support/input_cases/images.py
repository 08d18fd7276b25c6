"""Cases of the section "Images"."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.image_files import (
    add_segment,
    change_frame,
    make_bmp,
    make_chunk,
    make_png,
    make_tiff,
    pack_rows,
    pad_rows,
)
from tests.support.image_mutations import make_lossless_jpeg
from tests.support.images import encode, make_rgb
from tests.support.input_cases.case import InputCase

TITLE = "Images"
TEXT = (
    "An image is what its bytes are, whatever its name is: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, and HEIC with "
    "`sightline[heic]`. The EXIF orientation is applied, transparency is composited on white, and of an animation or "
    "of several pages the first is tagged. Colour profiles and gamma are ignored, as SigLIP's own preprocessing "
    "ignores them. What a file holds beside its pixels (texts, previews, colour profiles, EXIF) can be broken or large "
    "and costs no image. A variant that would come out as another picture is rejected as `unsupported`, and the detail "
    "of the row names it."
)

_RGB = np.asarray(make_rgb(60, 44)).astype(int)
_GREY = np.asarray(make_rgb(60, 44).convert("L")).astype(int)
_SIZE = (60, 44)
_COLORS = [[index, 255 - index, index // 2] for index in range(256)]
_JPEG = encode(make_rgb(60, 44), "JPEG", quality=90)
_PROGRESSIVE = encode(make_rgb(60, 44), "JPEG", progressive=True)
_PNG = encode(make_rgb(60, 44))
_END = b"\xff\xd9"
_GIF = encode(make_rgb(60, 44).quantize(16), "GIF")
_PART = _GIF[:6] + struct.pack("<HH", 90, 70) + _GIF[10:]
_ALPHA = np.tile(np.linspace(0, 255, 60).astype(int), (44, 1))


def _write(name: str, *files: Callable[[], bytes]) -> Callable[[Path], object]:
    """A function that writes files into a folder, numbered, with a suffix."""
    stem, _, suffix = name.rpartition(".")

    def build(folder: Path) -> None:
        for number, make in enumerate(files):
            (folder / f"{stem}{number}.{suffix}").write_bytes(make())

    return build


def _case(
    kind: str, rule: str, name: str, *files: Callable[[], bytes] | bytes, rejected: str | None = None
) -> InputCase:
    makers = [(lambda data=file: data) if isinstance(file, bytes) else file for file in files]
    reasons = {} if rejected is None else {rejected: len(files)}
    return InputCase(kind, rule, _write(name, *makers), tagged=0 if rejected else len(files), rejected=reasons)


def _grey_png(bits: int, key: int | None = None) -> bytes:
    chunks = [] if key is None else [make_chunk(b"tRNS", struct.pack(">H", key))]
    return make_png(_GREY * (2**bits - 1) // 255, bits, 0, *chunks)


def _grey_tiff(bits: int, photometric: int = 1, *tags: tuple[int, int, list[int]], order: str = "<") -> bytes:
    return make_tiff(b"".join(pack_rows(_GREY, bits, order)), _SIZE, [bits], photometric, *tags, order=order)


def _rgb_tiff(samples: np.ndarray, photometric: int, *tags: tuple[int, int, list[int]]) -> bytes:
    return make_tiff(b"".join(pack_rows(samples, 8)), _SIZE, [8] * samples.shape[2], photometric, *tags)


def _bmp32(alpha: np.ndarray) -> bytes:
    rows = pad_rows(pack_rows(np.dstack([_RGB[:, :, ::-1], alpha]), 8))
    return make_bmp(rows, _SIZE, 32, compression=3, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000), header=108)


def _planar_tiff() -> bytes:
    planes = [b"".join(pack_rows(_RGB[:, :, n] * 257, 16, "<")) for n in range(3)]
    tags: list[tuple[int, int, list[int]]] = [(284, 3, [2]), (279, 4, [len(planes[0])] * 3), (273, 4, [0] * 3)]
    start = len(make_tiff(b"", _SIZE, [16] * 3, 2, *tags))
    tags[2] = (273, 4, [start + n * len(planes[0]) for n in range(3)])
    return make_tiff(b"".join(planes), _SIZE, [16] * 3, 2, *tags)


def _end_in_zeros(format: str) -> bytes:
    image = make_rgb(320, 240)
    data = encode(image.quantize(64) if format == "GIF" else image, format)
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def _with_exif(format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(make_rgb(60, 44), format, exif=exif)


def _long_chunk(name: bytes) -> bytes:
    return make_chunk(name, b"name\0\0" + zlib.compress(bytes(3_000_000)))


def _with_chunk(chunk: bytes) -> bytes:
    return _PNG[:33] + chunk + _PNG[33:]


def _masks(bits: int) -> bytes:
    rows = pad_rows(pack_rows(_GREY, 16, "<"))
    return make_bmp(rows, _SIZE, 16, compression=3, masks=(0xF00, 0xF0, 0xF, 0xF000), header=56)


CASES: tuple[InputCase, ...] = (
    _case(
        "a name that does not fit the bytes",
        "the bytes count",
        "image.jpg",
        _PNG,
        partial(encode, make_rgb(60, 44), "WEBP"),
        partial(encode, make_rgb(60, 44), "AVIF"),
    ),
    _case(
        "EXIF orientation",
        "the upright image is tagged; `width` and `height` are its own",
        "turned.jpg",
        partial(_with_exif, "JPEG"),
        partial(_with_exif, "PNG"),
        partial(_with_exif, "TIFF"),
        partial(_with_exif, "WEBP"),
    ),
    _case("no bytes", "", "empty.jpg", b"", rejected="empty"),
    _case(
        "a web page, a text, zeros",
        "also a text that starts with the letters of a format",
        "page.jpg",
        b"<html>404</html>",
        bytes(1000),
        b"BMW is a car maker, and MM are letters",
        rejected="not_an_image",
    ),
    _case(
        "JPEG XL, JPEG 2000, JPEG-LS, PSD, PDF, SVG, camera raw under an image's name",
        "named by their first bytes; files with suffixes of their own are skipped",
        "other.jpg",
        b"\xff\x0a" + bytes(60),
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
        b"\xff\xd8\xff\xf7" + bytes(60),
        b"8BPS\0\1" + bytes(60),
        b"%PDF-1.7",
        b"<svg/>",
        b"FUJIFILMCCD-RAW 0201",
        b"II*\0\x10\0\0\0CR\2\0" + bytes(60),
        rejected="unsupported",
    ),
    _case(
        "JPEG: baseline, progressive, grey, CMYK, RGB",
        "",
        "image.jpg",
        _JPEG,
        _PROGRESSIVE,
        partial(encode, make_rgb(60, 44).convert("L"), "JPEG"),
        partial(encode, make_rgb(60, 44).convert("CMYK"), "JPEG"),
        partial(encode, make_rgb(60, 44), "JPEG", keep_rgb=True),
    ),
    _case(
        "JPEG: lossless",
        "decoded at its full size in every `decode` mode",
        "lossless.jpg",
        lambda: make_lossless_jpeg(60, 44),
    ),
    _case(
        "JPEG without its end marker, or with zeros or other bytes behind its pixels",
        "tagged as long as no pixel is missing",
        "noend.jpg",
        _JPEG[:-2],
        _JPEG[:-2] + bytes(5000),
        _JPEG + b"behind",
        _PROGRESSIVE[:-2],
    ),
    _case(
        "JPEG whose pixels are not all there",
        "also with an end marker or zeros behind the cut, where viewers show grey; also between two scans",
        "cut.jpg",
        _JPEG[: len(_JPEG) // 2],
        _JPEG[: len(_JPEG) // 2] + bytes(50_000),
        _JPEG[: len(_JPEG) // 2] + _END,
        _PROGRESSIVE[: _PROGRESSIVE.rindex(b"\xff\xda")],
        rejected="truncated",
    ),
    _case(
        "JPEG with broken previews, colour profiles, comments, EXIF",
        "the block is ignored",
        "blocks.jpg",
        add_segment(_JPEG, 0xE2, b"MPF\0II*\0\x08\0\0\0\3\0" + b"\xff" * 30),
        add_segment(_JPEG, 0xE2, b"ICC_PROFILE\0"),
        add_segment(_JPEG, 0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1x"),
        add_segment(_JPEG, 0xE0, b"JFIF"),
        add_segment(_JPEG, 0xE1, b"Exif\0\0MM"),
        add_segment(_JPEG, 0xEE, b"Adobe"),
    ),
    _case(
        "JPEG of 12 bits, hierarchical, with 2 components, with several frames, with its height behind its pixels",
        "",
        "other.jpg",
        change_frame(_JPEG, 4, b"\x0c"),
        change_frame(_JPEG, 1, b"\xc5"),
        change_frame(_JPEG, 9, b"\2"),
        add_segment(_JPEG, 0xC0, b"\x08\0\x10\0\x10\1\1\x11\0"),
        change_frame(_JPEG, 5, b"\0\0"),
        rejected="unsupported",
    ),
    _case(
        "PNG of 1 to 16 bits, grey, RGB, palette, with alpha, interlaced or not",
        "16 bits are rounded to 8",
        "image.png",
        *(partial(_grey_png, bits) for bits in (1, 2, 4, 8, 16)),
        lambda: make_png(_RGB * 257, 16, 2),
        lambda: make_png(np.dstack([_RGB, _ALPHA]) * 257, 16, 6),
        lambda: encode(make_rgb(60, 44).quantize(16)),
    ),
    _case(
        "PNG with a transparent colour",
        "compared at the file's depth, before it is scaled to 8 bits",
        "key.png",
        *(partial(_grey_png, bits, 1) for bits in (1, 2, 4, 8, 16)),
        lambda: make_png(_RGB * 257, 16, 2, make_chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
    ),
    _case(
        "PNG with large or broken texts, XMP or colour profiles, or with bytes behind its end",
        "such chunks are ignored",
        "chunks.png",
        _with_chunk(_long_chunk(b"zTXt")),
        _with_chunk(_long_chunk(b"iCCP")),
        _with_chunk(make_chunk(b"tEXt", b"key\0text")[:-1] + b"?"),
        _with_chunk(make_chunk(b"zTXt", b"key\0\0broken")),
        _with_chunk(make_chunk(b"gAMA", b"")),
        _PNG + b"behind",
        _PNG[:-12],
    ),
    _case("PNG whose pixels end early", "", "cut.png", _PNG[:-200], rejected="truncated"),
    _case(
        "PNG with fewer rows than its header says",
        "",
        "rows.png",
        lambda: make_png(_RGB, 8, 2, height=50),
        rejected="truncated",
    ),
    _case(
        "PNG with a wrong checksum of its header, its palette, its transparency or its pixels",
        "",
        "crc.png",
        _PNG[:29] + b"????" + _PNG[33:],
        _PNG[:-100] + b"????" + _PNG[-96:],
        rejected="corrupt",
    ),
    _case(
        "PNG in Apple's variant (CgBI), without a palette, with two headers",
        "",
        "apple.png",
        _PNG[:8] + make_chunk(b"CgBI", bytes(4)) + _PNG[8:],
        lambda: make_png(_GREY // 16, 4, 3),
        _PNG[:33] + _PNG[8:],
        rejected="unsupported",
    ),
    _case(
        "animated GIF, WebP or PNG",
        "the first frame, or the default image of a PNG",
        "moving.gif",
        *(
            partial(encode, make_rgb(60, 44), format, save_all=True, append_images=[make_rgb(60, 44, 1)])
            for format in ("GIF", "WEBP", "PNG")
        ),
    ),
    _case(
        "GIF or WebP whose first frame does not cover the whole image",
        "white where there is no frame, as browsers show it on a white page",
        "part.gif",
        lambda: _PART,
    ),
    _case(
        "BMP with 32 bits",
        "an alpha that is zero everywhere is no alpha",
        "image.bmp",
        lambda: _bmp32(_ALPHA),
        lambda: _bmp32(np.zeros_like(_GREY)),
    ),
    _case(
        "BMP in run-length compression, with few colours, top-down",
        "",
        "runs.bmp",
        lambda: make_bmp(b"\x3c\5\0\0" * 44 + b"\0\1", _SIZE, 8, compression=1, palette=_COLORS),
        lambda: make_bmp(pad_rows(pack_rows(_GREY // 128, 8)), _SIZE, 8, palette=[[0] * 3, [255] * 3]),
    ),
    _case(
        "BMP with other bit fields, or with a JPEG or a PNG inside",
        "",
        "fields.bmp",
        partial(_masks, 16),
        lambda: make_bmp(_PNG, _SIZE, 24, compression=5),
        rejected="unsupported",
    ),
    _case(
        "TIFF: grey, RGB, CMYK, palette, 1 to 16 bits, strips, tiles, planes, all common compressions",
        "16-bit grey where 0 is white, planes of 16 bits and premultiplied alpha too",
        "image.tif",
        *(partial(_grey_tiff, bits) for bits in (8, 16)),
        partial(_grey_tiff, 16, 0),
        _planar_tiff,
        partial(_rgb_tiff, _RGB, 2),
        partial(_rgb_tiff, np.dstack([_RGB, np.zeros_like(_GREY)]), 5),
        partial(encode, make_rgb(60, 44), "TIFF", compression="tiff_lzw"),
        partial(encode, make_rgb(60, 44), "TIFF", compression="jpeg"),
    ),
    _case(
        "TIFF in grey whose 16-bit samples have a smaller range (MaxSampleValue 1023, 4095, ...)",
        "scaled by that range",
        "range.tif",
        partial(_grey_tiff, 16, 1, (281, 3, [4095])),
        partial(_grey_tiff, 16, 1, (281, 3, [1023])),
    ),
    _case(
        "TIFF with a fourth channel of zeros that is not said to be alpha",
        "opaque",
        "fourth.tif",
        partial(_rgb_tiff, np.dstack([_RGB, np.zeros_like(_GREY)]), 2),
    ),
    _case(
        "TIFF with 10, 14 or 32 bits, signed or float samples, other ranges, inks or colour spaces, subsampled and "
        "uncompressed YCbCr, left-out strips; DNG; a first page that is a preview; BigTIFF in big-endian",
        "",
        "other.tif",
        partial(_grey_tiff, 8, 1, (258, 3, [10])),
        partial(_grey_tiff, 8, 1, (339, 3, [2])),
        lambda: encode(Image.fromarray(_GREY.astype(np.float32)), "TIFF"),
        partial(_grey_tiff, 16, 1, (281, 3, [4000])),
        partial(_rgb_tiff, np.dstack([_RGB, _GREY]), 5, (332, 3, [2])),
        partial(_rgb_tiff, _RGB, 32803),
        partial(_rgb_tiff, _RGB, 6),
        partial(_grey_tiff, 8, 1, (273, 4, [0])),
        partial(_grey_tiff, 8, 1, (50706, 1, [1, 4, 0, 0])),
        partial(_grey_tiff, 8, 1, (254, 4, [1])),
        b"MM\0\x2b\0\x08\0\0" + bytes(60),
        rejected="unsupported",
    ),
    _case(
        "TIFF with fewer strips than its size needs",
        "",
        "strips.tif",
        partial(_grey_tiff, 8, 1, (278, 3, [22])),
        rejected="truncated",
    ),
    _case(
        "WebP or AVIF that is shorter than it says",
        "",
        "cut.webp",
        lambda: encode(make_rgb(60, 44), "WEBP")[:-50],
        lambda: encode(make_rgb(60, 44), "AVIF")[:-100],
        rejected="truncated",
    ),
    _case(
        "WebP, AVIF, HEIC, PNG, GIF or JPEG that ends in zeros that were never written, as a broken-off download can",
        "WebP in the lossless mode of pictures of noise cannot be told from a whole one, and is tagged",
        "zeros.webp",
        *(partial(_end_in_zeros, format) for format in ("WEBP", "AVIF", "PNG", "GIF", "JPEG")),
        rejected="truncated",
    ),
    _case(
        "BMP or TIFF of the size that it must have, with zeros or other bytes that were never pixels",
        "tagged: black is legal, and there is no checksum. A TIFF in deflate compression has one and is `corrupt`; in "
        "other compressions it is `corrupt` where libtiff finds a code that does not exist",
        "zeros.bmp",
        *(partial(_end_in_zeros, format) for format in ("BMP", "TIFF")),
    ),
    _case(
        "TIFF in deflate compression with a wrong checksum",
        "",
        "deflate.tif",
        lambda: make_tiff(zlib.compress(_RGB.astype(np.uint8).tobytes())[:-1] + b"?", _SIZE, [8] * 3, 2, compression=8),
        rejected="corrupt",
    ),
    _case(
        "AVIF or HEIC whose brands do not say which it is (`mif1`, `miaf`, ...)",
        "the types of its items say it",
        "brands.avif",
        lambda: encode(make_rgb(60, 44), "AVIF").replace(b"avif", b"miaf", 2),
    ),
    InputCase(
        "more pixels than `limits.max_pixels`",
        "nothing is decoded",
        _write("large.png", lambda: _PNG),
        rejected={"too_many_pixels": 1},
        settings={"limits": {"max_pixels": 1000}},
    ),
)
