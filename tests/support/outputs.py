"""An output with thumbnails for tests of web pages, made without a model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.outputs import SyntheticOutput, write_output
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.vectors import draw_vectors

WIDTH = 16


def draw_picture(row: int) -> bytes:
    """A JPEG of one colour, which differs for each row."""
    buffer = io.BytesIO()
    colour = tuple(np.random.default_rng(row).integers(0, 256, 3).tolist())
    Image.new("RGB", (120 + row % 60, 160 - row % 50), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def make_output(root: Path, labels: int, key: Callable[[int], str] = "image {:08d}".format) -> TaggedOutput:
    """Write an output of 600 images to a new folder. The last label's name must be escaped in HTML.

    `key` makes the key of an image from its number.
    """
    names = [f"label {row}" for row in range(labels - 1)] + ["<b>bold</b> & 'quoted'"]
    made = SyntheticOutput(
        LabelSet.model_validate({"names": names, "threshold": 0.1, "top_k": 3}),
        draw_vectors(labels, WIDTH, 5),
        2,
        lambda shard: draw_vectors(300, WIDTH, shard),
        scale=Scale(20, -8),
        thumbnail=draw_picture,
        key=key,
        reject=lambda shard: ["truncated"] * shard,
    )
    write_output(str(root), made)
    return open_output(str(root))
