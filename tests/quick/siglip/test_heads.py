"""Linear heads: calibrations, probes, groups and bands; scores that do not depend on the rest of the batch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.output.label_columns import make_label_columns
from siglip.families import siglip
from siglip.heads import LinearHead, accept_thresholds, build_head, name_bands, tag_embeddings
from siglip.label_text.fitted import Probe
from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats, Scale, score_pairs, sigmoid, softmax
from tests.support.vectors import draw_vectors

SCALE = Scale(117.33, -12.93)
WIDTH = 96


def head_of(texts: Floats, **labels: Any) -> tuple[LabelSet, LinearHead]:
    made = LabelSet.model_validate(labels)
    return made, build_head(made, texts, SCALE, "model")


@pytest.mark.parametrize("labels", [1, 2, 3, 7, 64, 333])
@pytest.mark.parametrize("width", [64, 768])
def test_an_image_has_the_same_scores_in_any_batch(labels: int, width: int) -> None:
    # The rounding of one product for all rows depends on the number of rows: see siglip.scoring.
    images, texts = draw_vectors(130, width, 1), draw_vectors(labels, width, 2)
    whole = score_pairs(images, texts, SCALE)
    for rows in (1, 2, 3, 31, 32, 33, 129):
        picked = np.random.default_rng(rows).permutation(130)[:rows]
        assert np.array_equal(score_pairs(images[picked], texts, SCALE), whole[picked])


def test_scores_of_a_label_set_without_extras() -> None:
    images, texts = draw_vectors(50, WIDTH, 0), draw_vectors(3, WIDTH, 1)
    _, head = head_of(texts, names=["a", "b", "c"])
    assert np.array_equal(head.logits(images), score_pairs(images, texts, SCALE))
    assert np.array_equal(head.scores(images), sigmoid(score_pairs(images, texts, SCALE)))
    assert np.allclose(head.logits(images), SCALE.logit_scale * (images @ texts.T) + SCALE.logit_bias, atol=1e-4)


def test_calibration_changes_the_logit() -> None:
    images, texts = draw_vectors(50, WIDTH, 0), draw_vectors(2, WIDTH, 1)
    _, head = head_of(texts, names=["a", {"name": "b", "calibration": {"scale": 0.5, "bias": 3}}])
    plain = score_pairs(images, texts, SCALE)
    assert np.allclose(head.logits(images)[:, 0], plain[:, 0])
    assert np.allclose(head.logits(images)[:, 1], 0.5 * plain[:, 1] + 3, atol=1e-4)


def test_a_probe_scores_as_a_logistic_regression() -> None:
    images, texts = draw_vectors(50, WIDTH, 0), draw_vectors(2, WIDTH, 1)
    weights = np.random.default_rng(5).normal(0, 9, WIDTH).astype(np.float32)
    probe = Probe.of(weights, -1.25, "model")
    labels, head = head_of(texts, names=["a", {"name": "b", "probe": probe.model_dump()}])
    assert labels.prompts(siglip)[1] == []
    assert np.allclose(head.logits(images)[:, 1], images @ weights - 1.25, atol=1e-4)
    assert np.allclose(np.linalg.norm(head.vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(LabelError, match="trained on embeddings of the model model, and this one is another"):
        build_head(labels, texts, SCALE, "another")
    own, other = ("64patches sha256:0123456789abcdef", "64patches sha256:fedcba9876543210")
    naflex = LabelSet.model_validate({"names": [{"name": "b", "probe": Probe.of(weights, 0, own)}]})
    with pytest.raises(LabelError, match="model 64patches sha256:0123456789ab, and this one is 64patches sha256:fedcb"):
        build_head(naflex, texts[:1], SCALE, other)
    with pytest.raises(LabelError, match="train it again"):
        build_head(labels, np.zeros((2, WIDTH + 1), np.float32), SCALE, "model")


def test_a_calibration_is_refused_with_another_model() -> None:
    texts = draw_vectors(2, WIDTH, 1)
    fitted = {"scale": 0.5, "bias": 3, "model": "model"}
    labels, head = head_of(texts, names=["a", {"name": "b", "calibration": fitted}])
    unnamed, plain = head_of(texts, names=["a", {"name": "b", "calibration": {"scale": 0.5, "bias": 3}}])
    assert head.gain.tolist() == plain.gain.tolist()
    assert labels.digest(siglip) == unnamed.digest(siglip)
    build_head(unnamed, texts, SCALE, "another")
    with pytest.raises(LabelError, match="calibration of 'b' was fitted on scores of the model model, and this one is"):
        build_head(labels, texts, SCALE, "another")


def test_scores_of_a_group_add_up_to_one() -> None:
    images, texts = draw_vectors(50, WIDTH, 0), draw_vectors(4, WIDTH, 1)
    _, head = head_of(
        texts, names=["in", "cat", "out", "dog"], groups={"place": ["in", "out"], "animal": ["dog", "cat"]}
    )
    scores, logits = head.scores(images), score_pairs(images, texts, SCALE)
    assert np.allclose(scores[:, [0, 2]], softmax(logits[:, [0, 2]]))
    assert np.allclose(scores[:, [1, 3]].sum(axis=1), 1, atol=1e-6)


def test_bands_are_accept_or_review() -> None:
    texts = np.eye(3, dtype=np.float32)
    labels = LabelSet.model_validate(
        {"names": [{"name": "a", "accept": 0.9}, {"name": "b", "accept": 0.6}, "c"], "threshold": 0.2, "top_k": None}
    )
    head = build_head(labels, texts, Scale(8, -4), "model")
    image = np.asarray([[0.62, 0.6, 0.51]], np.float32)  # not of unit norm, which this head does not need
    tagged = tag_embeddings(image, labels, head)
    assert tagged.labels.tolist() == [0, 1, 2]
    assert name_bands(tagged.labels, tagged.scores, accept_thresholds(labels)).tolist() == [
        "review",
        "accept",
        "review",
    ]
    columns = make_label_columns(tagged, labels, np.asarray([False, True]))
    assert [columns[name].to_pylist() for name in ("labels", "bands")] == [
        [None, ["a", "b", "c"]],
        [None, ["review", "accept", "review"]],
    ]
    plain = LabelSet.model_validate(["a", "b", "c"])
    assert "bands" not in make_label_columns(tagged, plain, np.asarray([True]))


def test_the_digest_changes_only_with_the_scores() -> None:
    plain = LabelSet.model_validate({"names": ["cat", "dog"], "templates": ["a {label}"]})
    content = json.dumps([["cat", "dog"], [["a cat"], ["a dog"]]])
    assert plain.digest(siglip) == hashlib.sha256(content.encode()).hexdigest()
    changes: list[dict[str, Any]] = [
        {"groups": {"animal": ["cat", "dog"]}},
        {"names": ["cat", {"name": "dog", "calibration": {"scale": 2, "bias": 0}}]},
        {"names": ["cat", {"name": "dog", "probe": Probe.of(np.ones(4, np.float32), 0, "x").model_dump()}]},
        {"names": ["cat", {"name": "dog", "probe": Probe.of(np.ones(4, np.float32), 1, "x").model_dump()}]},
    ]
    digests = {LabelSet.model_validate({**plain.model_dump(), **change}).digest(siglip) for change in changes}
    assert len(digests | {plain.digest(siglip)}) == len(changes) + 1
    # Thresholds do not change scores.
    cut = LabelSet.model_validate({"names": ["cat", {"name": "dog", "accept": 0.9}], "templates": ["a {label}"]})
    assert cut.digest(siglip) == plain.digest(siglip)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"names": ["a", "b"], "groups": {"g": ["a"]}}, "group 'g' has fewer than two labels"),
        (
            {"names": ["a", "b"], "groups": {"g": ["a", "z"]}},
            "group 'g' contains 'z', which is not a label of this set",
        ),
        ({"names": ["a", "b"], "groups": {"g": ["a", "b"], "h": ["b", "a"]}}, "'b' is in two groups"),
        ({"names": ["a", "b"], "groups": {"g": ["a", "a"]}}, "'a' is in two groups, or twice in one"),
        (
            {"names": [{"name": "a", "accept": 0.1}], "threshold": 0.2},
            "'a' has accept 0.1, which is under its threshold 0.2",
        ),
        ({"names": [{"name": "a", "calibration": {"scale": -1, "bias": 0}}]}, "greater than 0"),
        ({"names": [{"name": "a", "calibration": {"scale": 1, "bias": float("nan")}}]}, "finite"),
        ({"names": [{"name": "a", "probe": {"model": "m", "weights": "AAAA", "bias": 0}}]}, "float32"),
        ({"names": [{"name": "a", "probe": {"model": "m", "weights": "AAAAAA==", "bias": 0}}]}, "all zero"),
        ({"names": [{"name": "a", "probe": {"model": "m", "weights": "AADAfw==", "bias": 0}}]}, "not finite"),
        (
            {"names": [{"name": "a", "prompts": ["x"], "probe": {"model": "m", "weights": "AACAPw==", "bias": 0}}]},
            "prompts and a probe",
        ),
    ],
)
def test_invalid_label_sets_are_refused(labels: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LabelSet.model_validate(labels)
