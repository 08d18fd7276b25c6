"""Calibration of the shipped checkpoint's scores from simulated answers, a small share of which is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.calibration import calibrate, make_label_set
from curation.quality.truth import Truth
from curation.tagged_output import TaggedOutput, open_output
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
    """An output with new drawings and the eight shapes as labels, and the shape that each drawing shows."""
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
    """Return simulated answers about each label of the images at these positions. A share `NOISE` of them is wrong."""
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
def test_held_out_precision_reaches_the_target_in_at_least_90_of_100_splits(
    drawn: tuple[TaggedOutput, list[str]],
) -> None:
    output, shown = drawn
    truth = make_truth(output, shown, np.arange(IMAGES), 0)
    reached = 0
    accepted_labels = []
    for seed in range(100):
        order = np.random.default_rng(seed).permutation(IMAGES)
        half = np.zeros(IMAGES, bool)
        half[order[: IMAGES // 2]] = True

        def pick(images: np.ndarray) -> Truth:
            cells = images[truth.image]
            return replace(
                truth,
                image=truth.image[cells],
                label=truth.label[cells],
                right=truth.right[cells],
                weight=truth.weight[cells],
            )

        labels = make_label_set(output, calibrate(output, pick(half), TARGET, seed=seed))
        held_out = pick(~half)
        head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
        scores = head.scores(held_out.embeddings)[held_out.image, held_out.label]
        thresholds = np.asarray(
            [np.inf if threshold is None else threshold for threshold in labels.accepts()], np.float32
        )
        accepted = scores >= thresholds[held_out.label]
        accepted_labels.append(np.isfinite(thresholds).sum())
        assert accepted.sum() > 50
        reached += held_out.right[accepted].mean() >= TARGET
    assert reached >= 90
    assert np.mean(accepted_labels) >= 4
