"""Decoding: encoded bytes to the pixels that the model takes, or a reason for the rejection.

All images are decoded here. The batch job and the endpoint call this code through `siglip.images.decoder`, which runs
it in a process of its own.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from siglip.config import ImageSpec, Limits
from siglip.images.pillow_internals import hide_exif, set_orientation

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are opened, and HEIF where its extra is installed. Pillow registers over forty. Most of the others
are rarely tested against hostile files."""

DecodeMode = Literal["auto", "exact", "fast"]
_SHRINK: dict[DecodeMode, tuple[int, int]] = {"auto": (4, 4), "exact": (0, 1), "fast": (2, 8)}
"""By mode: each side that libjpeg leaves must be at least so many times the model's size, and it may shrink at most by
so much."""

_SUFFIXES = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_HEIF_SUFFIXES = frozenset(["heic", "heif"])
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])


@cache
def readable_suffixes() -> frozenset[str]:
    """The file suffixes, in lower case and without a dot, of formats that this machine can decode."""
    return _SUFFIXES | _HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else _SUFFIXES


REASONS: dict[str, str] = {
    "empty": "the image has no bytes",
    "too_many_bytes": "the encoded image is larger than limits.max_bytes",
    "too_many_pixels": "width x height is over limits.max_pixels; nothing was decoded",
    "not_an_image": "the bytes are not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (or HEIC, with sightline[heic])",
    "unsupported_pixels": "32-bit integer or float samples, which have no defined range to scale from",
    "truncated": "the image ends early",
    "corrupt": "the decoder gave up on the bytes",
    "decoder_crashed": "the decoder's process died on this image",
    "decoder_timeout": "decoding took longer than limits.max_seconds",
    "missing": "the row holds no image, or the object that it names is not there",
    "changed": "the object was replaced after it was planned, and on_changed is retag: its new version is a row",
    "unreadable": "the object that the row names could not be read",
    "truncated_archive": "the tar ends early: images after this point are lost",
    "corrupt_archive": "the tar or Parquet file cannot be read from this point on",
}
"""Every reason that a reject row can have, with its meaning."""


class ImageRejected(Exception):
    """An image that cannot be tagged. `reason` is a key of `REASONS`. `detail` is a text for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is not a documented reason")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.index: int | None = None
        """The image's index in the list that `sightline.Encoder.images` was called with. None elsewhere."""

    def __str__(self) -> str:
        """One line: the index if it is known, the reason, and the detail if there is one."""
        where = "" if self.index is None else f"image {self.index}: "
        return f"{where}{self.reason}: {self.detail or REASONS[self.reason]}"


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    `pixels` is uint8 (S, S, 3), RGB, not yet scaled to the model's range. `width` and `height` are those of the
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
    """Decode `data` and resize it to the model's square, without keeping the aspect ratio; in `out` if that is given.

    EXIF orientation is applied; EXIF that cannot be parsed is ignored. Alpha is composited on white, palettes and CMYK
    are converted to RGB, and 16-bit samples are rescaled to 8 bits. Of an animation the first frame is used. Colour
    profiles are ignored, as SigLIP's reference preprocessing ignores them.

    libjpeg can shrink a JPEG to a half, a quarter or an eighth while it decodes, which is less work. `exact` does not
    use that. `auto` shrinks to no less than a quarter, and to no less than four times the model's size: for photos,
    drawings and pages of text the cosine of the embedding to that of `exact` was 0.99998 or more (for checkerboards
    with fields of a few pixels, 0.9998). `fast` shrinks to no less than twice the model's size, which changes
    embeddings a little more. `thumbnail` is the longer side, in pixels, of a JPEG thumbnail that is made too.

    This function does not guard against a decoder that crashes or hangs: `siglip.images.decoder` does. Pillow warns
    about odd files through Python's `warnings`; these warnings are not suppressed here, because that would change the
    state of the whole process. Where they are turned into errors, such a file is rejected as `corrupt`.

    Raises `ImageRejected`.
    """
    from siglip.images.resize import QUARTER_TURNS, resize  # needs torch: not for processes that only call a decoder

    if not data:
        raise ImageRejected("empty")
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"{len(data)} bytes, over {limits.max_bytes}")
    try:
        image = _open(data)
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageRejected("too_many_pixels", f"{width} x {height}, over {limits.max_pixels}")
        orientation = _read_orientation(image)
        shrink = _choose_shrink(image, mode, spec.size, thumbnail or 0)
        pixels = _decode_jpeg(image, data, shrink)
        if pixels is None:
            if shrink > 1:
                image.draft("RGB", (width // shrink, height // shrink))
            image.load()
            pixels = np.asarray(_to_rgb(image))
        if orientation in QUARTER_TURNS:
            width, height = height, width
        square = resize(pixels, (spec.size, spec.size), spec.resample, orientation, out)
        small = _encode_thumbnail(pixels, orientation, thumbnail) if thumbnail else None
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        raise ImageRejected("not_an_image", f"starts with {data[:8].hex()}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning where those are errors
        raise ImageRejected("too_many_pixels", str(error)) from None
    except (OSError, EOFError) as error:
        raise ImageRejected("truncated" if _ends_early(data, error) else "corrupt", str(error)) from None
    except MemoryError:
        raise ImageRejected("corrupt", "the decoder ran out of memory") from None
    except Exception as error:  # Pillow's plugins raise ValueError, SyntaxError, struct.error, ... on bad bytes
        raise ImageRejected("corrupt", f"{type(error).__name__}: {error}") from None
    return Decoded(square, width, height, small)


def resize_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize an image that Pillow holds as `decode_image` does with a file's: upright, RGB, uint8 (S, S, 3).

    `image` is not changed. Raises `ImageRejected`, also for a file that Pillow has opened and cannot read.
    """
    from siglip.images.resize import resize

    try:
        # The copy is loaded, and has no file format, so `_read_orientation` treats it like any other image.
        copy = image.copy()
        orientation = _read_orientation(copy)
        pixels = np.asarray(_to_rgb(copy))
    except (OSError, EOFError) as error:
        raise ImageRejected("truncated" if _ends_early(b"", error) else "corrupt", str(error)) from None
    return resize(pixels, (spec.size, spec.size), spec.resample, orientation)


def _ends_early(data: bytes, error: Exception) -> bool:
    """Whether the file is cut short. Pillow's message says so, or it raises EOFError; for a WebP it says neither."""
    short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    return short_riff or isinstance(error, EOFError) or "truncated" in str(error).lower()


def _open(data: bytes) -> Image.Image:
    """Open an image without decoding it. Raises `UnidentifiedImageError`, or `ImageRejected` for a HEIC."""
    formats = FORMATS
    if data[4:8] == b"ftyp":
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(int.from_bytes(data[:4], "big"), 256), 4))}
        if brands & _HEIF_BRANDS and not brands & {b"avif", b"avis"}:
            if "heic" not in readable_suffixes():
                raise ImageRejected("not_an_image", "HEIC: install sightline[heic]")
            _register_heif()
            formats = ("HEIF",)
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError:
            without_exif = hide_exif(data)
            if without_exif is None:
                raise
            return Image.open(io.BytesIO(without_exif), formats=formats)
    return Image.open(io.BytesIO(data), formats=formats)


