"""Every published checkpoint of `tests/support/published.py` in small: loaded with transformers' numbers, or refused.

The reference is transformers' SiglipModel in float32 with its processor on Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from siglip.checkpoint import pin_model
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from tests.support.checkpoints import TEXTS, make_siglip, make_siglip2
from tests.support.images import encode, make_rgb
from tests.support.published import ROWS, Published, make_published

IMAGES = [make_rgb(width, height, seed) for seed, (width, height) in enumerate([(640, 427), (90, 300)])]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with a small tokenizer, by family."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"siglip": make_siglip(folder / "siglip"), "siglip2": make_siglip2(folder / "siglip2")}


def load(directory: Path, dtype: Any = "float32") -> Encoder:
    return Encoder(pin_model(ModelConfig(source=str(directory), dtype=dtype, compile=False)))


def embed_here(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([decode_image(encode(image), encoder.spec, Limits()).pixels for image in IMAGES])
    return encoder.embed_images(pixels), encoder.embed_texts(TEXTS)


def embed_there(directory: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with transformers, from texts in their canonical form."""
    rule = pin_model(ModelConfig(source=str(directory))).rule
    processor, model = AutoProcessor.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    assert type(processor.image_processor).__name__ == "SiglipImageProcessorPil"
    texts = [rule.canonicalize(text) for text in TEXTS]
    with torch.inference_mode():
        ids = processor(text=texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pixels = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
        found = model(input_ids=ids["input_ids"], pixel_values=pixels)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def lowest_cosine(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float:
    return min(float((a * b).sum(axis=1).min()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_shape_has_the_embeddings_of_transformers(
    row: Published, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    directory = make_published(row, tmp_path / "model", tokenizers[row.family])
    pinned = pin_model(ModelConfig(source=str(directory)))
    encoder = load(directory)
    assert (pinned.family, encoder.spec.size, encoder.text_length) == (row.family, row.image, row.length)
    assert lowest_cosine(embed_here(encoder), embed_there(directory, row.length)) >= 0.99999
