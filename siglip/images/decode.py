"""Decoding: encoded bytes to the pixels that the model takes, or a reason for the rejection.

All images are decoded here. The batch job and the endpoint call this code through `siglip.images.decoder`, which runs
it in a process of its own.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from siglip.config import ImageSpec, Limits
from siglip.images.color import promises_alpha, to_rgb
from siglip.images.formats.jpeg import check_padding, close_jpeg, decode_jpeg
from siglip.images.formats.png import check_rows, find_transparent
from siglip.images.formats.tiff import GreyScale, check_deflated, prepare_tiff
from siglip.images.opening import (
    FORMATS,
    Opened,
    check_webp_end,
    covered_by_frame,
    is_cut,
    open_image,
    readable_suffixes,
    reopen,
)
from siglip.images.patches import fit_grid, pack_patches
from siglip.images.pillow_internals import set_orientation
from siglip.images.rejection import REASONS, ImageRejected

__all__ = [
    "FORMATS",
    "REASONS",
    "DecodeMode",
    "Decoded",
    "ImageRejected",
    "decode_image",
    "readable_suffixes",
    "resize_image",
]

DecodeMode = Literal["auto", "exact", "fast"]
_SHRINK: dict[DecodeMode, tuple[int, int]] = {"auto": (4, 4), "exact": (0, 1), "fast": (2, 8)}
"""By mode: each side that libjpeg leaves must be at least so many times the model's size, and it may shrink at most by
so much."""

_MOST_THUMBNAIL = 65500
"""Most pixels at a side of a JPEG that libjpeg writes (JPEG_MAX_DIMENSION)."""


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    `pixels` is uint8 of the spec's `shape`, not yet scaled to the model's range. `width` and `height` are those of the
    upright image, after its EXIF orientation was applied. `thumbnail` is a JPEG or None. `seconds` is the time that a
    decoder process took, and 0 where it is not known.
    """

    pixels: np.ndarray
    width: int
    height: int
    thumbnail: bytes | None = None
    seconds: float = 0.0


def decode_image(
    data: bytes,
    spec: ImageSpec,
    limits: Limits,
    mode: DecodeMode = "exact",
    thumbnail: int | None = None,
    out: np.ndarray | None = None,
) -> Decoded:
    """Decode `data` and resize it to what the model sees, which is in `out` if that is given.

    For most models that is a square, and the aspect ratio is not kept. For NaFlex models it is a grid of patches, in
    the proportions of the upright image.

    EXIF orientation is applied; EXIF that cannot be parsed is ignored. Alpha is composited on white, palettes and CMYK
    are converted to RGB, and 16-bit samples are rescaled to 8 bits. Of an animation the first frame is used. Colour
    profiles are ignored, as SigLIP's reference preprocessing ignores them. A variant of a format that would come out as
    another picture is rejected as `unsupported`. Data that a file has beside its pixels can be broken and cost nothing.

    libjpeg can shrink a JPEG to a half, a quarter or an eighth while it decodes, which is less work. `exact` does not
    use that. `auto` shrinks to no less than a quarter, and to no less than four times the model's size: for photos,
    drawings and pages of text the cosine of the embedding to that of `exact` was 0.99998 or more (for checkerboards
    with fields of a few pixels, 0.9998). `fast` shrinks to no less than twice the model's size, which changes
    embeddings a little more. `thumbnail` is the longer side, in pixels, of a JPEG thumbnail that is made too: at most
    65500.

    This function does not guard against a decoder that crashes or hangs: `siglip.images.decoder` does. Pillow warns
    about odd files through Python's `warnings`; these warnings are not suppressed here, because that would change the
    state of the whole process. Where they are turned into errors, such a file is rejected as `corrupt`.

    Raises `ImageRejected`, and `ValueError` for a thumbnail that is no size.
    """
    from siglip.images.resize import QUARTER_TURNS  # needs torch: not for processes that only call a decoder

    if thumbnail is not None and not 0 <= thumbnail <= _MOST_THUMBNAIL:
        raise ValueError(f"thumbnail={thumbnail}: a JPEG has at most {_MOST_THUMBNAIL} pixels at a side")
    if not data:
        raise ImageRejected("empty")
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"{len(data)} bytes, over {limits.max_bytes}")
    try:
        opened = open_image(data, limits.max_pixels)
        width, height = opened.image.size
        if width * height > limits.max_pixels:
            raise ImageRejected("too_many_pixels", f"{width} x {height}, over {limits.max_pixels}")
        orientation = _read_orientation(opened.image)
        sideways = orientation in QUARTER_TURNS
        if sideways:
            width, height = height, width
        size = _choose_size(width, height, spec)
        shrink = _choose_shrink(opened, mode, size[::-1] if sideways else size, thumbnail or 0)
        pixels = _decode(opened, shrink)
        seen = _resize(pixels, size, spec, orientation, out)
        small = _encode_thumbnail(pixels, orientation, thumbnail) if thumbnail else None
    except Exception as error:
        raise _as_rejection(error, data) from None
    return Decoded(seen, width, height, small)


