"""`model.image_size`: another resolution, with the table of positions that transformers interpolates for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, SiglipImageProcessorPil

from pipelines.config import JobConfig
from pipelines.output.fingerprint import make_fingerprint
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from tests.support.checkpoints import make_siglip, make_siglip2, make_so400m
from tests.support.images import encode, make_rgb

IMAGES = [make_rgb(width, height, seed) for seed, (width, height) in enumerate([(640, 427), (90, 300)])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of 256 pixels in patches of 16, and of 384 pixels in patches of 14."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "siglip": make_siglip(folder / "siglip"),
        "siglip2": make_siglip2(folder / "siglip2"),
        "so400m": make_so400m(folder / "so400m"),
    }


def pin(source: Path, size: int | None = None, **more: Any) -> PinnedModel:
    return pin_model(ModelConfig(source=str(source), image_size=size, dtype="float32", compile=False, **more))


def embed(pinned: PinnedModel) -> np.ndarray:
    pixels = [decode_image(encode(image), pinned.spec, Limits()).pixels for image in IMAGES]
    return Encoder(pinned).embed_images(np.stack(pixels))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("siglip", 224),
        ("siglip", 512),
        ("siglip", 16),
        ("siglip2", 384),
        ("so400m", 224),
        ("so400m", 378),
        ("so400m", 448),
    ],
)
def test_another_size_has_the_embeddings_of_transformers(sources: dict[str, Path], kind: str, size: int) -> None:
    source = sources[kind]
    processor = SiglipImageProcessorPil.from_pretrained(source, size={"height": size, "width": size})
    model = AutoModel.from_pretrained(source).eval()
    with torch.inference_mode():
        pixels = processor(IMAGES, return_tensors="pt")["pixel_values"]
        theirs = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    assert pixels.shape[-2:] == (size, size)
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    pinned = pin(source, size)
    assert pinned.spec.shape == (size, size, 3)
    assert (embed(pinned) * theirs).sum(axis=1).min() >= 0.99999


@pytest.mark.parametrize(("kind", "own"), [("siglip", 256), ("so400m", 384)])
def test_the_checkpoints_own_size_changes_nothing(sources: dict[str, Path], kind: str, own: int) -> None:
    """384 is no multiple of 14, and is the checkpoint's own (transformers#33993)."""
    plain, given = pin(sources[kind]), pin(sources[kind], own)
    assert given.identity == plain.identity
    assert describe(given) == describe(plain)
    np.testing.assert_array_equal(embed(given), embed(plain))


def describe(pinned: PinnedModel) -> dict[str, Any]:
    config = JobConfig.model_validate(
        {"input": ["in"], "output": "out", "labels": ["a"], "model": pinned.config.model_dump()}
    )
    return make_fingerprint(config, pinned, pa.schema([]))


def test_everything_that_asks_for_the_size_follows(sources: dict[str, Path]) -> None:
    plain, small = pin(sources["so400m"]), pin(sources["so400m"], 378)
    assert plain.vision_flops == small.vision_flops  # 27 x 27 patches both
    half = pin(sources["siglip"], 128)
    assert half.vision_flops < pin(sources["siglip"]).vision_flops / 3.9
    assert small.identity == f"378px {plain.identity}"
    changed = {key for key, value in describe(small).items() if value != describe(plain)[key]}
    assert changed == {"model.weights", "model.image_size"}
    with pytest.raises(CheckpointError, match="another checkpoint here"):
        replace(small, checkpoint="sha256:other").fetch()
    assert small.fetch() == sources["so400m"]
    encoder = Encoder(half)
    encoder.warm_up()
    assert encoder.embed_images(np.zeros((1, 128, 128, 3), np.uint8)).shape == (1, 96)


@pytest.mark.parametrize(
    ("kind", "size", "near"),
    [("so400m", 385, "378 or 392"), ("siglip", 250, "240 or 256"), ("siglip", 9, "use 16, or leave it out")],
)
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest(
    sources: dict[str, Path], kind: str, size: int, near: str
) -> None:
    with pytest.raises(CheckpointError, match=near) as refused:
        pin(sources[kind], size)
    assert str(refused.value).startswith(f"model.image_size: {size} ")
    assert "\n" not in str(refused.value)


def test_a_size_that_no_machine_can_hold_is_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(ValidationError, match=r"image_size\n +Input should be less than or equal to 4096"):
        pin(sources["siglip"], 1_600_000)


def test_the_last_pixels_of_384_are_not_seen_and_those_of_378_are(sources: dict[str, Path]) -> None:
    """384 = 27 * 14 + 6: the patch grid cuts the last six pixels, in Google's code too (open_clip#1001)."""
    for size, seen in ((None, False), (378, True)):
        encoder = Encoder(pin(sources["so400m"], size))
        pixels = np.random.default_rng(0).integers(0, 256, (1, *encoder.spec.shape), np.uint8)
        changed = pixels.copy()
        changed[:, -6:] ^= 255
        changed[:, :, -6:] ^= 255
        assert np.array_equal(encoder.embed_images(pixels), encoder.embed_images(changed)) is not seen


def test_the_size_of_a_config_with_a_default_patch_is_checked_too(sources: dict[str, Path]) -> None:
    assert "patch_size" not in json.loads((sources["siglip"] / "config.json").read_text())["vision_config"]
    assert pin(sources["siglip"], 288).new_size == 288
