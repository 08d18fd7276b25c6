"""Calibration of the shipped checkpoint's own scores, with wrong answers planted among the right ones."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.calibration import calibrate, make_label_set
from curation.tagged_output import TaggedOutput, open_output
from curation.truth import Truth
from sightline.demo.shapes import LABELS, render
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.heads import build_head
from siglip.labels import LabelSet

IMAGES, TARGET, NOISE = 1200, 0.85, 0.04
SHAPES = sorted({label.split()[1] for label in LABELS})
COLOURS = sorted({label.split()[0] for label in LABELS})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaggedOutput, list[str]]:
    """New drawings as an output with the eight shapes as labels, and the shape that each drawing shows."""
    pinned = pin_model(ModelConfig(source="tiny", dtype="float32", compile=False))
    encoder = Encoder(pinned)
    names = [{"name": shape, "prompts": [f"a photo of a {colour} {shape}" for colour in COLOURS]} for shape in SHAPES]
    labels = LabelSet.model_validate({"names": names, "threshold": 0.001, "top_k": 3})
    rng = random.Random(11)
    shown = [rng.choice(LABELS) for _ in range(IMAGES)]
    pixels = np.stack([np.asarray(render(label, rng, (64, 64)).resize((64, 64))) for label in shown])
    vectors = encoder.embed_images(np.asarray(pixels, np.uint8))
    root = str(tmp_path_factory.mktemp("drawn") / "output")
    made = SyntheticOutput(
        labels,
        encoder.embed_labels(labels),
        1,
        lambda shard: vectors,
        scale=encoder.scale,
        model=pinned.config,
        weights=pinned.identity,
    )
    write_output(root, made)
    return open_output(root), [label.split()[1] for label in shown]


def make_truth(output: TaggedOutput, shown: list[str], images: np.ndarray, seed: int) -> Truth:
    """Answers about some of the images, each label of each, of which a few are wrong."""
    positions = np.asarray(images)
    embeddings = np.concatenate(
        [np.stack(batch["embedding"].to_numpy(zero_copy_only=False)) for batch in output.batches(["embedding"])]
    )[positions]
    image, label = (
        a.reshape(-1) for a in np.meshgrid(np.arange(len(positions)), np.arange(len(SHAPES)), indexing="ij")
    )
    right = np.asarray([[shown[position] == shape for shape in SHAPES] for position in positions]).reshape(-1)
    right ^= np.random.default_rng(seed).random(len(right)) < NOISE
    names = [str(position) for position in positions]
    return Truth(
        positions, names, names, np.asarray(embeddings, np.float32), image, label, right, np.ones(len(right)), True
    )


@pytest.mark.slow
def test_precision_is_kept_in_ninety_of_a_hundred_splits(drawn: tuple[TaggedOutput, list[str]]) -> None:
    output, shown = drawn
    whole = make_truth(output, shown, np.arange(IMAGES), 0)
    kept = 0
    accepted_labels = []
    for seed in range(100):
        order = np.random.default_rng(seed).permutation(IMAGES)
        half = np.zeros(IMAGES, bool)
        half[order[: IMAGES // 2]] = True

        def pick(images: np.ndarray) -> Truth:
            cells = images[whole.image]
            return replace(
                whole,
                image=whole.image[cells],
                label=whole.label[cells],
                right=whole.right[cells],
                weight=whole.weight[cells],
            )

        labels = make_label_set(output, calibrate(output, pick(half), TARGET, seed=seed))
        judges = pick(~half)
        head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
        scores = head.scores(judges.embeddings)[judges.image, judges.label]
        bars = np.asarray([np.inf if bar is None else bar for bar in labels.accepts()], np.float32)
        accepted = scores >= bars[judges.label]
        accepted_labels.append(np.isfinite(bars).sum())
        assert accepted.sum() > 50
        kept += judges.right[accepted].mean() >= TARGET
    assert kept >= 90
    assert np.mean(accepted_labels) >= 4
