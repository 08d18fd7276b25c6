"""Calibration: Platt scaling, bounds, and thresholds that keep their precision on held-out answers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.calibration import (
    JUDGE_QUANTILE,
    _round_down,
    calibrate,
    count_answers_needed,
    count_workload,
    effective_weights,
    fit_platt,
    make_label_set,
    wilson_bound,
)
from curation.quality.truth import Truth
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from tests.support.vectors import draw_vectors

WIDTH, SHARDS, ROWS = 16, 6, 1000


def test_wilson_bound_equals_statsmodels() -> None:
    # Expected: statsmodels.stats.proportion.proportion_confint(9, 10, 0.1, "wilson"), and for (52, 52) and (0, 10).
    assert wilson_bound(0.9, 10, JUDGE_QUANTILE) == pytest.approx(0.6523, abs=1e-4)
    assert wilson_bound(1.0, 52, JUDGE_QUANTILE) >= 0.95 > wilson_bound(1.0, 51, JUDGE_QUANTILE)
    assert wilson_bound(0.0, 10, JUDGE_QUANTILE) == pytest.approx(0)
    assert count_answers_needed(1.0, 0.95) == 52
    assert count_answers_needed(1.0, 0.9) == 25
    assert count_answers_needed(0.95, 0.95) is None
    needed = count_answers_needed(0.97, 0.95)
    assert needed is not None
    assert wilson_bound(0.97, needed, JUDGE_QUANTILE) >= 0.95 > wilson_bound(0.97, needed - 1, JUDGE_QUANTILE)


def test_effective_weights_add_up_to_kishs_effective_number() -> None:
    assert effective_weights(np.full(10, 7.0)).sum() == pytest.approx(10)
    assert effective_weights(np.array([1.0, 1, 1, 97])).sum() == pytest.approx(100**2 / (97**2 + 3))


def test_platt_scaling_is_logistic_regression_with_a_prior_for_few_answers() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(-3, 2, 4000)
    right = random.random(4000) < 1 / (1 + np.exp(-(0.6 * logits + 1)))
    ones = np.ones(4000)
    scale, bias = fit_platt(logits, right, ones, (1.0, 0.0), math.inf)
    known = LogisticRegression(C=np.inf).fit(logits[:, None], right)
    assert (scale, bias) == pytest.approx((known.coef_[0, 0], known.intercept_[0]), abs=2e-3)
    assert (scale, bias) == pytest.approx((0.6, 1), abs=0.15)
    few = fit_platt(logits[:3], np.ones(3, bool), ones[:3], (0.6, 1.0), 2.0)
    assert few[0] == pytest.approx(0.6, abs=0.3)
    assert 1 < few[1] < 4  # without a prior it would be infinite
    assert fit_platt(logits[:0], right[:0], ones[:0], (0.6, 1.0), 2.0) == (0.6, 1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaggedOutput, Floats]:
    """An output of 6,000 images with three labels, and all its embeddings."""
    root = str(tmp_path_factory.mktemp("calibration") / "made")
    texts = np.eye(WIDTH, dtype=np.float32)[:3]

    labels = LabelSet.model_validate({"names": ["sure", "unsure", "never"], "threshold": 0.01})
    write_output(root, SyntheticOutput(labels, texts, SHARDS, partial(draw_vectors, ROWS, WIDTH), scale=Scale(20, -7)))
    output = open_output(root)
    vectors = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    return output, vectors


def draw(made: tuple[TaggedOutput, Floats], seed: int, noise: float = 0.0) -> tuple[Truth, Truth]:
    """Draw 3,000 images with an answer about each label, in two halves. A share `noise` of the answers is flipped.

    The probability that a label is right rises with its logit.
    """
    output, vectors = made
    random = np.random.default_rng(seed)
    positions = random.permutation(len(vectors))[:3000]
    logits = output.head.logits(vectors[positions]).astype(np.float64)
    chance = 1 / (1 + np.exp(-np.stack([3 * logits[:, 0] + 6, 0.3 * logits[:, 1] - 2, logits[:, 2] - 9], axis=1)))
    right = (random.random(chance.shape) < chance) ^ (random.random(chance.shape) < noise)
    halves = []
    for part in (slice(0, 1500), slice(1500, 3000)):
        image, label = (axis.reshape(-1) for axis in np.meshgrid(np.arange(1500), np.arange(3), indexing="ij"))
        names = [str(position) for position in positions[part]]
        ones = np.ones(4500)
        halves.append(
            Truth(
                positions[part],
                names,
                names,
                vectors[positions[part]],
                image,
                label,
                right[part].reshape(-1),
                ones,
                True,
            )
        )
    return halves[0], halves[1]


def judge(output: TaggedOutput, labels: LabelSet, truth: Truth) -> dict[str, tuple[int, float]]:
    """For each label with an accept threshold, the number of accepted answers and their precision."""
    from siglip.heads import build_head

    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    scores = head.scores(truth.embeddings)[truth.image, truth.label]
    accepted_by_label = {}
    for row, label in enumerate(labels.names):
        if label.accept is not None:
            accepted = (truth.label == row) & (scores >= np.float32(label.accept))
            accepted_by_label[label.name] = (
                int(accepted.sum()),
                float(truth.right[accepted].mean()) if accepted.any() else 1.0,
            )
    return accepted_by_label


@pytest.mark.slow
@pytest.mark.parametrize(("target", "noise"), [(0.9, 0.03), (0.95, 0.0), (0.8, 0.05)])
def test_precision_reaches_the_target_on_held_out_answers(
    made: tuple[TaggedOutput, Floats], target: float, noise: float
) -> None:
    # Without a bound, the lowest threshold that has the target precision on its own answers keeps it in about half.
    kept = reached = 0
    for seed in range(100):
        chose, judges = draw(made, seed, noise)
        found = calibrate(made[0], chose, target, seed=seed)
        judged = judge(made[0], make_label_set(made[0], found), judges)
        assert "never" not in judged
        if "sure" in judged:
            reached += 1
            kept += judged["sure"][1] >= target
            assert judged["sure"][0] > 20
    assert reached >= 65
    assert kept >= 0.9 * reached


def test_calibrated_scores_are_probabilities(made: tuple[TaggedOutput, Floats]) -> None:
    from siglip.heads import build_head

    output, _ = made
    chose, judges = draw(made, 1)
    labels = make_label_set(output, calibrate(output, chose))
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    scores = head.scores(judges.embeddings)[judges.image, judges.label]
    for row in (0, 1):
        mine = judges.label == row
        for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 1)):
            inside = mine & (scores >= low) & (scores < high)
            if inside.sum() > 100:
                assert judges.right[inside].mean() == pytest.approx(scores[inside].mean(), abs=0.1)


def test_too_few_answers_report_how_many_more_are_needed(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    whole, _ = draw(made, 3)
    few = np.isin(whole.image, np.arange(40))
    short = replace(
        whole, image=whole.image[few], label=whole.label[few], right=whole.right[few], weight=whole.weight[few]
    )
    [sure, unsure, never] = calibrate(output, short, 0.95)
    assert (sure.accept, never.accept, unsure.accept) == (None, None, None)
    assert sure.answers_needed is not None
    assert 30 <= sure.answers_needed <= 52
    assert never.answers_needed is None
    labels = make_label_set(output, [sure, unsure, never])
    assert not labels.has_bands()


def test_review_band_has_the_wanted_recall_and_the_workload_is_counted(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    whole, _ = draw(made, 4)
    found = calibrate(output, whole, 0.9, recall=0.97)
    labels = make_label_set(output, found)
    [sure, *_] = labels.names
    assert sure.accept is not None
    assert sure.threshold is not None
    assert sure.threshold < sure.accept
    from siglip.heads import build_head

    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    scores = head.scores(whole.embeddings)[whole.image, whole.label]
    right = whole.right & (whole.label == 0)
    assert (scores[right] >= sure.threshold).mean() >= 0.97
    everything = head.scores(vectors)[:, 0]
    [workload, *_] = count_workload(output, labels)
    assert workload.accepted == (everything >= np.float32(sure.accept)).sum() > 100
    assert workload.review == (everything >= np.float32(sure.threshold)).sum() - workload.accepted > 0


def test_weights_correct_a_biased_sample(made: tuple[TaggedOutput, Floats]) -> None:
    """Right answers are drawn five times as often as wrong ones. Without weights, the threshold is too low."""
    output, _ = made
    truth, judges = draw(made, 5)
    random = np.random.default_rng(5)
    drawn = random.random(len(truth.image)) < np.where(truth.right, 1.0, 0.2)

    def pick(weight: np.ndarray) -> Truth:
        return replace(
            truth, image=truth.image[drawn], label=truth.label[drawn], right=truth.right[drawn], weight=weight[drawn]
        )

    weighted = calibrate(output, pick(np.where(truth.right, 1.0, 5.0)), 0.9)[0]
    naive = calibrate(output, pick(np.ones(len(truth.image))), 0.9)[0]
    assert naive.accept is not None
    assert weighted.accept is not None
    accepted = judge(output, make_label_set(output, [weighted] * 3), judges)["sure"]
    fooled = judge(output, make_label_set(output, [naive] * 3), judges)["sure"]
    assert accepted[1] >= 0.9 > fooled[1]


@given(st.floats(1e-12, 1, allow_subnormal=False))
def test_thresholds_are_rounded_down(score: float) -> None:
    rounded = _round_down(score)
    assert rounded <= score
    assert rounded == pytest.approx(score, rel=1.1e-4)


def test_best_f1_is_close_to_the_best_on_held_out_answers(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    truth, judges = draw(made, 6)
    found = calibrate(output, truth, None)
    labels = make_label_set(output, found)
    [sure, *_] = labels.names
    from sklearn.metrics import f1_score

    from siglip.heads import build_head

    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    mine = judges.label == 0
    scores = head.scores(judges.embeddings)[:, 0]
    best = max(f1_score(judges.right[mine], scores >= bar) for bar in np.quantile(scores, np.linspace(0.5, 1, 60)))
    assert sure.accept is not None
    assert f1_score(judges.right[mine], scores >= np.float32(sure.accept)) >= best - 0.03


def test_a_calibrated_label_set_survives_yaml(made: tuple[TaggedOutput, Floats], tmp_path: Path) -> None:
    import yaml

    output, _ = made
    labels = make_label_set(output, calibrate(output, draw(made, 7)[0]))
    path = tmp_path / "labels.yaml"
    path.write_text(yaml.safe_dump(labels.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
    assert LabelSet.model_validate(str(path)) == labels