def resize_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize an image that Pillow holds as `decode_image` does with a file's: upright RGB, uint8 of the spec's `shape`.

    `image` is not changed. Only `decode_image` compares checksums, finds zeros at the end of a file, and has white
    where the first frame of a WebP has no pixels (Pillow has black). Raises `ImageRejected`, also for a file that
    Pillow has opened and cannot read.
    """
    from siglip.images.resize import QUARTER_TURNS

    try:
        scale = prepare_tiff(image) if isinstance(image, TiffImageFile) else GreyScale()
        _check_key_color(image)
        covered = covered_by_frame(image)
        # The copy is loaded, and has no file format, so `_read_orientation` treats it like any other image.
        copy = image.copy()
        orientation = _read_orientation(copy)
        pixels = np.asarray(to_rgb(copy, scale, sure_of_alpha=promises_alpha(image)))
        pixels = _clear_uncovered(pixels, covered)
        height, width = pixels.shape[1::-1] if orientation in QUARTER_TURNS else pixels.shape[:2]
        size = _choose_size(width, height, spec)
    except Exception as error:
        raise _as_rejection(error, b"") from None
    return _resize(pixels, size, spec, orientation)


def _choose_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Return the width and height, in pixels, that an upright image is resized to. Raises `ImageRejected`."""
    if spec.size is not None:
        return spec.size, spec.size
    assert spec.patches is not None
    rows, columns = fit_grid(width, height, spec.patches)
    if rows * columns > spec.patches.count:
        raise ImageRejected("unsupported", f"{width} x {height} is too long for {spec.patches.count} patches")
    return columns * spec.patches.size, rows * spec.patches.size


def _resize(
    pixels: np.ndarray, size: tuple[int, int], spec: ImageSpec, orientation: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Turn RGB pixels upright and resize them to `size` (width, height): uint8 of the spec's `shape`, in `out`."""
    from siglip.images.resize import resize

    if spec.patches is None:
        return resize(pixels, size, spec.resample, orientation, out)
    return pack_patches(resize(pixels, size, spec.resample, orientation), spec.patches, out)


def _check_key_color(image: Image.Image) -> None:
    """Reject a PNG that Pillow has opened, and whose transparent colour it would compare at the wrong depth."""
    layouts = [str(tile.args) for tile in image.tile] if isinstance(image, PngImageFile) else []
    if "transparency" in image.info and layouts and layouts[0] in ("L;2", "L;4", "RGB;16B"):
        raise ImageRejected(
            "unsupported", "PNG whose transparent colour Pillow compares wrongly: give the file's bytes"
        )


def _as_rejection(error: Exception, data: bytes) -> ImageRejected:
    """The rejection for an error of Pillow or of a library below it."""
    text = str(error)
    if isinstance(error, ImageRejected):
        return error
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):  # where those are errors
        return ImageRejected("too_many_pixels", f"{text}: Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS")
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return ImageRejected("out_of_memory", text)
    if text.startswith(("Unsupported BMP", "codec configuration error")):
        return ImageRejected("unsupported", text)
    if isinstance(error, (OSError, EOFError)):
        early = is_cut(data) or isinstance(error, EOFError) or "truncated" in text.lower()
        return ImageRejected("truncated" if early else "corrupt", text)
    # Pillow's plugins raise ValueError, SyntaxError, struct.error, ... on bad bytes.
    return ImageRejected("truncated" if is_cut(data) else "corrupt", f"{type(error).__name__}: {text}")


