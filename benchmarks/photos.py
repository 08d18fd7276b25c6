"""Synthetic JPEGs that take as long to decode as photos, in tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_photo(rng: np.random.Generator, width: int = 640, height: int = 480, quality: int = 88) -> bytes:
    """Make a JPEG with smooth structure at several scales and some noise, as photos have. 90 kB at 640 x 480."""
    image = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((3, 90), (12, 50), (48, 25), (160, 12)):
        coarse = rng.random((cells, cells, 3), dtype=np.float32) * 255
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        image += (np.asarray(layer, np.float32) - 128) * weight / 128
    image += rng.normal(0, 6, image.shape).astype(np.float32) + 128
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_tars(
    folder: Path, tars: int, images: int, distinct: int = 64, size: tuple[int, int] = (640, 480), quality: int = 88
) -> list[bytes]:
    """Write `tars` tars of `images` images each, taken in turn from `distinct` photos. Return these photos."""
    rng = np.random.default_rng(0)
    photos = [make_photo(rng, *size, quality) for _ in range(distinct)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tars):
        with tarfile.open(folder / f"photos-{number:04d}.tar", "w") as tar:
            for index in range(images):
                data = photos[(number * images + index) % distinct]
                member = tarfile.TarInfo(f"{number:04d}-{index:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return photos
