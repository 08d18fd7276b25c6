"""The Python API: what `import sightline` gives, and that its encoder has the batch job's numbers."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightline
from siglip.actor import SiglipActor
from siglip.checkpoint import pin_model
from siglip.config import Limits, ModelConfig
from siglip.heads import build_head
from siglip.images.decode import decode_image
from siglip.images.decoder import Decoder
from tests.support.images import awkward_cases, encode, make_rgb, plain_cases

LABELS = ["red circle", "blue square", "green star"]


@pytest.fixture(scope="module")
def encoder() -> sightline.Encoder:
    return sightline.Encoder.load("tiny")


def test_importing_it_loads_none_of_the_large_libraries(tmp_path: Path) -> None:
    code = "import sys, sightline; print({n.partition('.')[0] for n in sys.modules} & set(sys.argv[1:]) or 'none')"
    large = ["torch", "ray", "pyarrow", "numpy", "pydantic", "PIL", "transformers", "fastapi", "boto3"]
    result = subprocess.run(
        [sys.executable, "-c", code, *large], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "none\n"


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    assert dir(sightline) == sightline.__all__
    for name in sightline.__all__:
        assert getattr(sightline, name).__doc__, name
    assert sightline.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = sightline.frobnicate


def test_embeddings_and_scores_are_the_batch_jobs_to_the_bit(encoder: sightline.Encoder) -> None:
    """The batch job's pieces: a decoder process in the job's default mode, the actor, and the label set's head."""
    cases = [data for _, data, _ in [*plain_cases(), *awkward_cases()]]
    pinned = pin_model(ModelConfig(source="tiny", compile=False))
    decoder = Decoder(pinned.spec, Limits(), sightline.JobConfig.model_fields["decode"].default)
    pixels = []
    for outcome in decoder.decode(cases):
        assert not isinstance(outcome, sightline.ImageRejected)
        pixels.append(outcome.pixels)
    decoder.close()
    actor = SiglipActor(pinned, texts=True)
    expected = actor.embed(np.stack(pixels))
    labels = sightline.LabelSet.model_validate({"names": LABELS, "templates": ["a photo of a {label}"]})
    head = build_head(labels, actor.encoder.embed_labels(labels), actor.encoder.scale, pinned.identity)
    assert np.array_equal(encoder.images(cases), expected)
    assert np.array_equal(encoder.scores(cases, labels), head.scores(expected))
    assert np.array_equal(encoder.texts(LABELS), actor.encoder.embed_texts(LABELS))


def test_the_kinds_of_images(encoder: sightline.Encoder, tmp_path: Path) -> None:
    image = make_rgb(200, 150)
    data = encode(image)
    (tmp_path / "a.png").write_bytes(data)
    embeddings = encoder.images([data, tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)])
    assert embeddings.shape == (5, encoder.width)
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, np.repeat(encoder.images([data]), 5, axis=0))
    assert encoder.images([]).shape == (0, encoder.width)
    assert encoder.images(image for _ in range(70)).shape == (70, encoder.width), "an iterator, more than one batch"
    assert encoder.scores([data], LABELS).shape == (1, 3)
    assert encoder.texts([]).shape == (0, encoder.width)


def test_a_pillow_image_is_prepared_as_its_file(encoder: sightline.Encoder, tmp_path: Path) -> None:
    upright = make_rgb(120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.tif", "turned.png"):
        upright.save(tmp_path / name, exif=exif)
        opened = Image.open(tmp_path / name)
        decoded = decode_image((tmp_path / name).read_bytes(), encoder._pinned.spec, Limits()).pixels
        assert np.array_equal(encoder._prepare(opened), decoded), name
        assert np.array_equal(encoder._prepare(opened), decoded), f"{name} again: the image was not changed"


def test_an_image_that_cannot_be_decoded_is_named(encoder: sightline.Encoder, tmp_path: Path) -> None:
    good = encode(make_rgb())
    cases: list[tuple[Any, str, str]] = [
        (good[:300], "truncated", "image 1: truncated: "),
        (b"<html>", "not_an_image", "image 1: not_an_image: starts with"),
        (b"", "empty", "image 1: empty: the image has no bytes"),
        (tmp_path / "none.png", "missing", f"image 1: missing: {tmp_path / 'none.png'} does not exist"),
        (tmp_path, "unreadable", f"image 1: unreadable: {tmp_path}: Is a directory"),
        (Image.open(io.BytesIO(good[:300])), "truncated", "image 1: truncated: "),
        (Image.new("F", (9, 9)), "unsupported", "image 1: unsupported: 32-bit"),
    ]
    for image, reason, message in cases:
        with pytest.raises(sightline.ImageRejected) as caught:
            encoder.images([good, image])
        assert (caught.value.index, caught.value.reason) == (1, reason)
        assert str(caught.value).startswith(message)
    for image, message in [
        (np.zeros((4, 4, 3), np.float32), r"image 1: expected uint8 \(H, W, 3\), not float32 \(4, 4, 3\)"),
        (3, "image 1: expected a path, bytes, a Pillow image or an array, not int"),
    ]:
        with pytest.raises(TypeError, match=message):
            encoder.images([good, image])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected a list of strings"):
        encoder.texts("a red car")


def test_mistakes_are_one_line(encoder: sightline.Encoder, tmp_path: Path) -> None:
    config = sightline.JobConfig.model_validate({"input": "x", "output": "y", "labels": ["x"]})
    dotted: dict[str, Any] = {"actors.mx": 1}
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: sightline.Encoder.load("no/such/directory/at/all"), "is not a directory"),
        (lambda: sightline.Encoder.load(batch_size=0), "model: batch_size"),
        (lambda: sightline.Encoder.load(image_size=50), "use 48 or 64"),
        (lambda: sightline.Encoder.load(patches=64), "only NaFlex checkpoints"),
        (lambda: sightline.Encoder.load(None), "model: source"),  # type: ignore[arg-type]
        (lambda: sightline.Encoder.load(dtype=None), "model: dtype"),  # type: ignore[arg-type]
        (lambda: sightline.Encoder.load(min_cosine=0.9), "model: min_cosine is for dtype: int8, and dtype is auto"),
        (lambda: sightline.Encoder.load(dtype="int8", min_cosine=2), "model: min_cosine"),
        (lambda: encoder.head(["C", "C++"]), "are the same text to this model"),
        (lambda: encoder.head([]), "labels: names: "),
        (lambda: sightline.tag(tmp_path / "none.yaml"), "none.yaml: no such file"),
        (
            lambda: sightline.tag(input="x", output="y", labels=["x"], lables=1),
            "config: unknown key lables: did you mean labels?",
        ),
        (lambda: sightline.tag(input="x", output="y", labels=["x"], **dotted), "did you mean max?"),
        (lambda: sightline.tag(input=str(tmp_path / "none"), output="y", labels=["x"], quiet=True), "does not exist"),
        (
            lambda: sightline.tag(config, output="z"),
            "output: change the JobConfig instead",
        ),
        (lambda: sightline.verify(tmp_path), "no output of `sightline tag`"),
        (lambda: sightline.open_output(str(tmp_path)), "is not a finished output"),
    ]
    for call, message in mistakes:
        with pytest.raises(sightline.ConfigError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
