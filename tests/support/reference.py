"""Generated datasets, and the rows that tagging them must give: the oracle of `tests/ray/test_property.py`.

This module is independent of the job: it does not read archives. It knows key, source and damage of each image because
it generates them. `Reference` decodes with Pillow and embeds with transformers. The stem of a member's name has no dot
except a first one.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps

from sightline.demo.shapes import LABELS
from siglip.checkpoints.files import TINY
from tests.support.images import encode, make_rgb
from tests.support.jobs import make_parquet

MAX_BYTES, MAX_PIXELS = 1 << 18, 1_000_000
TEMPLATE = "a photo of a {label}"


class Reference:
    """SigLIP in transformers, in float32, with the shipped tiny checkpoint."""

    def __init__(self) -> None:
        from transformers import SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

        self.model = SiglipModel.from_pretrained(TINY, dtype=torch.float32).eval()
        self.processor = SiglipImageProcessorPil.from_pretrained(TINY)
        texts = [TEMPLATE.replace("{label}", label) for label in LABELS]
        ids = SiglipTokenizer.from_pretrained(TINY)(texts, padding="max_length", max_length=16, return_tensors="pt")
        self.texts = self._unit(self.model.get_text_features(input_ids=ids["input_ids"]))

    def __call__(self, data: bytes) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Return width, height, the embedding, float32 (D), and its cosines with the labels, float32 (L)."""
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode == "I;16":
            image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = self.processor(image.convert("RGB"), return_tensors="pt")
        embedding = self._unit(self.model.get_image_features(**pixels))[0]
        return image.width, image.height, embedding, self.texts @ embedding

    def _unit(self, output: Any) -> np.ndarray:
        return np.asarray(torch.nn.functional.normalize(output.pooler_output.detach(), dim=-1).numpy())


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _with_alpha(rgb: Image.Image, seed: int) -> Image.Image:
    rgba = rgb.copy()
    rgba.putalpha(make_rgb(*rgb.size, seed + 1).convert("L"))
    return rgba


def _deep(rgb: Image.Image, seed: int) -> Image.Image:
    low = np.random.default_rng(seed).integers(0, 256, (rgb.height, rgb.width), np.uint16)
    return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 256 + low)


def _animate(rgb: Image.Image, seed: int) -> bytes:
    return encode(rgb.quantize(64), "GIF", save_all=True, append_images=[make_rgb(*rgb.size, seed + 1).quantize(64)])


FORMS: dict[str, Callable[[Image.Image, int], bytes]] = {
    "JPEG": lambda rgb, seed: encode(rgb, "JPEG"),
    "PNG": lambda rgb, seed: encode(rgb),
    "WebP": lambda rgb, seed: encode(rgb, "WEBP"),
    "GIF": _animate,
    "BMP": lambda rgb, seed: encode(rgb, "BMP"),
    "TIFF": lambda rgb, seed: encode(rgb, "TIFF"),
    "grey JPEG": lambda rgb, seed: encode(rgb.convert("L"), "JPEG"),
    "CMYK JPEG": lambda rgb, seed: encode(rgb.convert("CMYK"), "JPEG"),
    "1-bit PNG": lambda rgb, seed: encode(rgb.convert("1")),
    "RGBA PNG": lambda rgb, seed: encode(_with_alpha(rgb, seed)),
    "RGBA WebP": lambda rgb, seed: encode(_with_alpha(rgb, seed), "WEBP", lossless=True, exact=True),
    "LA PNG": lambda rgb, seed: encode(_with_alpha(rgb, seed).convert("LA")),
    "palette with a transparent color": lambda rgb, seed: encode(rgb.quantize(16), transparency=3),
    "16-bit PNG": lambda rgb, seed: encode(_deep(rgb, seed)),
    "16-bit TIFF": lambda rgb, seed: encode(_deep(rgb, seed), "TIFF"),
    "turned JPEG": lambda rgb, seed: encode(rgb, "JPEG", exif=_exif(seed % 8 + 1)),
    "turned TIFF": lambda rgb, seed: encode(rgb, "TIFF", exif=_exif(seed % 8 + 1)),
    "turned RGBA PNG": lambda rgb, seed: encode(_with_alpha(rgb, seed), exif=_exif(seed % 8 + 1)),
}


def _cut(seed: int) -> bytes:
    rng = random.Random(seed)
    data = encode(make_rgb(200, 100, seed), rng.choice(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]))
    return data[: int(len(data) * rng.uniform(0.4, 0.95))]


def _broken_stream(seed: int) -> bytes:
    data = bytearray(encode(make_rgb(200, 100, seed)))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


DAMAGES: dict[str, tuple[Callable[[int], bytes], str]] = {
    "no bytes": (lambda seed: b"", "empty"),
    "cut": (_cut, "truncated"),
    "a web page": (lambda seed: b"<!doctype html><title>%d</title>" % seed, "not_an_image"),
    "too many pixels": (lambda seed: encode(Image.new("1", (1100 + seed, 1000))), "too_many_pixels"),
    "too many bytes": (lambda seed: encode(make_rgb(40, 40, seed)) + bytes(MAX_BYTES), "too_many_bytes"),
    "broken stream": (_broken_stream, "corrupt"),
    "float samples": (lambda seed: encode(Image.new("F", (9, 9), seed), "TIFF"), "unsupported"),
}


