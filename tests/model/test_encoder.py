"""The encoder at its real size, and compiled."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from siglip.architectures import init_checkpoint
from siglip.checkpoint import pin_model
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images import decode_image
from siglip.labels import LabelSet
from siglip.scoring import score_pairs, sigmoid
from siglip.shapes import render
from tests.images import encode


def test_a_compiled_encoder_gives_the_same() -> None:
    encoder = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)), texts=False)
    config = ModelConfig(source="tiny", dtype="float32", compile=True, batch_size=8)
    compiled = Encoder(pin_model(config), texts=False)
    pixels = np.random.default_rng(1).integers(0, 256, (13, 64, 64, 3), np.uint8)
    assert (compiled.embed_images(pixels) * encoder.embed_images(pixels)).sum(axis=1).min() >= 0.99999


def test_a_compiled_encoder_has_a_graph_for_small_batches() -> None:
    config = ModelConfig(source="tiny", dtype="float32", compile=True, batch_size=16)
    encoder = Encoder(pin_model(config), texts=False, sizes=(1, 8, 64))
    ran: list[int] = []
    forward = encoder._forward

    def count(pixels: torch.Tensor) -> torch.Tensor:
        ran.append(len(pixels))
        return forward(pixels)

    encoder._forward = count
    encoder.warm_up()
    assert ran == [1, 8, 16], "all that may come is compiled before it comes"
    plain = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)), texts=False)
    size = encoder.spec.size
    pixels = np.random.default_rng(0).integers(0, 256, (27, size, size, 3), np.uint8)
    for images, shapes in ((1, [1]), (2, [8]), (8, [8]), (9, [16]), (27, [16, 16])):
        ran.clear()
        vectors = encoder.embed_images(pixels[:images])
        assert ran == shapes
        assert (vectors * plain.embed_images(pixels[:images])).sum(axis=1).min() >= 0.99999


def test_what_embeds_images_alone_does_without_transformers() -> None:
    """Its model code takes two of five CPU seconds to import, and an actor embeds no texts."""
    code = (
        "import sys; from siglip.checkpoint import pin_model; from siglip.config import ModelConfig; "
        "from siglip.encoder import Encoder; "
        "Encoder(pin_model(ModelConfig(source='tiny', compile=False)), texts=False).warm_up(); "
        "print({'transformers', 'sentencepiece'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_base_architecture_is_siglip_base_patch16_256(tmp_path: Path) -> None:
    count = init_checkpoint(tmp_path / "base", "base", seed=3)
    assert count == 203_202_050  # the hub's own count for google/siglip-base-patch16-256
    config = ModelConfig(source=str(tmp_path / "base"), dtype="float32", compile=False)
    pinned = pin_model(config)
    assert (pinned.width, pinned.text_length, pinned.spec) == (768, 64, ImageSpec(size=256))
    assert pinned.vision_flops == pytest.approx(44.4e9, rel=0.05)  # counted by torch's profiler
    encoder = Encoder(pinned)
    assert (encoder.width, encoder.text_length, encoder.spec.size) == (768, 64, 256)
    assert encoder.tokenize(["a cat"]).shape == (1, 64)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "base"))
    image = render("red circle", random.Random(0), (300, 200))
    theirs = {item["label"]: item["score"] for item in classify(image, candidate_labels=["cat", "dog"])}
    pixels = decode_image(encode(image), encoder.spec, Limits()).pixels[None]
    texts = encoder.embed_labels(LabelSet.model_validate(["cat", "dog"]))
    ours = sigmoid(score_pairs(encoder.embed_images(pixels), texts, encoder.scale))[0]
    np.testing.assert_allclose(ours, [theirs["cat"], theirs["dog"]], rtol=1e-3)
    with pytest.raises(FileExistsError, match="not empty"):
        init_checkpoint(tmp_path / "base", "base")
