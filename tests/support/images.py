"""Test images: every format and mode that needs care, each with the RGB image that decoding it must give."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image


def make_rgb(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Draw a smooth, asymmetric RGB image: every rotation and every flip of it is a different image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Encode an image, and return the bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_nearly_same(pixels: np.ndarray, expected: np.ndarray, levels: int = 1) -> None:
    """Check that two resized images, one by torch and one by Pillow, differ by rounding only.

    No value differs by more than `levels`, and less than 2% of the values differ at all.
    """
    difference = np.abs(pixels.astype(int) - expected.astype(int))
    assert difference.max() <= levels
    assert (difference > 0).mean() < 0.02


def plain_cases() -> Iterator[tuple[str, bytes, Image.Image]]:
    """Yield plain RGB images of many sizes: (name, bytes, the image as Pillow decodes it)."""
    for format, options in (("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"quality": 90})):
        for width, height in ((1, 1), (1, 5000), (5000, 1), (17, 31), (64, 64), (256, 256), (640, 427), (1500, 2000)):
            data = encode(make_rgb(width, height), format, **options)
            yield f"{format} {width}x{height}", data, Image.open(io.BytesIO(data)).convert("RGB")


def awkward_cases() -> Iterator[tuple[str, bytes, Image.Image]]:
    """Yield images that are not plain RGB: (name, bytes, the RGB image that decoding must give)."""
    rgb = make_rgb()
    white = Image.new("RGB", rgb.size, "white")
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, rgb.width, dtype=np.uint8), (rgb.height, 1)))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    on_white = Image.composite(rgb, white, alpha)
    yield "RGBA PNG", encode(rgba), on_white
    yield "RGBA WebP", encode(rgba, "WEBP", lossless=True, exact=True), on_white
    grey = rgb.convert("L")
    yield "LA PNG", encode(Image.merge("LA", (grey, alpha))), Image.composite(grey.convert("RGB"), white, alpha)
    yield (
        "L JPEG",
        encode(grey, "JPEG", quality=100),
        Image.open(io.BytesIO(encode(grey, "JPEG", quality=100))).convert("RGB"),
    )
    one_bit = rgb.convert("1")
    yield "1-bit PNG", encode(one_bit), one_bit.convert("RGB")
    palette = rgb.quantize(32)
    yield "palette PNG", encode(palette), palette.convert("RGB")
    hole = palette.info.get("transparency", 3)
    shown = np.asarray(palette) != hole
    yield (
        "palette PNG with a transparent color",
        encode(palette, transparency=hole),
        Image.composite(palette.convert("RGB"), white, Image.fromarray((shown * 255).astype(np.uint8))),
    )
    cmyk = encode(rgb.convert("CMYK"), "JPEG", quality=100)
    yield "CMYK JPEG", cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")
    wide = np.asarray(grey).astype(np.uint16) * 257
    yield "16-bit grey PNG", encode(Image.fromarray(wide)), grey.convert("RGB")
    yield "16-bit grey TIFF", encode(Image.fromarray(wide), "TIFF"), grey.convert("RGB")
    frames = [make_rgb(seed=n).quantize(64) for n in range(3)]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    yield "animated GIF", gif, Image.open(io.BytesIO(gif)).convert("RGB")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"EXIF orientation {orientation}", encode(rgb, exif=exif), rgb.transpose(turn)
        yield f"EXIF orientation {orientation}, TIFF", encode(rgb, "TIFF", exif=exif), rgb.transpose(turn)
        yield f"EXIF orientation {orientation}, RGBA", encode(rgba, exif=exif), on_white.transpose(turn)