@dataclass(frozen=True)
class Picture:
    """An image of one form or with one damage. The seed determines its size and content."""

    form: str
    seed: int

    def data(self) -> bytes:
        """Return the bytes of the image."""
        return _draw(self.form, self.seed)

    def planted(self, key: str, source: str, **more: Any) -> Planted:
        """Return the row that the output must have for this image."""
        reason = DAMAGES[self.form][1] if self.form in DAMAGES else None
        return Planted(key, source, self.data(), reason, **more)


@cache
def _draw(form: str, seed: int) -> bytes:
    if form in DAMAGES:
        return DAMAGES[form][0](seed)
    rng = random.Random(seed)
    width, height = (rng.choice([rng.randint(1, 9), rng.randint(30, 240)]) for _ in range(2))
    return FORMS[form](make_rgb(width, height, seed), seed)


@dataclass(frozen=True)
class Planted:
    """An expected row of the output: tagged if `reason` is None, else rejected with that reason."""

    key: str
    source: str
    data: bytes | None
    reason: str | None = None
    metadata: dict[str, Any] | None = None
    n: int | None = None


@dataclass(frozen=True)
class Source:
    """Files in the input folder. They are written before the step `arrives`, and absent during the step `away`."""

    name: str
    arrives: int
    away: int | None


