"""Suspect answers: those that the model contradicts, that a near-identical image contradicts, and outliers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.suspects import find_suspects
from curation.quality.truth import Truth
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from tests.support.vectors import draw_vectors

WIDTH, LABELS, ROWS = 16, 3, 300


def embed(shard: int) -> Floats:
    return draw_vectors(ROWS, WIDTH, shard)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("suspects") / "made")
    labels = LabelSet.model_validate({"names": [f"label {row}" for row in range(LABELS)], "threshold": 0.2})
    texts = np.eye(WIDTH, dtype=np.float32)[:LABELS]
    write_output(root, SyntheticOutput(labels, texts, 1, embed, scale=Scale(20, -7)))
    return open_output(root)


def make_truth(output: TaggedOutput, hidden: int = 0) -> Truth:
    """Answers about all labels. A label is right by its own logit and by the embedding's dimension `3 + label`."""
    vectors = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    noise = np.random.default_rng(0).normal(0, 0.5, (ROWS, LABELS))
    right = output.head.logits(vectors) + 7 + hidden * vectors[:, 3 : 3 + LABELS] + noise > 4
    image, label = (axis.reshape(-1) for axis in np.meshgrid(np.arange(ROWS), np.arange(LABELS), indexing="ij"))
    names = [f"image {row}" for row in range(ROWS)]
    ids = [f"0/{row}" for row in range(ROWS)]
    weight = np.ones(len(image))
    return Truth(np.arange(ROWS), ids, names, vectors, image, label, right.reshape(-1), weight, True)


def flip(truth: Truth, answers: np.ndarray) -> Truth:
    right = truth.right.copy()
    right[answers] ^= True
    return replace(truth, right=right)


@pytest.mark.parametrize("hidden", [0, 20])
def test_planted_wrong_answers_come_first(output: TaggedOutput, hidden: int) -> None:
    """Also where the prompts say little, and the other answers show what makes the label right."""
    truth = make_truth(output, hidden)
    logits = truth.logits(output) + 7 + hidden * truth.embeddings[truth.image, 3 + truth.label]
    sure = np.flatnonzero(np.abs(logits - 4) > 4)
    planted = np.random.default_rng(1).choice(sure, 20, replace=False)
    suspects = find_suspects(output, flip(truth, planted))
    expected = {(truth.ids[truth.image[i]], f"label {truth.label[i]}") for i in planted}
    assert len(expected & {(one.id, one.label) for one in suspects[:25]}) >= 18
    contradicted = [one for one in suspects if one.kind == "model"]
    margins = [one.margin for one in contradicted]
    assert margins == sorted(margins, reverse=True)
    assert margins[-1] >= 0
    first = contradicted[0]
    opposite = {"right": "wrong", "wrong": "right"}[first.answer]
    assert first.reason.startswith(
        f"answered {first.answer}, but the other answers about this label make {opposite} more"
    )


def test_answers_that_a_near_identical_image_contradicts_are_listed(output: TaggedOutput) -> None:
    truth = make_truth(output)
    one, twin = 17, 230
    vectors = truth.embeddings.copy()
    vectors[twin] = vectors[one]
    right = truth.right.reshape(ROWS, LABELS).copy()
    right[twin] = right[one]
    right[twin, 1] ^= True
    suspects = find_suspects(output, replace(truth, embeddings=vectors, right=right.reshape(-1)))
    found = [suspect for suspect in suspects if suspect.kind == "near-identical" or suspect.id in ("0/17", "0/230")]
    assert {(suspect.id, suspect.label) for suspect in found} == {("0/17", "label 1"), ("0/230", "label 1")}
    kinds = {suspect.kind: suspect.reason for suspect in found}
    said = re.search(
        r"an image with nearly the same embedding \(cosine 1\.000\) was answered (right|wrong): .* \(0/(17|230)\)",
        kinds["near-identical"],
    )
    assert said is not None


def test_an_image_far_from_all_others_is_listed_once(output: TaggedOutput) -> None:
    truth = make_truth(output)
    random = np.random.default_rng(3)
    vectors = np.eye(WIDTH)[0] + random.normal(0, 0.05, (ROWS, WIDTH))
    vectors[42] = np.eye(WIDTH)[9]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    suspects = find_suspects(output, replace(truth, embeddings=vectors))
    assert [one.id for one in suspects if "far from all other answered images" in one.reason] == ["0/42"]
    alone = find_suspects(output, replace(truth, embeddings=vectors, right=truth.right & False))
    assert [(one.id, one.kind) for one in alone] == [("0/42", "outlier")]


def test_a_label_with_one_kind_of_answers_has_no_margin(output: TaggedOutput) -> None:
    truth = make_truth(output)
    truth = replace(truth, right=truth.right | (truth.label == 0))
    suspects = find_suspects(output, truth)
    assert "label 0" not in {one.label for one in suspects if one.kind == "model"}
    assert all(math.isnan(one.margin) for one in suspects if one.label == "label 0")


def test_few_training_answers_stand_for_all(output: TaggedOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = make_truth(output)
    whole = {(one.id, one.label): one.margin for one in find_suspects(output, truth)}
    monkeypatch.setattr("curation.quality.suspects.MAX_TRAINING", 60)
    part = {(one.id, one.label): one.margin for one in find_suspects(output, truth)}
    assert part != whole
    shared = part.keys() & whole.keys()
    assert len(shared) > len(whole) / 2
    assert np.mean([abs(part[one] - whole[one]) for one in shared]) < 1


def test_at_most_so_many_of_each_kind(output: TaggedOutput) -> None:
    truth = flip(make_truth(output), np.arange(0, ROWS * LABELS, 10))
    kinds = [one.kind for one in find_suspects(output, truth, most=4)]
    assert kinds.count("model") == 4
    assert max(map(kinds.count, kinds)) <= 4
