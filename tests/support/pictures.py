"""Pictures that look like photos to a perceptual hash, and copies of them as people make them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw


def draw_picture(rng: np.random.Generator, side: int = 128) -> Image.Image:
    """Draw smooth colours with some ellipses. Two of them differ as two photos do."""
    rows, columns = rng.integers(3, 12, 2)
    small = rng.integers(0, 256, (rows, columns, 3), np.uint8)
    image = Image.fromarray(small).resize((side, int(side * rng.uniform(0.6, 1))), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 8)):
        x, y, width, height = rng.integers(0, side, 4).tolist()
        pen.ellipse([x, y, x + width // 2 + 3, y + height // 2 + 3], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encode_jpeg(image: Image.Image, quality: int = 85) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_again(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    with Image.open(io.BytesIO(encode_jpeg(image, 40))) as again:
        return again.convert("RGB")


def shrink(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.resize((image.width // 2 + 3, image.height // 2 + 3))


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut 5 % away, at one edge or at two opposite ones."""
    left, top = rng.uniform(0, 0.05, 2)
    return image.crop(
        (
            round(image.width * left),
            round(image.height * top),
            round(image.width * (0.95 + left)),
            round(image.height * (0.95 + top)),
        )
    )


def mark(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    marked = image.copy()
    pen = ImageDraw.Draw(marked)
    pen.text((image.width * 0.5, image.height * 0.85), "(c) example.com", fill=(255, 255, 255))
    pen.rectangle([image.width * 0.02, image.height * 0.02, image.width * 0.15, image.height * 0.08], fill=(200,) * 3)
    return marked


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "encoded again": encode_again,
    "resized": shrink,
    "cropped": crop,
    "marked": mark,
}
