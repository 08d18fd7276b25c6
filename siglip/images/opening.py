"""Opening: from a file's bytes to an image that Pillow has opened and not yet decoded, or a reason for the rejection.

What a file holds beside its pixels, such as texts, previews and colour profiles, can never cost an image. A broken
block of that kind is left out, also one that Pillow does not accept.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from PIL import Image
from PIL.TiffImagePlugin import PREFIXES, TiffImageFile

from siglip.images.formats.bmp import prepare_bmp
from siglip.images.formats.heif import check_coded, read_items
from siglip.images.formats.jpeg import JpegHeader, read_header, strip_jpeg
from siglip.images.formats.png import SIGNATURE, Png, read_png
from siglip.images.formats.signatures import is_text, name_unread_format
from siglip.images.formats.tiff import GreyScale, check_first_page, explain_tiff, prepare_tiff
from siglip.images.formats.webp import read_first_frame, shorten_webp, strip_webp
from siglip.images.pillow_internals import hide_exif, open_format
from siglip.images.rejection import ImageRejected

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are opened, and HEIF where its extra is installed. Pillow registers over forty. Most of the others
are rarely tested against hostile files."""

_SUFFIXES = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_HEIF_SUFFIXES = frozenset(["heic", "heif"])
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
_STRUCTURE_BRANDS = frozenset([b"mif1", b"msf1"])
"""Brands that do not say how the pixels are coded. A decoder does not open a file that has no other."""
_AVIF_BRANDS = frozenset([b"avif", b"avis"])