@dataclass(frozen=True)
class Sample:
    """Neighbouring members of a tar with the same stem: images by extension, and other files.

    With `shadows` each file follows a `._` file, as tar on macOS writes them.
    """

    stem: str
    images: tuple[tuple[str, Picture], ...]
    others: tuple[tuple[str, Any], ...]
    shadows: bool

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents in order."""
        for extension, content in (*self.images, *self.others):
            name = f"{self.stem}.{extension}"
            folder, slash, file = name.rpartition("/")
            if self.shadows:
                yield f"{folder}{slash}._{file}", b"a shadow"
            if isinstance(content, Picture):
                yield name, content.data()
            else:
                yield name, (json.dumps(content) if extension == "json" else str(content)).encode()


@dataclass(frozen=True)
class Tar(Source):
    """A tar, perhaps damaged.

    `damage` is a float, the share of the bytes after which the tar is cut; an int, the number of the member whose
    header is overwritten; or bytes, the whole content of the file.
    """

    samples: tuple[Sample, ...]
    zipped: bool
    damage: float | int | bytes | None

    def build(self) -> tuple[bytes, list[tuple[str, int, int]], int, bool]:
        """Return the bytes, the members, the number of readable bytes, and whether the tar is cut short.

        Each member has the offset where it begins, and the offset where the part of it ends that a reader needs. A
        reader needs only the header of an image with too many bytes. Offsets are those in the uncompressed tar.
        """
        members: list[tuple[str, int, int]] = []
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for sample in self.samples:
                for name, content in sample.members():
                    info, start = tarfile.TarInfo(name), tar.offset
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    unread = len(content) if len(content) > MAX_BYTES else 0
                    members.append((name, start, tar.offset - -len(content) % tarfile.BLOCKSIZE - unread))
            end = tar.offset + tarfile.BLOCKSIZE  # a tar with one block of zeros at its end is complete
        data = bytearray(buffer.getvalue())
        if isinstance(self.damage, bytes):
            return self.damage, [], 0, False
        if isinstance(self.damage, int) and members:  # the members after it are found again by their headers
            _, start, _ = members.pop(self.damage % len(members))
            data[start : start + 512] = b"garbage!" * 64
        packed = gzip.compress(bytes(data), mtime=0) if self.zipped else bytes(data)
        if not isinstance(self.damage, float):
            return packed, members, end, False
        packed = packed[: int(len(packed) * self.damage)]
        told = len(zlib.decompressobj(31).decompress(packed)) if self.zipped else len(packed)
        # A gzip file has an end of its own. A tar without members is whole only in the lengths that programs write.
        odd = not members and told not in (2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
        return packed, members, told, self.zipped or told < end or odd

    def files(self) -> dict[str, bytes]:
        """Return the files to write, by name."""
        return {self.name: self.build()[0]}

    def rows(self, root: str) -> Iterator[Planted]:
        """Yield each image whose bytes are complete, and one rejected row if the tar is damaged."""
        data, members, told, short = self.build()
        whole = {name for name, _, end in members if end <= told}
        for sample in self.samples:
            images = [(e, p) for e, p in sample.images if f"{sample.stem}.{e}" in whole]
            others = {e.lower(): c for e, c in sample.others if f"{sample.stem}.{e}" in whole and e != "mp4"}
            for extension, picture in images:
                key = sample.stem if len(images) == 1 else f"{sample.stem}.{extension}"
                yield picture.planted(key.removeprefix("./"), root + self.name, metadata=others or None)
        if isinstance(self.damage, bytes):
            yield Planted(self.name, root + self.name, None, "corrupt_archive" if data else "truncated_archive")
        elif isinstance(self.damage, int) and any(sample.images or sample.others for sample in self.samples):
            yield Planted(self.name, root + self.name, None, "corrupt_archive")
        elif short:
            yield Planted(self.name, root + self.name, None, "truncated_archive")


@dataclass(frozen=True)
class Link:
    """An image that lists and Parquet columns name by URI. If `arrives` is None the object never exists."""

    name: str
    picture: Picture
    arrives: int | None

    def planted(self, key: str, source: str, **more: Any) -> Planted:
        """Return the final row of the list entry or table row that names this image."""
        if self.arrives is None:
            return Planted(key, source, None, "missing", **more)
        return self.picture.planted(key, source, **more)


ODD_URIS = {
    "http://host/x.jpg": "unreadable",
    "ftp://host/x.jpg": "unreadable",
    "x" * 300 + ".jpg": "unreadable",
    "no such folder/x.jpg": "missing",
    "": "missing",
    "nul\0.jpg": "unreadable",
}
"""URIs that name no object, each with the reason of its rejected row."""

Cell = Picture | Link | str | None
"""The image cell of a Parquet row: an image, a link to an object, a URI that names no object, or null."""


@dataclass(frozen=True)
class Parquet(Source):
    """A Parquet file with images in one of three forms: bytes, struct or URI.

    `numbers` is the type of its column `n`.
    """

    form: str
    cells: tuple[Cell, ...]
    numbers: pa.DataType | None
    group: int
    broken: bool = False

    def _number(self, row: int) -> int | None:
        return None if self.numbers is None or row % 5 == 3 else row * 1000

    def files(self) -> dict[str, bytes]:
        """Return the files to write, by name."""
        up = "../" * (self.name.count("/") + 1)
        uris = [up + cell.name if isinstance(cell, Link) else cell for cell in self.cells]
        contents = [cell.data() if isinstance(cell, Picture) else None for cell in self.cells]
        column: Any = pa.array(uris if self.form == "uri" else contents, pa.string() if self.form == "uri" else None)
        if self.form == "struct":
            paths = [f"p/{row}.jpg" if row % 2 else None for row in range(len(self.cells))]
            pairs = [c if c is None else {"bytes": c, "path": p} for c, p in zip(contents, paths, strict=True)]
            column = pa.array(pairs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        elif self.form == "bytes":
            column = pa.array(contents, pa.binary())
        columns = {"url" if self.form == "uri" else "image": column}
        if self.numbers is not None:
            columns["n"] = pa.array([self._number(row) for row in range(len(self.cells))], self.numbers)
        data = make_parquet(columns, row_group_size=self.group)
        return {self.name: data[: len(data) // 2] if self.broken else data}

    def rows(self, root: str) -> Iterator[Planted]:
        """Yield a row for each row of the file, or one rejected row if the file is broken."""
        source = root + self.name
        if self.broken:
            yield Planted(self.name, source, None, "corrupt_archive")
            return
        for row, cell in enumerate(self.cells):
            n = self._number(row)
            key = f"p/{row}.jpg" if self.form == "struct" and row % 2 and cell else str(row)
            if isinstance(cell, (Picture, Link)):
                yield cell.planted(key, source, n=n)
            else:
                yield Planted(key, source, None, "missing" if cell is None else ODD_URIS[cell])


@dataclass(frozen=True)
class Loose(Source):
    """Loose images in a folder."""

    images: tuple[tuple[str, Picture], ...]

    def files(self) -> dict[str, bytes]:
        """Return the files to write, by name."""
        return {self.name + name: picture.data() for name, picture in self.images}

    def rows(self, root: str) -> Iterator[Planted]:
        """Yield a row for each image that is not hidden: no part of its path begins with a dot."""
        for name, picture in self.images:
            if not any(part.startswith(".") for part in name.split("/")):
                yield picture.planted(self.name + name, root + self.name + name)


@dataclass(frozen=True)
class Listing:
    """A list of URIs, a text or CSV file. Each entry is in the file from its step on."""

    name: str
    entries: tuple[tuple[Link | str, int], ...]

    def content(self, step: int) -> bytes:
        """Return the content of the file before a step."""
        uris = [e if isinstance(e, str) else e.name for e, arrives in self.entries if arrives <= step]
        if self.name.endswith(".csv"):
            return "\n".join(["id,url", *(f"{len(uri)},{uri}" for uri in uris), ""]).encode()
        return "\n".join(["# a list", "", *uris]).encode()

    def rows(self, root: str) -> Iterator[Planted]:
        """Yield a row for each entry, also for those that name the same image."""
        for entry, _ in self.entries:
            uri = entry if isinstance(entry, str) else entry.name
            source = uri if "://" in uri else os.path.join(root, uri)
            more: Any = {"metadata": {"id": str(len(uri))} if self.name.endswith(".csv") else None}
            if isinstance(entry, str):
                yield Planted(uri, source, None, ODD_URIS[uri], **more)
            else:
                yield entry.planted(uri, source, **more)
