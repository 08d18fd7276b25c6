"""TIFF: the variants that Pillow reads wrongly are read right, or named and rejected.

Tag numbers and defaults are those of TIFF 6.0. What Pillow makes of each variant was compared with files that tifffile
wrote.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ImagePalette
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2, TiffImageFile

from siglip.images.pillow_internals import use_libtiff
from siglip.images.rejection import ImageRejected

_SUBFILE, _OLD_SUBFILE = 254, 255
_FILL_ORDER = 266
_BITS, _COMPRESSION, _PHOTOMETRIC = 258, 259, 262
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_SIZES, _PLANAR = 273, 278, 279, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_SIZES = 322, 323, 324, 325
_STRIPS = _STRIP_OFFSETS, _STRIP_SIZES
_MAX_SAMPLE, _MAX_SAMPLE_SIGNED = 281, 341
_COLOR_MAP, _INK_SET, _DOT_RANGE, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 320, 332, 336, 338, 339
_COEFFICIENTS, _SUBSAMPLING, _REFERENCE = 529, 530, 532
_DNG_VERSION = 50706
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _CMYK, _YCBCR = 0, 1, 5, 6
_SEPARATE = 2
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""By byte, the byte with its bits in reverse order (FillOrder 2)."""
_FORMATS = {2: "signed integer", 3: "float", 4: "undefined", 5: "complex integer", 6: "complex float"}
_PLANAR_MODES = {
    ("RGB", ()): "RGB",
    ("RGB", (0,)): "RGB",
    ("RGBA", ()): "RGBA",
    ("RGBA", (1,)): "RGBa",
    ("RGBA", (2,)): "RGBA",
    ("CMYK", ()): "CMYK",
}


@dataclass(frozen=True)
class GreyScale:
    """What the samples of a 16-bit grey image mean: `white` is the sample for white, or for black if `inverted`."""

    white: int = 65535
    inverted: bool = False


def check_first_page(image: TiffImageFile) -> None:
    """Raise `ImageRejected` (`unsupported`) for a TIFF whose first page is not its image."""
    tags: Any = image.tag_v2
    if _DNG_VERSION in tags:
        raise ImageRejected("unsupported", "camera raw (DNG)")
    if _numbers(tags, _SUBFILE, 0)[0] & 5 or _numbers(tags, _OLD_SUBFILE, 1)[0] == 2:
        raise ImageRejected("unsupported", "TIFF whose first page is a mask or a small copy, as in camera raw files")


def prepare_tiff(image: TiffImageFile) -> GreyScale:
    """Check a page of a TIFF, and have Pillow read it right when it loads it.

    Raises `ImageRejected`: `unsupported` for a variant that Pillow reads wrongly, or has already loaded wrongly, and
    `truncated` when strips or tiles are missing.
    """
    tags: Any = image.tag_v2
    photometric, bits = tags.get(_PHOTOMETRIC), max(_numbers(tags, _BITS, 1))
    if photometric is None:
        raise ImageRejected("unsupported", "TIFF that does not say what its samples mean (PhotometricInterpretation)")
    formats = {number for number in _numbers(tags, _SAMPLE_FORMAT, 1) if number != 1}
    if formats:
        raise ImageRejected("unsupported", f"TIFF with {_FORMATS.get(min(formats), min(formats))} samples")
    raw = image.info.get("compression") == "raw"
    if photometric == _YCBCR:
        _check_ycbcr(image, tags, raw)
    if photometric == _CMYK:
        dots = _numbers(tags, _DOT_RANGE, 0, 2**bits - 1)
        if _numbers(tags, _INK_SET, 1) != (1,) or any(dots[::2]) or any(dot != 2**bits - 1 for dot in dots[1::2]):
            raise ImageRejected("unsupported", "TIFF with other inks than CMYK, or with a DotRange")
    if _numbers(tags, _PLANAR, 1)[0] == _SEPARATE:
        _prepare_planes(image, tags, bits, raw)
    if image.info.get("compression") == "webp":
        raise ImageRejected("unsupported", "TIFF in WebP compression")  # libtiff in Pillow is built without it
    _check_offsets(image, tags)
    if image.mode in ("P", "PA"):
        colors = tags[_COLOR_MAP]
        if max(colors, default=0) < 256:  # 8-bit colours, which the specification does not allow and some writers write
            _check_unloaded(image)
            image.palette = ImagePalette.raw("RGB;L", bytes(colors))
    return _read_scale(image, tags, photometric, bits)