def _choose_shrink(opened: Opened, mode: DecodeMode, size: tuple[int, int], thumbnail: int) -> int:
    """The factor by which libjpeg is to shrink the image: 1, 2, 4 or 8. `size` is the model's, as the file lies."""
    if opened.jpeg is None or not opened.jpeg.shrinkable:
        return 1
    sides, most = _SHRINK[mode]
    width, height = opened.image.size
    across, down = size
    fit = [
        n
        for n in (2, 4, 8)
        if width // n >= sides * across and height // n >= sides * down and max(width, height) // n >= thumbnail
    ]
    return max((n for n in fit if n <= most), default=1)


def _decode(opened: Opened, shrink: int) -> np.ndarray:
    """Decode an opened image to uint8 (H, W, 3), RGB. A JPEG is `shrink` times smaller, or as large as it is.

    Pillow is not asked to shrink: in a damaged JPEG, samples out of range become others when libjpeg shrinks.
    """
    image = opened.image
    if opened.jpeg is not None:
        pixels = decode_jpeg(opened.data, opened.jpeg, shrink)
        if pixels is None and (closed := close_jpeg(opened.data, opened.jpeg)) is not opened.data:
            pixels = decode_jpeg(closed, opened.jpeg, shrink)
            image = reopen(opened, closed)
        if pixels is not None:
            return pixels
    image.load()
    pixels = np.asarray(to_rgb(image, opened.scale, sure_of_alpha=promises_alpha(image)))
    if opened.jpeg is not None:
        check_padding(opened.data, opened.jpeg, pixels)
    if opened.png is not None:
        check_rows(opened.png, image)
        transparent = find_transparent(opened.png, image)
        if transparent is not None:
            pixels = np.where(transparent[:, :, None], np.uint8(255), pixels)
    if isinstance(image, TiffImageFile):
        check_deflated(opened.data, image)
    if image.format == "WEBP":
        check_webp_end(opened.data)
    return _clear_uncovered(pixels, opened.covered)


def _clear_uncovered(pixels: np.ndarray, covered: tuple[int, int, int, int] | None) -> np.ndarray:
    """White where the first frame of an animation has no pixels, as where it is transparent."""
    if covered is None:
        return pixels
    left, top, right, bottom = covered
    cleared = np.full_like(pixels, 255)
    cleared[top:bottom, left:right] = pixels[top:bottom, left:right]
    return cleared


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, that the caller must still apply to the pixels.

    It is 1 (nothing to do) if the orientation is missing, invalid or cannot be parsed. It is 1 for a HEIF image too,
    because the plugin has already turned its pixels, and for a TIFF, because Pillow turns the pixels when it loads
    them. Other formats than JPEG, TIFF and HEIF are loaded here; what a broken image raises then is raised.
    """
    from siglip.images.resize import ORIENTATIONS

    if image.format == "HEIF":
        return 1
    if not isinstance(image, (TiffImageFile, JpegImageFile)):
        # A PNG loads itself to find EXIF after its pixels. A second load of a broken PNG would give black pixels.
        image.load()
    try:
        if isinstance(image, TiffImageFile):
            found: object = image.tag_v2.get(ExifTags.Base.Orientation, 1)
        else:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
        orientation = next((known for known in ORIENTATIONS if known == found), 1)
    except Exception:  # the parser raises SyntaxError, struct.error, UnicodeDecodeError, ... on bad blocks
        orientation = 1
    if not isinstance(image, TiffImageFile):
        return orientation
    set_orientation(image, orientation)
    return 1


def _encode_thumbnail(pixels: np.ndarray, orientation: int, side: int) -> bytes:
    """A JPEG of the upright image whose longer side is at most `side` pixels, never enlarged."""
    from siglip.images.resize import QUARTER_TURNS, resize

    down, across = pixels.shape[1::-1] if orientation in QUARTER_TURNS else pixels.shape[:2]
    scale = min(1.0, side / max(across, down))
    size = max(1, round(scale * across)), max(1, round(scale * down))
    buffer = io.BytesIO()
    small = resize(pixels, size, Image.Resampling.BICUBIC, orientation)
    Image.fromarray(small).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
