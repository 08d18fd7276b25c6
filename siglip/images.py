"""Encoded bytes to the pixels that the model sees, or a reason why not.

This is the one place where an image is decoded. Both doors use it, the batch job and the endpoint, each
through `siglip.decoder`, which runs it in a process of its own.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from siglip.config import ImageSpec, Limits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened. Pillow registers over forty, most of them rarely fuzzed."""

DecodeMode = Literal["exact", "fast"]

_ORIENTATION = 0x0112
"""EXIF's tag."""
_QUARTER_TURNS = (5, 6, 7, 8)

_SUFFIXES = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])


def readable_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and without a dot, of what can be decoded on this machine."""
    return _SUFFIXES


REASONS: dict[str, str] = {
    "empty": "the image has no bytes",
    "too_many_bytes": "the encoded image is larger than limits.max_bytes",
    "too_many_pixels": "width x height is over limits.max_pixels; nothing was decoded",
    "not_an_image": "the bytes are not a JPEG, PNG, WebP, GIF, BMP or TIFF",
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
"""Every reason that a reject row can carry, with its meaning. Nothing else is ever written."""


class ImageRejected(Exception):
    """An image that cannot be tagged. `reason` is a key of `REASONS`, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is not a documented reason")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    `pixels` is uint8 (S, S, 3), RGB, not yet scaled to the model's range. `width` and `height` are those of the
    upright image, after its EXIF orientation was applied. `thumbnail` is a JPEG or None.
    """

    pixels: np.ndarray
    width: int
    height: int
    thumbnail: bytes | None = None


def decode_image(
    data: bytes, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
) -> Decoded:
    """Decode `data` and squash it to the model's square.

    Orientation by EXIF is applied, alpha is composited on white, palettes and CMYK are converted, 16-bit samples
    are rescaled to 8 bits, and of an animation the first frame counts. Colour profiles are ignored, as they are in
    the reference. `fast` lets libjpeg shrink a JPEG while decoding it, to no less than twice the model's size:
    two to five times faster on photos, and slightly different pixels.

    It does not guard against a decoder that crashes or hangs: `siglip.decoder` does.

    Raises `ImageRejected`.
    """
    if not data:
        raise ImageRejected("empty")
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"{len(data)} bytes, over {limits.max_bytes}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ImageRejected("too_many_pixels", f"{width} x {height}, over {limits.max_pixels}")
            if mode == "fast" and image.format == "JPEG":
                image.draft("RGB", (2 * spec.size, 2 * spec.size))
            image.load()
            orientation = image.getexif().get(_ORIENTATION, 1)  # read now: loading a TIFF turns it, and drops the tag
            if orientation in _QUARTER_TURNS:
                width, height = height, width
            upright = _to_rgb(image, orientation)
            square = upright.resize((spec.size, spec.size), resample=Image.Resampling(spec.resample))
            small = _encode_thumbnail(upright, thumbnail) if thumbnail else None
        except ImageRejected:
            raise
        except UnidentifiedImageError:
            raise ImageRejected("not_an_image", f"starts with {data[:8].hex()}") from None
        except Image.DecompressionBombError as error:
            raise ImageRejected("too_many_pixels", str(error)) from None
        except (OSError, EOFError) as error:
            raise ImageRejected("truncated" if _ends_early(data, error) else "corrupt", str(error)) from None
        except MemoryError:
            raise ImageRejected("corrupt", "the decoder ran out of memory") from None
        except Exception as error:  # Pillow's plugins raise ValueError, SyntaxError, struct.error, ... on bad bytes
            raise ImageRejected("corrupt", f"{type(error).__name__}: {error}") from None
    return Decoded(np.asarray(square), width, height, small)


def _ends_early(data: bytes, error: Exception) -> bool:
    """Whether the file is short. Pillow says so in its message, or raises EOFError; of a WebP it does not know."""
    short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    return short_riff or isinstance(error, EOFError) or "truncated" in str(error).lower()


def _to_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, opaque, 8-bit RGB: the image that SigLIP's own preprocessing would be given."""
    if image.mode in ("I", "F"):
        raise ImageRejected("unsupported_pixels", f"mode {image.mode}")
    if image.mode.startswith("I;16"):
        image = _rescale_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if orientation == 1:
        return rgb
    # The conversions above may drop the EXIF block, so the orientation read first is put back for Pillow to apply.
    rgb.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(rgb)


def _rescale_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit: 65535 becomes 255 (Pillow's own conversion clips everything above 255 to white)."""
    samples = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _encode_thumbnail(image: Image.Image, side: int) -> bytes:
    """A JPEG whose longer side is at most `side` pixels, never enlarged."""
    small = image.copy()
    small.thumbnail((side, side), resample=Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