def explain_tiff(data: bytes) -> ImageRejected:
    """Say why Pillow does not open a TIFF: from its first directory, if that can be read."""
    if data[:4] == b"MM\0\x2b":
        return ImageRejected("unsupported", "BigTIFF in big-endian byte order")
    if data[:3] == b"II\xbc":
        return ImageRejected("unsupported", "JPEG XR")
    if not data.startswith(tuple(PREFIXES)) or len(data) < 16:
        return ImageRejected("corrupt", "a TIFF with a broken header")
    try:
        tags: Any = ImageFileDirectory_v2(data[:16] if data[2:3] == b"\x2b" else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        if tags.next >= len(data):
            return ImageRejected("truncated", "the TIFF ends before its directory")
        tags.load(file)
        if 256 not in tags or 257 not in tags:
            return ImageRejected("corrupt", "a TIFF without a width and a height")
        names = {"compression": _COMPRESSION, "photometric": _PHOTOMETRIC, "bits": _BITS, "format": _SAMPLE_FORMAT}
        found = {name: _numbers(tags, tag) for name, tag in {**names, "extra samples": _EXTRA_SAMPLES}.items()}
        text = ", ".join(f"{name} {' '.join(map(str, numbers[:8]))}" for name, numbers in found.items() if numbers)
        return ImageRejected("unsupported", f"TIFF with {text}")
    except Exception as error:  # the parser raises SyntaxError, struct.error, KeyError, ... on bad blocks
        return ImageRejected("corrupt", f"a TIFF whose directory cannot be read: {error}")


def check_deflated(data: bytes, image: TiffImageFile) -> None:
    """Raise `ImageRejected` (`corrupt`) when strips or tiles in deflate compression have a wrong checksum (Adler-32).

    libtiff stops at the last sample and does not read the checksum behind it. Other compressions have none.
    """
    tags: Any = image.tag_v2
    if image.info.get("compression") not in ("tiff_adobe_deflate", "tiff_deflate"):
        return
    tiled = _TILE_OFFSETS in tags
    offsets, sizes = (_numbers(tags, tag) for tag in ((_TILE_OFFSETS, _TILE_SIZES) if tiled else _STRIPS))
    reverse = _FILL_ORDER in tags and tags[_FILL_ORDER] == 2
    left = 2**20 + 16 * image.width * image.height  # 8 bytes for a pixel, and as much for the edges of tiles
    for start, size in zip(offsets, sizes, strict=False):
        inflater, rest = zlib.decompressobj(), data[start : start + size]
        rest = rest.translate(_REVERSED) if reverse else rest
        while rest and left > 0 and not inflater.eof:
            try:
                left -= len(inflater.decompress(rest, 2**20))
            except zlib.error as error:
                raise ImageRejected("corrupt", f"a strip or tile of the TIFF: {error}") from None
            rest = inflater.unconsumed_tail


def _check_ycbcr(image: TiffImageFile, tags: Any, raw: bool) -> None:
    """libtiff reads all kinds. Pillow's own code for uncompressed files knows only one sample for each pixel."""
    if image.mode == "L":
        raise ImageRejected("unsupported", "TIFF in YCbCr with one sample per pixel")
    if not raw:
        return
    if _numbers(tags, _SUBSAMPLING, 2, 2) != (1, 1):
        raise ImageRejected("unsupported", "uncompressed TIFF in YCbCr with subsampling")
    reference = _floats(tags, _REFERENCE, (0, 255, 128, 255, 128, 255))
    coefficients = _floats(tags, _COEFFICIENTS, (0.299, 0.587, 0.114))
    if not np.allclose(reference, (0, 255, 128, 255, 128, 255), atol=1) or not np.allclose(
        coefficients, (0.299, 0.587, 0.114), atol=0.002
    ):
        raise ImageRejected("unsupported", "uncompressed TIFF in YCbCr with its own ranges or coefficients")


def _prepare_planes(image: TiffImageFile, tags: Any, bits: int, raw: bool) -> None:
    """Pillow's own code reads planes of 8-bit samples only. libtiff reads the others."""
    extra = _numbers(tags, _EXTRA_SAMPLES)
    if image.mode in ("LA", "La", "PA"):
        raise ImageRejected("unsupported", "TIFF with grey or palette and alpha in separate planes")
    if raw and (bits > 8 or 1 in extra):
        mode = _PLANAR_MODES.get((image.mode, extra))
        if mode is None:
            raise ImageRejected("unsupported", f"TIFF with {bits}-bit samples in separate planes, {image.mode}")
        _check_unloaded(image)
        use_libtiff(image, f"{mode};16N" if bits == 16 else mode)


def _check_unloaded(image: TiffImageFile) -> None:
    if not image.tile:
        raise ImageRejected("unsupported", "TIFF that Pillow has loaded, and read wrongly: give the file's bytes")


def _check_offsets(image: TiffImageFile, tags: Any) -> None:
    """Pillow leaves black what no strip covers, and reads a strip that was never written from the file's start.

    libtiff does the same in compressions that read any bytes, such as PackBits.
    """
    down, across = image.tag_v2[257], image.tag_v2[256]
    if _STRIP_OFFSETS in tags:
        offsets, width, height = tags[_STRIP_OFFSETS], across, tags.get(_ROWS_PER_STRIP, down)
    else:
        offsets, width, height = (tags.get(tag, ()) for tag in (_TILE_OFFSETS, _TILE_WIDTH, _TILE_LENGTH))
    if not offsets:
        raise ImageRejected("unsupported", "TIFF that does not say where its strips or tiles are")
    if not width or not height:
        raise ImageRejected("corrupt", "a TIFF with strips or tiles of no size")
    planes = len(image.getbands()) if _numbers(tags, _PLANAR, 1)[0] == _SEPARATE else 1
    if len(offsets) < -(-across // width) * -(-down // height) * planes:
        raise ImageRejected("truncated", "a TIFF with fewer strips or tiles than its size needs")
    if not all(offsets):
        raise ImageRejected("unsupported", "TIFF with strips or tiles that were left out (sparse)")


def _read_scale(image: TiffImageFile, tags: Any, photometric: int, bits: int) -> GreyScale:
    """Read the range of the samples. A file with 12-bit samples in 16 bits says so in MaxSampleValue only.

    That tag may also be the largest sample of this image, which must not change its look. A value of 2^n - 1 is taken
    for a range in 16-bit grey; other values there, and any such range elsewhere, are ambiguous.
    """
    top = 2**bits - 1
    most = max(_numbers(tags, _MAX_SAMPLE, top) + _numbers(tags, _MAX_SAMPLE_SIGNED, 0))
    is_range = (most & (most + 1)) == 0
    grey = image.mode.startswith("I;16")
    if 0 < most < top and (bits > 8 or is_range):
        if not (grey and is_range and most > 255):
            raise ImageRejected("unsupported", f"TIFF with {bits}-bit samples and a MaxSampleValue of {most}")
        top = most
    return GreyScale(top if grey else 65535, photometric == _WHITE_IS_ZERO)


def _numbers(tags: Any, tag: int, *default: int) -> tuple[int, ...]:
    """A tag's integers; the default for a tag that is missing or has another type."""
    found = tags.get(tag, default)
    found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    return found if found and all(isinstance(number, int) for number in found) else default


def _floats(tags: Any, tag: int, default: tuple[float, ...]) -> tuple[float, ...]:
    found = tags.get(tag, default)
    return tuple(map(float, found)) if isinstance(found, tuple) and len(found) == len(default) else default
