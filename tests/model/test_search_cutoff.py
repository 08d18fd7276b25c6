"""The cut-off of a search on held-out images of a real checkpoint, and a search with texts that the output has not."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import sightline
from benchmarks.outputs import SyntheticOutput, write_output
from benchmarks.search import choose_auto, judge, make_fixed, render_images
from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from siglip.labels import LabelSet
from storage.settings import ConfigError


@pytest.fixture(scope="module")
def encoder() -> sightline.Encoder:
    return sightline.Encoder.load("tiny")


def test_absent_concepts_find_nothing_and_present_ones_their_images(encoder: sightline.Encoder) -> None:
    images, concepts = render_images(100, blur=4.0, seed=20)
    head = encoder.head(list(LABELS))
    logits = head.logits(encoder.images(images))
    auto = judge(logits, concepts, choose_auto, collections=20, seed=21)
    assert auto.nothing >= 0.95
    assert all(np.mean(recalls) >= 0.8 for recalls in auto.recalls.values())
    # No fixed cosine is as good in both respects, even if it is chosen with hindsight.
    for cosine in np.arange(0.2, 0.5, 0.02).tolist():
        fixed = judge(logits, concepts, make_fixed(head.gain[0] * cosine + head.offset[0]), collections=20, seed=21)
        assert fixed.nothing < auto.nothing or fixed.recall < auto.recall, cosine


def test_texts_and_images_that_the_output_has_not_are_embedded(encoder: sightline.Encoder, tmp_path: Path) -> None:
    rng = random.Random(3)
    names = [LABELS[number % 24] for number in range(240)]
    files = [encode_image(rng, name) for name in names]
    embeddings = encoder.images(files)
    made = SyntheticOutput(
        LabelSet.model_validate({"names": ["red", "green"], "threshold": 0.5}),
        encoder.head(["red", "green"]).vectors,
        1,
        lambda shard: embeddings,
        scale=encoder._encoder.scale,
        model=encoder._pinned.config,
        weights=encoder._pinned.identity,
        key=lambda row: f"{names[row]} {row}",
    )
    write_output(str(tmp_path / "tags"), made)
    output = sightline.open_output(tmp_path / "tags")
    found = output.search("red star", top=100)
    assert [key.rpartition(" ")[0] for key in found.table["key"].to_pylist()] == ["red star"] * 10
    assert found.relevant == 10
    assert output.search("purple heart").relevant == 0
    (tmp_path / "star.png").write_bytes(files[3])
    nearest = output.search(image=tmp_path / "star.png", top=1).table
    assert nearest["key"][0].as_py() == f"{names[3]} 3"
    assert nearest["similarity"][0].as_py() > 0.999
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"broken\.png: not_an_image"):
        output.search(image=[tmp_path / "broken.png"])
    (tmp_path / "empty.png").touch()
    with pytest.raises(ConfigError, match=r"empty\.png: empty$"):
        output.search(image=tmp_path / "empty.png")
