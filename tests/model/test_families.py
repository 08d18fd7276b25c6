"""Token ids, embeddings and scores of every family, compared with transformers' AutoProcessor and AutoModel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.labels import LabelError, LabelSet
from siglip.scoring import score_pairs, sigmoid
from tests.support.checkpoints import TEXTS, make_exact_gelu, make_siglip, make_siglip2, make_so400m
from tests.support.images import encode, make_rgb


class Pair:
    """The same checkpoint, loaded by Sightline (`ours`) and by transformers (`theirs`)."""

    def __init__(self, directory: Path) -> None:
        self.ours = Encoder(pin_model(ModelConfig(source=str(directory), dtype="float32", compile=False)))
        self.rule = pin_model(ModelConfig(source=str(directory))).rule
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    def their_ids(self, texts: list[str]) -> Any:
        """Token ids of canonical texts, padded and truncated as the model card says."""
        inputs = self.processor(text=texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        assert set(inputs) == {"input_ids"}
        return inputs["input_ids"]

    def their_outputs(self, texts: list[str], images: list[Any]) -> Any:
        with torch.inference_mode():
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
            return self.model(input_ids=self.their_ids(texts), pixel_values=pixels)


FAMILIES: dict[str, tuple[Callable[..., Path], str]] = {
    "siglip": (make_siglip, "siglip"),
    "so400m": (make_so400m, "siglip"),
    "exact gelu": (make_exact_gelu, "siglip"),
    "siglip2": (make_siglip2, "siglip2"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    make, family = FAMILIES[request.param]
    pair = Pair(make(tmp_path_factory.mktemp(request.param) / "model"))
    assert family == pair.rule.NAME
    return pair


def test_token_ids_equal_those_of_transformers(pair: Pair) -> None:
    ours = pair.ours.tokenize(TEXTS)
    theirs = pair.their_ids([pair.rule.canonicalize(text) for text in TEXTS]).numpy()
    assert ours.shape == (len(TEXTS), 64)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours[-2:, -1] == 1).all()  # a truncated text keeps its end token, as in transformers
    assert len({tuple(row) for row in ours.tolist()}) >= len(TEXTS) - 1


def test_embeddings_and_scores_equal_those_of_transformers(pair: Pair) -> None:
    images = [make_rgb(width, height, seed) for seed, (width, height) in enumerate([(640, 427), (90, 300), (33, 31)])]
    pixels = np.stack([decode_image(encode(image), pair.ours.spec, Limits()).pixels for image in images])
    vectors = pair.ours.embed_images(pixels)
    texts = pair.ours.embed_texts(TEXTS)
    theirs = pair.their_outputs([pair.rule.canonicalize(text) for text in TEXTS], images)
    assert (vectors * theirs.image_embeds.numpy()).sum(axis=1).min() >= 0.99999
    assert (texts * theirs.text_embeds.numpy()).sum(axis=1).min() >= 0.99999
    logits = score_pairs(vectors, texts, pair.ours.scale)
    # A difference of one level in 1% of the pixels changes a cosine by 1e-4. The logit scale multiplies that by 100.
    np.testing.assert_allclose(logits, theirs.logits_per_image.numpy(), atol=2e-2)
    expected = theirs.logits_per_image.sigmoid().numpy()
    np.testing.assert_allclose(sigmoid(logits), expected, atol=2e-3)
    labels = LabelSet.model_validate({"names": ["a cat", "東京", "red car"], "templates": ["{label}"]})
    reference = pair.their_outputs([pair.rule.canonicalize(name) for name in labels.label_names()], images)
    ours = sigmoid(score_pairs(vectors, pair.ours.embed_labels(labels), pair.ours.scale))
    np.testing.assert_allclose(ours, reference.logits_per_image.sigmoid().numpy(), atol=2e-3)


@pytest.mark.parametrize("name", ["GemmaTokenizerFast", "Siglip2Tokenizer"])
def test_each_class_name_of_the_tokenizer_gives_the_token_ids_of_transformers(tmp_path: Path, name: str) -> None:
    directory = make_siglip2(tmp_path / "model", tokenizer_class=name)
    pair = Pair(directory)
    texts = [pair.rule.canonicalize(text) for text in TEXTS]
    np.testing.assert_array_equal(pair.ours.tokenize(TEXTS), pair.their_ids(texts).numpy())


def test_a_tokenizer_with_more_tokens_than_the_text_tower_is_refused(tmp_path: Path) -> None:
    directory = make_siglip2(tmp_path / "model")
    other = make_siglip2(tmp_path / "other")
    small = make_siglip(tmp_path / "small")
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((small / name).read_bytes())
    assert other.exists()
    with pytest.raises(CheckpointError, match=r"its tokenizer has .* tokens, the text tower"):
        Encoder(pin_model(ModelConfig(source=str(directory), dtype="float32", compile=False)))


def test_one_token_too_many_is_refused_although_no_usual_text_has_it(tmp_path: Path) -> None:
    """Else the endpoint would fail for the few texts that have the token, each time."""
    directory = make_siglip2(tmp_path / "model")
    config, weights = (directory / name for name in ("config.json", "model.safetensors"))
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    table = "text_model.embeddings.token_embedding.weight"
    settings["text_config"]["vocab_size"] -= 1
    config.write_text(json.dumps(settings))
    save_file({**tensors, table: tensors[table][:-1].contiguous()}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its tokenizer has .* tokens, the text tower"):
        Encoder(pin_model(ModelConfig(source=str(directory), dtype="float32", compile=False)))


def test_only_a_tokenizer_without_bytes_has_unknown_characters(pair: Pair) -> None:
    readings = pair.ours.read_labels(LabelSet(names=("红", "蓝")))
    if pair.rule.NAME == "siglip2":
        readings.check()
        assert readings.describe_partly_read() is None
    else:
        with pytest.raises(LabelError, match="'红' cannot be read"):
            readings.check()
