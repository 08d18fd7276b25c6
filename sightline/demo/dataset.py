"""The demo's dataset: tars, a Parquet file and loose images, and a few files that are broken as real ones are."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sightline.demo.shapes import LABELS, render

CONFIG = Path(str(files("configs") / "demo.yaml"))

TARS, PER_TAR = 4, 100
"""Tars with images and captions, and images in each."""
PARQUET_ROWS = 120
"""Rows of the Parquet file."""
LOOSE = 80
"""Image files that are in no tar or Parquet file."""


def render_dataset(folder: Path, seed: int = 0) -> None:
    """Render about 600 images under `folder`. The same seed gives the same images. Does nothing if `folder` exists.

    Four tars with captions, a Parquet file as Hugging Face's `datasets` writes it, and loose files in folders with
    awkward names. Among them are a tar that ends early, a truncated and an empty file, a text file with an image's
    suffix, and an image over the limit of pixels.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = random.Random(seed)
    for number in range(TARS):
        _write_tar(unfinished / f"shards/shapes-{number:03d}.tar", rng, PER_TAR)
    _write_parquet(unfinished / "parquet/shapes.parquet", rng)
    _write_loose(unfinished / "loose", rng)
    _write_broken(unfinished / "broken", rng)
    unfinished.rename(folder)


def encode_image(rng: random.Random, label: str, format: str = "JPEG") -> bytes:
    """Render a label's shape, and return the bytes of the image file. It is 96 to 480 pixels wide."""
    width = rng.randint(96, 480)
    image = render(label, rng, (width, int(width * rng.uniform(0.7, 1.4))))
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 90} if format != "PNG" else {}))
    return buffer.getvalue()


def _write_tar(path: Path, rng: random.Random, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            label = rng.choice(LABELS)
            caption = json.dumps({"caption": f"a {label}"}).encode()
            for suffix, data in (("jpg", encode_image(rng, label)), ("json", caption)):
                member = tarfile.TarInfo(f"{path.stem}-{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_parquet(path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [rng.choice(LABELS) for _ in range(PARQUET_ROWS)]
    images = [{"bytes": encode_image(rng, label, "PNG"), "path": f"{n:04d}.png"} for n, label in enumerate(labels)]
    pq.write_table(pa.table({"image": images, "caption": labels}), path, row_group_size=40)


def _write_loose(folder: Path, rng: random.Random) -> None:
    for number in range(LOOSE):
        label = rng.choice(LABELS)
        format, suffix = rng.choice([("JPEG", "jpg"), ("JPEG", "JPG"), ("PNG", "png"), ("WEBP", "webp")])
        path = folder / f"album #{number % 4} – 100%" / f"{label} {number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(rng, label, format))


def _write_broken(folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(encode_image(rng, LABELS[0])[:2000])
    (folder / "page.png").write_text("<html>404 not found</html>")
    (folder / "a jpeg really.png").write_bytes(encode_image(rng, LABELS[1]))
    (folder / "notes.md").write_text("Neither an image nor named like one, so it is skipped and counted as skipped.\n")
    Image.new("1", (12_000, 9_000)).save(folder / "108 megapixels.png")
    _write_tar(folder / "ends early.tar", rng, 10)
    tar = folder / "ends early.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
