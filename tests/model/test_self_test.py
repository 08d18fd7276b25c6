"""The self-test on load: mistakes that people have made with SigLIP are planted, and refused before any image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sightline.cli import app
from siglip import encoder as encoder_module
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints import self_test
from siglip.checkpoints.architectures import init_checkpoint
from siglip.checkpoints.files import TINY, CheckpointError
from siglip.checkpoints.self_test import TEXTS, KnownCosines, draw_images, read_known
from siglip.config import ImageSpec, ModelConfig
from siglip.encoder import Encoder
from siglip.families import siglip as siglip_family
from siglip.families.tokenizer import Tokenizer
from siglip.towers.text import TextTower
from siglip.towers.vit import VisionTower


def pin(source: str | Path = "tiny", dtype: Any = "float32") -> PinnedModel:
    return pin_model(ModelConfig(source=str(source), dtype=dtype, compile=False))


def refuse(pinned: PinnedModel, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as refused:
        Encoder(pinned)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights: nothing is known of it."""
    directory = tmp_path_factory.mktemp("unknown") / "checkpoint"
    init_checkpoint(directory, "tiny", seed=3)
    return directory


class Wrapped:
    """A tokenizer of transformers that is called with other arguments."""

    def __init__(self, tokenizer: Any, **other: Any) -> None:
        self._tokenizer, self._other = tokenizer, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **named: Any) -> Any:
        changed = named if named.get("truncation") is False else {**named, **self._other}
        return self._tokenizer(texts, **changed)


def wrap(monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
    made = Tokenizer.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self._tokenizer = Wrapped(self._tokenizer, **other)

    monkeypatch.setattr(Tokenizer, "__init__", make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_good_checkpoints_pass(unknown: Path, dtype: str) -> None:
    assert Encoder(pin("tiny", dtype)).dtype == getattr(torch, dtype)
    encoder = Encoder(pin(unknown, dtype))
    assert encoder.dtype == getattr(torch, dtype)
    assert Encoder(pin(unknown, dtype), texts=False).embed_images(draw_images(ImageSpec(size=64))).shape == (3, 128)


def test_texts_that_are_padded_to_the_longest_of_a_batch(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, padding="longest", truncation=True, max_length=12)
    refuse(pin(unknown), "padded to the full length")


def test_texts_that_are_padded_on_the_left(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, padding_side="left")
    refuse(pin(unknown), "padded on the right")


def test_texts_that_are_cut_at_another_length_than_the_models(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, max_length=8)
    refuse(pin(unknown), "have 8 tokens, and the model reads 16")


def test_texts_that_are_not_lower_cased(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siglip_family, "canonicalize", lambda text: " ".join(text.split()))
    made = Tokenizer.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self._tokenizer.do_lower_case = False
        if hasattr(self._tokenizer, "canonicalize_text"):
            self._tokenizer.canonicalize_text = lambda text, **_: text

    monkeypatch.setattr(Tokenizer, "__init__", make)
    refuse(pin(unknown), "lower-case")


@pytest.mark.parametrize(
    "read", [lambda tokens: tokens[:, 0], lambda tokens: tokens.mean(dim=1), lambda tokens: tokens[:, -2]]
)
def test_an_embedding_that_is_read_elsewhere_than_at_the_last_position(
    unknown: Path, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    def forward(self: TextTower, ids: torch.Tensor) -> Any:
        return self.head(read(self.final_layer_norm(self.encoder(self.embeddings(ids)))))

    monkeypatch.setattr(TextTower, "forward", forward)
    refuse(pin(unknown), "last position")


@pytest.mark.parametrize(("tower", "what"), [(VisionTower, "images"), (TextTower, "texts")])
def test_a_dtype_whose_embeddings_are_not_those_of_float32(
    unknown: Path, monkeypatch: pytest.MonkeyPatch, tower: Any, what: str
) -> None:
    forward = tower.forward

    def overflow(self: Any, inputs: torch.Tensor) -> Any:
        found = forward(self, inputs)
        return found.clamp(-0.05, 0.05) if found.dtype == torch.bfloat16 else found  # as a small range of numbers does

    monkeypatch.setattr(tower, "forward", overflow)
    refuse(pin(unknown, "bfloat16"), f"model.dtype: bfloat16: embeddings of {what} have a cosine of 0.*float32")
    assert Encoder(pin(unknown, "float32")).dtype == torch.float32


def test_a_known_checkpoint_with_other_preprocessing_or_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(TINY, changed)
    images = changed / "preprocessor_config.json"
    settings = json.loads(images.read_text())
    images.write_text(json.dumps({**settings, "image_mean": [0.3, 0.3, 0.3]}))
    pinned = pin(changed)
    known = {pinned.identity: next(iter(read_known().values()))}
    for module in (self_test, encoder_module):
        monkeypatch.setattr(module, "read_known", lambda: known)
    refuse(pinned, "tiny has a cosine of")


def test_the_known_numbers_are_those_of_the_shipped_checkpoint() -> None:
    encoder = Encoder(pin())
    assert pin().identity in read_known()
    cosines = encoder.embed_images(draw_images(encoder.spec)) @ encoder.embed_texts(TEXTS).T
    assert np.abs(cosines - read_known()[pin().identity].cosines).max() < 2e-4


def test_a_large_model_is_tested_with_one_image(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    embed = Encoder._embed_known

    def count(self: Encoder, pixels: Any, rows: Any) -> Any:
        seen.append(len(pixels))
        return embed(self, pixels, rows)

    monkeypatch.setattr(Encoder, "_embed_known", count)
    monkeypatch.setattr(encoder_module, "LARGE_FLOPS", 1)
    Encoder(pin(unknown, "bfloat16"))
    assert seen == [1, 1]
    seen.clear()
    Encoder(pin("tiny"))  # its numbers are known for all three
    assert seen == [3]


def test_the_command_says_what_a_checkpoint_is(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["model", "check", str(unknown)])
    assert result.exit_code == 0, result.output
    assert "16 tokens" in result.output
    assert "not known for this checkpoint" in result.output
    printed = CliRunner().invoke(app, ["model", "check", str(unknown), "--json"])
    [(identity, entry)] = json.loads(printed.stdout).items()
    known = {identity: KnownCosines("it", np.asarray(entry["cosines"], np.float32))}
    for module in (self_test, encoder_module):
        monkeypatch.setattr(module, "read_known", lambda: known)
    assert "compared with known ones" in CliRunner().invoke(app, ["model", "check", str(unknown)]).output
    other = CliRunner().invoke(app, ["model", "check", str(unknown), "--image-size", "96", "--text-rule", "lowercase"])
    assert "96 x 96 pixels" in other.output
    assert "not known for this checkpoint" in other.output
    for wrong, message in ((["nowhere"], "nowhere"), (["tiny", "--text-rule", "upper"], "model: text_rule")):
        refused = CliRunner().invoke(app, ["model", "check", *wrong])
        assert refused.exit_code == 2
        assert message in refused.output
    assert "Traceback" not in refused.output
    assert entry["name"] == str(unknown)
