"""Precision-recall curves: points equal to scikit-learn's, and bands that hold the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import precision_score, recall_score

from benchmarks.outputs import SyntheticOutput, write_output
from curation.estimates.curves import POINTS, trace_curves
from curation.quality.evaluation import evaluate
from curation.quality.truth import Truth
from curation.sampling.design import Design
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.vectors import draw_vectors

WIDTH, ROWS = 16, 1200
LABELS = [
    {"name": "plain", "threshold": 0.2},
    {"name": "accepted", "threshold": 0.2, "accept": 0.6123},
    {"name": "no threshold"},
    {"name": "never", "threshold": 0.999999999},
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("curves") / "made")
    labels = LabelSet.model_validate({"names": LABELS, "top_k": None})
    texts = np.eye(WIDTH, dtype=np.float32)[: len(LABELS)]
    embed = draw_vectors(ROWS, WIDTH, 3)
    write_output(root, SyntheticOutput(labels, texts, 1, lambda shard: embed, scale=Scale(20, -7)))
    return open_output(root)


def answer(output: TaggedOutput, asked: NDArray[np.int64]) -> tuple[Truth, NDArray[np.bool_]]:
    """Answers about all labels of some images, as a random sample of the output; and what is right, (images, L)."""
    vectors = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    logits = output.head.logits(vectors).astype(np.float64)
    right = logits + np.random.default_rng(1).normal(0, 2, logits.shape) > 0
    image, label = (axis.reshape(-1) for axis in np.indices((len(asked), len(LABELS))))
    names = [str(row) for row in asked]
    said = right[asked][image, label]
    truth = Truth(asked, names, names, vectors[asked], image, label, said, np.ones(len(image)))
    return replace(truth, designs=(Design("", output.rows, {}),)), right


def test_with_all_answers_the_points_are_those_of_scikit_learn(output: TaggedOutput) -> None:
    truth, right = answer(output, np.arange(ROWS))
    scores = np.concatenate(list(output.scores()))
    found = evaluate(output, truth, wrong_answers=0, curves=True)
    for row, one in enumerate(found.labels[:3]):
        assert POINTS <= len(one.curve) <= POINTS + 2
        for point in one.curve:
            predicted = scores[:, row] >= np.float32(point.threshold)
            assert point.images == point.answers == predicted.sum() > 0
            expected = precision_score(right[:, row], predicted), recall_score(right[:, row], predicted)
            assert (point.precision.value, point.recall.value) == pytest.approx(expected)
            assert point.precision.low == pytest.approx(point.precision.high)
    curves = [[point.threshold for point in one.curve] for one in found.labels]
    assert all(curve == sorted(set(curve)) for curve in curves)
    assert 0.2 in curves[0]
    assert {0.2, 0.6123} <= set(curves[1])
    assert curves[3] == []  # no image has a score near its threshold


def test_the_bands_of_samples_hold_the_truth_and_what_is_not_known_is_not_told(output: TaggedOutput) -> None:
    scores = np.concatenate(list(output.scores()))
    held = []
    for seed in range(5):
        asked = np.random.default_rng(seed).choice(ROWS, 250, replace=False)
        truth, right = answer(output, asked)
        for row, curve in enumerate(trace_curves(output, truth, np.arange(3), 0.0)):
            for point in curve:
                predicted = scores[:, row] >= np.float32(point.threshold)
                if point.precision.known:
                    value = precision_score(right[:, row], predicted)
                    held.append(point.precision.low <= value <= point.precision.high)
                if point.recall.known:
                    value = recall_score(right[:, row], predicted)
                    held.append(point.recall.low <= value <= point.recall.high)
                assert point.answers or not point.precision.known
    assert len(held) > 100
    assert np.mean(held) >= 0.95


def test_no_curve_without_a_sample_or_without_asking(output: TaggedOutput) -> None:
    truth, _ = answer(output, np.arange(100))
    assert all(one.curve for one in evaluate(output, truth, curves=True).labels[:3])
    assert not any(one.curve for one in evaluate(output, truth).labels)
    assert not any(one.curve for one in evaluate(output, replace(truth, designs=()), curves=True).labels)
