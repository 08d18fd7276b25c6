"""The encoder compared with transformers' SigLIP, and the tiny checkpoint's accuracy on its 64 labels."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

from sightline.demo.shapes import LABELS, render
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.checkpoints.files import TINY
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.families.tokenizer import load_tokenizer
from siglip.images.decode import decode_image
from siglip.labels import LabelSet
from siglip.scoring import Scale, score_pairs, select, sigmoid, softmax
from tests.support.images import awkward_cases, encode, make_rgb, plain_cases


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return SiglipModel.from_pretrained(TINY, dtype=torch.float32).eval(), SiglipImageProcessorPil.from_pretrained(TINY)


def embed_by_reference(reference: tuple[Any, Any], images: list[Any]) -> np.ndarray:
    model, processor = reference
    with torch.inference_mode():
        pooled = model.get_image_features(**processor(images, return_tensors="pt")).pooler_output
        return np.asarray(torch.nn.functional.normalize(pooled, dim=-1).numpy())


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
def test_image_embeddings_equal_those_of_transformers(reference: tuple[Any, Any], dtype: Any, least: float) -> None:
    encoder = Encoder(pin_model(ModelConfig(source="tiny", dtype=dtype, compile=False)), texts=False)
    cases = [*plain_cases(), *awkward_cases()]
    pixels = np.stack([decode_image(data, encoder.spec, Limits()).pixels for _, data, _ in cases])
    cosines = (encoder.embed_images(pixels) * embed_by_reference(reference, [rgb for *_, rgb in cases])).sum(axis=1)
    worst = int(cosines.argmin())
    assert cosines[worst] >= least, cases[worst][0]


def test_scores_equal_those_of_transformers(encoder: Encoder, reference: tuple[Any, Any]) -> None:
    cases = list(plain_cases())
    labels = LabelSet.model_validate({"names": LABELS[:9], "templates": ["a photo of a {label}"]})
    pixels = np.stack([decode_image(data, encoder.spec, Limits()).pixels for _, data, _ in cases])
    ours = score_pairs(encoder.embed_images(pixels), encoder.embed_labels(labels), encoder.scale)
    model, processor = reference
    tokenizer = SiglipTokenizer.from_pretrained(TINY)
    texts = [f"a photo of a {name}" for name in LABELS[:9]]
    inputs = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(
            input_ids=inputs["input_ids"], **processor([rgb for *_, rgb in cases], return_tensors="pt")
        ).logits_per_image.numpy()
    # Some pixels differ by one level. The logit scale multiplies the difference of the cosines.
    np.testing.assert_allclose(ours, theirs, atol=2e-2)
    np.testing.assert_allclose(sigmoid(ours), 1 / (1 + np.exp(-theirs)), atol=1e-3)


def test_shrinking_by_libjpeg_hardly_changes_embeddings(encoder: Encoder) -> None:
    """`decode: auto` compared with `decode: exact`, for a smooth image, an image with edges and a page of text."""
    rng = np.random.default_rng(0)
    page = Image.new("RGB", (1400, 1100), "white")
    for line in range(0, 1100, 60):
        ImageDraw.Draw(page).text(
            (20, line), "The quick brown fox 0123456789 " * 3, "black", ImageFont.load_default(44)
        )
    drawing = make_rgb(1400, 1100)
    for _ in range(80):
        corner, color = rng.integers(0, 1000, 2), tuple(int(level) for level in rng.integers(0, 256, 3))
        ImageDraw.Draw(drawing).rectangle((*corner, *(corner + rng.integers(10, 300, 2))), fill=color)
    for image in (make_rgb(4000, 3000), drawing, page):
        data = encode(image, "JPEG", quality=92)
        pixels = [decode_image(data, encoder.spec, Limits(), mode).pixels for mode in ("exact", "auto")]
        exact, auto = encoder.embed_images(np.stack(pixels))
        assert float(exact @ auto) >= 0.9999


AWKWARD_LABELS = [
    "golden_retriever",
    "Red  Circle!",
    "rock'n'roll",
    "a_b_c",
    "T-shirt (large)",
    "50% off",
    "東京",
    "x" * 200,
    "ü",
]


def test_token_ids_equal_those_of_transformers(encoder: Encoder) -> None:
    tokenizer = SiglipTokenizer.from_pretrained(TINY)
    ids = encoder.tokenize(AWKWARD_LABELS)
    assert ids.shape == (len(AWKWARD_LABELS), encoder.text_length)
    punctuation = str.maketrans("", "", string.punctuation)
    for label, row in zip(AWKWARD_LABELS, ids, strict=True):
        text = " ".join(label.lower().replace("_", " ").translate(punctuation).split())
        expected = tokenizer(text, padding="max_length", max_length=16, truncation=True)["input_ids"]
        assert row.tolist() == expected, label
    assert ids[0].tolist() == encoder.tokenize(["golden retriever"])[0].tolist()
    assert ids[0].tolist() != encoder.tokenize(["goldenretriever"])[0].tolist()


def test_a_long_text_has_the_token_ids_of_transformers_and_is_known_to_be_cut(encoder: Encoder) -> None:
    tokenizer = SiglipTokenizer.from_pretrained(TINY)
    words = " ".join(f"photo {number} of a red circle" for number in range(5000))
    texts = ["a red circle", words, "x" * 40 + " " + words, "\u200b" * 400 + words, "a " * 15, "a " * 14]
    ids, counts = load_tokenizer(pin_model(ModelConfig(source="tiny", compile=False))).encode(texts)
    for text, row in zip(texts, ids, strict=True):
        expected = tokenizer(
            " ".join(text.split()), padding="max_length", max_length=16, truncation=True, verbose=False
        )
        assert row.tolist() == expected["input_ids"], text[:60]
    assert (counts > encoder.text_length).tolist() == [False, True, True, True, False, False]
    assert counts[:1].tolist() == encoder.count_tokens(texts[:1]).tolist()
    assert counts[4:].tolist() == encoder.count_tokens(texts[4:]).tolist() == [16, 15]
    pieces = [piece for piece in tokenizer.get_vocab() if "\u2581" in piece[1:]]
    assert not pieces, "no token goes on after a space, so what stands after one cannot change it"


def test_several_prompts_are_averaged_and_normalised(encoder: Encoder) -> None:
    labels = LabelSet.model_validate({"names": ["red circle"], "templates": ["{label}", "a photo of a {label}"]})
    mean = encoder.embed_texts(["red circle", "a photo of a red circle"]).mean(axis=0)
    np.testing.assert_allclose(encoder.embed_labels(labels)[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_embeddings_do_not_depend_on_the_number_of_images_in_a_call(encoder: Encoder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (encoder.batch_size + 3, 64, 64, 3), np.uint8)
    together = encoder.embed_images(pixels)
    one_by_one = np.concatenate([encoder.embed_images(pixels[n : n + 1]) for n in range(len(pixels))])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    assert encoder.embed_images(pixels[:0]).shape == encoder.embed_texts([])[:0].shape == (0, encoder.width)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_tiny_checkpoint_recognises_its_64_labels(encoder: Encoder) -> None:
    rng = random.Random(20_261_123)
    names = [LABELS[n % len(LABELS)] for n in range(1280)]
    spec = ImageSpec(size=64)
    images = [
        encode(render(name, rng, (rng.randint(80, 300), rng.randint(80, 300))), "JPEG", quality=85) for name in names
    ]
    embeddings = encoder.embed_images(np.stack([decode_image(data, spec, Limits()).pixels for data in images]))
    texts = encoder.embed_labels(LabelSet.model_validate({"names": LABELS}))
    best = score_pairs(embeddings, texts, encoder.scale).argmax(axis=1)
    assert np.mean([LABELS[n] == name for n, name in zip(best, names, strict=True)]) >= 0.97


def test_a_seed_determines_the_random_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        init_checkpoint(tmp_path / name, "tiny", seed)
    a, b, c = (pin_model(ModelConfig(source=str(tmp_path / name))).identity for name in "abc")
    assert a == b != c


def test_select_and_the_activations_give_the_expected_values() -> None:
    scores = np.array([[0.9, 0.2, 0.6, 0.6], [0.1, 0.1, 0.1, 0.1]], np.float32)
    chosen = select(scores, 0.5, 2)
    assert [row.tolist() for row, _ in chosen.rows()] == [[0, 2], []]
    np.testing.assert_allclose(chosen.scores, [0.9, 0.6])
    # A label over its own lower threshold is kept, also when labels with higher scores fail their thresholds.
    chosen = select(scores, np.array([0.95, 0.1, 0.7, 0.1], np.float32), 1)
    assert [row.tolist() for row, _ in chosen.rows()] == [[3], [1]]
    logits = score_pairs(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), Scale(10, -5))
    np.testing.assert_allclose(logits, [[5, -5], [-5, 5]])
    np.testing.assert_allclose(softmax(logits).sum(axis=1), 1)
    assert sigmoid(np.array([-200, 200], np.float32)).tolist() == [0, 1]