@cache
def _register_heif() -> None:
    """Load the HEIF library. Called with the first HEIC only: the library is large, and most jobs have none."""
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)


def _choose_shrink(image: Image.Image, mode: DecodeMode, size: int, thumbnail: int) -> int:
    """The factor by which libjpeg is to shrink the image: 1, 2, 4 or 8."""
    if not isinstance(image, JpegImageFile):
        return 1
    sides, most = _SHRINK[mode]
    fit = [n for n in (2, 4, 8) if min(image.size) // n >= sides * size and max(image.size) // n >= thumbnail]
    return max((n for n in fit if n <= most), default=1)


def _decode_jpeg(image: Image.Image, data: bytes, shrink: int) -> np.ndarray | None:
    """Decode a JPEG with libjpeg directly, to uint8 (H, W, 3). None for an image that Pillow must decode.

    The pixels are those of Pillow, in two thirds of its time: Pillow has libjpeg write line by line, widens each pixel
    to four bytes, and NumPy packs them again. Pillow decodes images that are not a JPEG in RGB or grey, and images
    about which libjpeg reports a problem: Pillow then decides whether they are valid.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    width, height = (-(-side // shrink) for side in image.size)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, that the caller must still apply to the pixels.

    It is 1 (nothing to do) if the orientation is missing, invalid or cannot be parsed. It is 1 for a HEIF image too,
    because the plugin has already turned its pixels, and for a TIFF, because Pillow turns the pixels when it loads
    them. Other formats than JPEG, TIFF and HEIF are loaded here; what a broken image raises then is raised.
    """
    from siglip.images.resize import ORIENTATIONS

    if image.format == "HEIF":
        return 1
    if not isinstance(image, (TiffImagePlugin.TiffImageFile, JpegImageFile)):
        # A PNG loads itself to find EXIF after its pixels. A second load of a broken PNG would give black pixels.
        image.load()
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            found: object = image.tag_v2.get(ExifTags.Base.Orientation, 1)
        else:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
        orientation = next((known for known in ORIENTATIONS if known == found), 1)
    except Exception:  # the parser raises SyntaxError, struct.error, UnicodeDecodeError, ... on bad blocks
        orientation = 1
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return orientation
    set_orientation(image, orientation)
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Opaque 8-bit RGB, as SigLIP's own preprocessing would get it."""
    if image.mode in ("I", "F"):
        raise ImageRejected("unsupported_pixels", f"mode {image.mode}")
    if image.mode.startswith("I;16"):
        image = _rescale_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _rescale_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit: 65535 becomes 255 (Pillow's own conversion clips everything above 255 to white)."""
    samples = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


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
