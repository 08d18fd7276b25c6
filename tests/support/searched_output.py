"""An output of rendered shapes for tests of the search: real embeddings of the shipped checkpoint, without a job."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.outputs import SyntheticOutput, write_output
from curation.tagged_output import TaggedOutput, open_output
from sightline.demo.shapes import LABELS, render
from siglip.checkpoint import pin_model
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.labels import LabelSet
from siglip.scoring import Floats
from tests.support.images import encode

MODEL = ModelConfig(source="tiny", dtype="float32")
SHOWN = LABELS[:20]
"""The shapes that the output has, each six times in each shard. The others are absent."""
EACH = 6


@cache
def load_encoder() -> Encoder:
    """The shipped checkpoint, in float32."""
    return Encoder(pin_model(MODEL))


def draw(row: int) -> Image.Image:
    """The image of a row."""
    return render(SHOWN[row % len(SHOWN)], random.Random(row), (96, 64))


@cache
def embed_rows(first: int, stop: int) -> Floats:
    """The embeddings of the images of some rows."""
    encoder = load_encoder()
    pixels = [decode_image(encode(draw(row)), encoder.spec, Limits(), "auto").pixels for row in range(first, stop)]
    return encoder.embed_images(np.stack(pixels))


def draw_thumbnail(row: int) -> bytes:
    """A JPEG of a row's image."""
    buffer = io.BytesIO()
    draw(row).save(buffer, "JPEG")
    return buffer.getvalue()


def make_shapes(
    shards: int = 2, *, thumbnails: bool = True, key: Callable[[int], str] | None = None, model: ModelConfig = MODEL
) -> SyntheticOutput:
    """The content of an output of `shards` times 120 images, whose keys are such as `red circle/000000`."""
    encoder = load_encoder()
    labels = LabelSet.model_validate(
        {"names": list(LABELS), "templates": ["a photo of a {label}"], "threshold": 0.2, "top_k": 3}
    )
    count = EACH * len(SHOWN)
    return SyntheticOutput(
        labels,
        encoder.embed_labels(labels),
        shards,
        lambda shard: embed_rows(shard * count, (shard + 1) * count),
        scale=encoder.scale,
        model=model,
        weights=pin_model(MODEL).identity,
        thumbnail=draw_thumbnail if thumbnails else None,
        key=key or (lambda row: f"{SHOWN[row % len(SHOWN)]}/{row:06d}"),
    )


def write_shapes(root: Path, made: SyntheticOutput | None = None) -> TaggedOutput:
    """Write an output of shapes, and open it."""
    write_output(str(root), made or make_shapes())
    return open_output(str(root))