_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of what Git has in place of a file that is in Git LFS."""


@cache
def readable_suffixes() -> frozenset[str]:
    """The file suffixes, in lower case and without a dot, of formats that this machine can decode."""
    return _SUFFIXES | _HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else _SUFFIXES


@dataclass
class Opened:
    """An image that Pillow has opened, the bytes that it was given, and what is known of the file beyond Pillow.

    `covered` is the part of the image that the first frame covers: left, top, right, bottom. None is all of it.
    """

    image: Image.Image
    data: bytes
    jpeg: JpegHeader | None = None
    png: Png | None = None
    scale: GreyScale = field(default_factory=GreyScale)
    covered: tuple[int, int, int, int] | None = None


def open_image(data: bytes, max_pixels: int) -> Opened:
    """Open an image without decoding it. The caller must not decode one that has more than `max_pixels`.

    Raises `ImageRejected`, or what Pillow raises for a broken file.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _open_jpeg(data)
    if name := name_unread_format(data):
        raise ImageRejected("unsupported", name)
    if data.startswith(SIGNATURE):
        png = read_png(data)
        return Opened(_open_one(png.data, "PNG"), png.data, png=png)
    if data.startswith(b"BM") and not is_text(data):
        return Opened(_open_one(prepare_bmp(data, max_pixels), "BMP"), data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _open_webp(data)
    if data[4:8] == b"ftyp":
        return _open_ftyp(data)
    if data.startswith((*PREFIXES, b"MM\0\x2b")):
        return _open_tiff(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        image = _open_one(data, "GIF")
        return Opened(image, data, covered=covered_by_frame(image))
    if data.startswith(_POINTER):
        raise ImageRejected(
            "not_an_image", "a Git LFS pointer: the image was not fetched (git lfs pull), or not uploaded"
        )
    raise ImageRejected("not_an_image", f"starts with {data[:8].hex()}")


def reopen(opened: Opened, data: bytes) -> Image.Image:
    """Open other bytes of the same file and format."""
    return _open_one(data, str(opened.image.format).replace("MPO", "JPEG"))


def _open_jpeg(data: bytes) -> Opened:
    header = read_header(data)
    image, kept = _open_first(
        "JPEG", lambda: data, lambda: strip_jpeg(data, header, True), lambda: strip_jpeg(data, header, False)
    )
    header = header if kept is data else read_header(kept)
    if image.size != (header.width, header.height):
        raise ImageRejected(
            "corrupt", f"a JPEG of {header.width} x {header.height}, or of {image.width} x {image.height}"
        )
    return Opened(image, kept, jpeg=header)


def _open_tiff(data: bytes) -> Opened:
    try:
        image = _open_one(data, "TIFF")
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception:  # Pillow raises KeyError, TypeError, ... for variants that it does not know
        raise explain_tiff(data) from None
    assert isinstance(image, TiffImageFile)
    check_first_page(image)
    return Opened(image, data, scale=prepare_tiff(image))


def covered_by_frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The part of a GIF that its first frame covers. Browsers show the rest as transparent, Pillow in a colour."""
    box = getattr(image, "dispose_extent", None) if image.format == "GIF" and image.tell() == 0 else None
    return None if box is None or box == (0, 0, *image.size) else box


def _open_webp(data: bytes) -> Opened:
    image, kept = _open_first("WEBP", lambda: data, lambda: strip_webp(data))
    frame = read_first_frame(kept)
    return Opened(image, kept, covered=frame.covered if frame else None)


def check_webp_end(data: bytes) -> None:
    """Raise `ImageRejected` (`truncated`) for a WebP that ends in many zeros which its pixels do not need.

    It is decoded a second time for that. This is for after the check of its size.
    """
    frame = read_first_frame(data)
    if frame is not None and frame.lonely:
        raise ImageRejected("truncated", "the WebP ends in zeros behind its first frame")
    if frame is None or (short := shorten_webp(frame)) is None:
        return
    try:
        _open_one(short, "WEBP").load()
    except MemoryError:
        raise
    except Exception:  # the decoder needs the zeros
        return
    raise ImageRejected("truncated", "the WebP ends in zeros that are not pixels")


def _open_ftyp(data: bytes) -> Opened:
    """AVIF or HEIC. Both start with the box `ftyp`. The types of their items say which it is, or else its brands.

    Decoders look at the brands alone, so a file that has the brand of neither gets others.
    """
    brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(int.from_bytes(data[:4], "big"), 256), 4))}
    items = read_items(data)
    types = {item.type for item in items}
    if (b"av01" in types) != (b"hvc1" in types):
        format = "AVIF" if b"av01" in types else "HEIF"
    elif brands & _AVIF_BRANDS or brands & _HEIF_BRANDS:
        format = "AVIF" if brands & _AVIF_BRANDS else "HEIF"
    elif types:
        names = sorted(name.decode("latin-1") for name in types if name.isalnum())
        raise ImageRejected("unsupported", f"HEIF with items of the types {', '.join(names[:8])}")
    else:
        raise ImageRejected("not_an_image", f"starts with {data[:12].hex()}")
    if format == "HEIF":
        if "heic" not in readable_suffixes():
            raise ImageRejected("unsupported", "HEIC: install sightline[heic]")
        _register_heif()
    end = int.from_bytes(data[:4], "big")
    if not brands & (_AVIF_BRANDS if format == "AVIF" else _HEIF_BRANDS - _STRUCTURE_BRANDS) and 16 <= end <= len(data):
        brand = b"avif" if format == "AVIF" else b"heic"
        data = data[:8] + brand + data[12:16] + brand * ((end - 16) // 4) + data[end - end % 4 : end] + data[end:]
    if not is_cut(data):
        check_coded(data, items)
    return Opened(*_open_first(format, lambda: data, lambda: hide_exif(data) or data))


def _open_first(format: str, *versions: Callable[[], bytes]) -> tuple[Image.Image, bytes]:
    """Open the first version of a file that Pillow accepts, and return it. Raises what the first one raised."""
    first: Exception | None = None
    for version in versions:
        data = version()
        try:
            return _open_one(data, format), data
        except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise
        except Exception as error:  # Pillow's plugins raise ValueError, SyntaxError, struct.error, ... on bad bytes
            first = first or error
    assert first is not None
    raise first


def _open_one(data: bytes, format: str) -> Image.Image:
    try:
        return open_format(data, format)
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        reason = "truncated" if is_cut(data) else "corrupt"
        raise ImageRejected(reason, f"Pillow does not accept the {format}'s header: {error}") from None


def is_cut(data: bytes) -> bool:
    """Whether a WebP, AVIF or HEIC is shorter than it says. Decoders call all broken files of these formats the same.

    False for other formats.
    """
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    position = 0
    while data[4:8] == b"ftyp" and position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:  # 0 is "to the end of the file"
            return False
        position += size
    return position > len(data)


@cache
def _register_heif() -> None:
    """Load the HEIF library. Called with the first HEIC only: the library is large, and most jobs have none."""
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)
