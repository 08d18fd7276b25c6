"""The same images and texts embedded by Sightline and by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from siglip.checkpoint import pin_model
from siglip.config import DType, Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from tests.support.checkpoints import TEXTS
from tests.support.images import encode, make_rgb

IMAGES = [make_rgb(width, height, seed) for seed, (width, height) in enumerate([(640, 427), (90, 300)])]
Embeddings = tuple[np.ndarray, np.ndarray]
"""Embeddings of `IMAGES` and of `TEXTS`, of unit norm."""


def load(directory: Path, dtype: DType = "float32") -> Encoder:
    """Load a checkpoint with Sightline."""
    return Encoder(pin_model(ModelConfig(source=str(directory), dtype=dtype, compile=False)))


def embed_here(encoder: Encoder) -> Embeddings:
    """Embed with Sightline, from encoded images."""
    pixels = np.stack([decode_image(encode(image), encoder.spec, Limits()).pixels for image in IMAGES])
    return encoder.embed_images(pixels), encoder.embed_texts(TEXTS)


def embed_there(directory: Path, length: int) -> Embeddings:
    """Embed with transformers' model in float32 and its processor on Pillow. Texts are in their canonical form."""
    import torch
    from transformers import AutoModel, AutoProcessor

    rule = pin_model(ModelConfig(source=str(directory))).rule
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    assert type(processor.image_processor).__name__ == "SiglipImageProcessorPil"
    texts = [rule.canonicalize(text) for text in TEXTS]
    with torch.inference_mode():
        ids = processor(text=texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pixels = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
        found = model(input_ids=ids["input_ids"], pixel_values=pixels)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def lowest_cosine(ours: Embeddings, theirs: Embeddings) -> float:
    """The lowest cosine of an image's or a text's two embeddings."""
    return min(float((a * b).sum(axis=1).min()) for a, b in zip(ours, theirs, strict=True))
