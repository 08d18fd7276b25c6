"""Calibration: Platt scaling, bounds, and thresholds that keep their precision on held-out answers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from benchmarks.outputs import SyntheticOutput, write_output
from benchmarks.truths import make_binormal
from curation.estimates.cells import weigh_answers
from curation.quality.audit import audit_labels
from curation.quality.calibration import _round_down, calibrate, count_workload, make_label_set, plan_round
from curation.quality.independence import separate
from curation.quality.platt import effective_weights, fit_platt
from curation.quality.truth import Truth
from curation.sampling.sample import Exclusion, Goal, Sample, draw_sample
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.heads import accept_thresholds, build_head, tag_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

WIDTH, SHARDS, ROWS = 16, 6, 1000


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


def make_right(made: tuple[TaggedOutput, Floats], seed: int) -> NDArray[np.bool_]:
    """Whether each label is right for each image, (N, 3): with a probability that rises with the label's logit."""
    output, vectors = made
    logits = output.head.logits(vectors).astype(np.float64)
    chance = 1 / (1 + np.exp(-np.stack([3 * logits[:, 0] + 6, 0.3 * logits[:, 1] - 2, logits[:, 2] - 9], axis=1)))
    return np.asarray(np.random.default_rng(seed).random(chance.shape) < chance)


def answer(made: tuple[TaggedOutput, Floats], sample: Sample, right: NDArray[np.bool_], answered: int = 10**9) -> Truth:
    """Answer the first questions about each label of a sample."""
    output, vectors = made
    rank = np.arange(len(sample.label)) - np.searchsorted(sample.label, sample.label)
    position, label = sample.position[rank < answered], sample.label[rank < answered]
    positions, image = np.unique(position, return_inverse=True)
    names = [str(position) for position in positions]
    said = right[position, label]
    ones = np.ones(len(label))
    truth = Truth(positions, names, names, vectors[positions], image, label, said, ones, designs=(sample.design,))
    return weigh_answers(output, truth)


def judge(
    made: tuple[TaggedOutput, Floats], labels: LabelSet, right: NDArray[np.bool_]
) -> dict[str, tuple[int, float]]:
    """For each label with an accept threshold, the number of accepted images and their precision."""
    output, vectors = made
    scores = build_head(labels, output.head.vectors, output.table.scale, output.weights).scores(vectors)
    accepted = scores >= accept_thresholds(labels)
    return {
        label.name: (int(accepted[:, row].sum()), float(right[accepted[:, row], row].mean()))
        for row, label in enumerate(labels.names)
        if label.accept is not None
    }


def test_precision_reaches_the_target_in_the_whole_output(made: tuple[TaggedOutput, Floats]) -> None:
    kept = reached = 0
    for seed in range(60):
        right = make_right(made, seed)
        found = calibrate(made[0], answer(made, draw_sample(made[0], 100, seed), right), 0.9)
        judged = judge(made, make_label_set(made[0], found), right)
        assert "never" not in judged
        if "sure" in judged:
            reached += 1
            kept += judged["sure"][1] >= 0.9
            assert judged["sure"][0] > 20
    assert reached >= 45
    assert kept >= 0.95 * reached


def test_a_part_of_the_answers_is_a_sample_too(made: tuple[TaggedOutput, Floats]) -> None:
    """Whoever stops after a third of the questions gets the same shares on average."""
    shares: dict[int, list[float]] = {20: [], 60: []}
    right = make_right(made, 0)
    for seed in range(60):
        sample = draw_sample(made[0], 60, seed, Goal("evaluation"))
        for count, found in shares.items():
            truth = answer(made, sample, right, count)
            mine = truth.label == 0
            found.append(float((truth.weight * truth.right)[mine].sum() / truth.weight[mine].sum()))
    real = right[:, 0].mean()
    for found in shares.values():
        assert np.mean(found) == pytest.approx(real, abs=4 * np.std(found) / np.sqrt(len(found)))


def test_calibrated_scores_are_probabilities(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    right = make_right(made, 1)
    found = calibrate(output, answer(made, draw_sample(output, 2000, 1, Goal("evaluation")), right), 0.9)
    assert found[0].calibration is not None
    assert found[0].calibration.model == output.weights
    head = build_head(make_label_set(output, found), output.head.vectors, output.table.scale, output.weights)
    scores = head.scores(vectors)[:, 0]
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 1)):
        inside = (scores >= low) & (scores < high)
        assert inside.sum() > 40
        assert right[inside, 0].mean() == pytest.approx(scores[inside].mean(), abs=0.1)


def test_labels_that_are_not_calibrated_or_not_answered_stay_as_they_are(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    right = make_right(made, 2)
    sample = draw_sample(output, 100, 2, labels=[0, 2])
    found = calibrate(output, answer(made, sample, right), 0.9)
    assert [one.answers for one in found] == [100, 0, 100]
    labels = make_label_set(output, found)
    assert labels.names[0].accept is not None
    assert labels.names[1:] == output.labels.names[1:]


def test_a_forecast_is_about_a_threshold_that_many_images_reach() -> None:
    """The highest five or ten scores need the fewest answers, and would leave nearly all images to people."""
    known = make_binormal(8_000, seed=3)
    sample = draw_sample(known.output, 25, 0)
    truth = weigh_answers(known.output, known.answer(0, np.random.default_rng(0), sample))
    plan = plan_round(known.output, truth, 0.95)
    assert plan.from_scores.keys() >= {6, 7}
    scores = np.concatenate(list(known.output.scores()))
    for row in (6, 7):
        assert (scores[:, row] >= plan.from_scores[row]).sum() > 0.4 * (scores[:, row] >= 0.1).sum()


def test_too_few_answers_forecast_how_many_more_are_needed(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    right = make_right(made, 3)
    sample = draw_sample(output, 20, 3)
    [sure, _, never] = calibrate(output, answer(made, sample, right), 0.9)
    assert (sure.accept, never.accept) == (None, None)
    assert sure.forecast is not None
    assert 5 <= sure.forecast.more <= 80
    assert not make_label_set(output, [sure, sure, never]).has_bands()


def test_a_second_round_asks_above_a_score_and_reaches_the_target(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    right = make_right(made, 4)
    first = draw_sample(output, 20, 4)
    truth = answer(made, first, right)
    plan = plan_round(output, truth, 0.9)
    assert 0 in plan.from_scores
    asked = Exclusion(first.position, first.label)
    second = draw_sample(output, 80, 5, from_scores=plan.from_scores, exclude=asked)
    both = answer(made, second, right)
    positions, image = np.unique(np.concatenate([truth.positions, both.positions]), return_inverse=True)
    ids = [str(position) for position in positions]
    joined = Truth(
        positions,
        ids,
        ids,
        vectors[positions],
        np.concatenate([image[: len(truth.positions)][truth.image], image[len(truth.positions) :][both.image]]),
        np.concatenate([truth.label, both.label]),
        np.concatenate([truth.right, both.right]),
        np.ones(len(truth.label) + len(both.label)),
        designs=(first.design, second.design),
    )
    [sure, *_] = calibrate(output, weigh_answers(output, joined), 0.9)
    assert sure.accept is not None
    assert judge(made, make_label_set(output, [sure] * 3), right)["sure"][1] >= 0.9


def test_the_workload_counts_what_is_written(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    found = calibrate(output, answer(made, draw_sample(output, 200, 5), make_right(made, 5)), 0.9)
    labels = make_label_set(output, found)
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    chosen = tag_embeddings(vectors, labels, head)
    accepts = accept_thresholds(labels)
    for row, workload in enumerate(count_workload(output, labels)):
        scores = chosen.scores[chosen.labels == row]
        assert workload.accepted == (scores >= accepts[row]).sum()
        assert workload.review == (scores < accepts[row]).sum()


def test_the_precision_is_that_of_the_labels_that_top_k_leaves(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    right = make_right(made, 6)
    right[:, 0] &= output.head.logits(vectors).argmax(axis=1) != 0  # wrong wherever top_k keeps the label
    narrow = replace(output, table=replace(output.table, labels=output.labels.model_copy(update={"top_k": 1})))
    found = calibrate(narrow, answer(made, draw_sample(output, 1500, 6), right), 0.5, wrong_answers=0)
    labels = make_label_set(narrow, found)
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    chosen = tag_embeddings(vectors, labels, head)
    image = np.repeat(np.arange(len(vectors)), chosen.counts)
    for row, label in enumerate(labels.names):
        accepted = (chosen.labels == row) & (chosen.scores >= accept_thresholds(labels)[row])
        if label.accept is not None:
            assert right[image[accepted], row].mean() >= 0.45  # without this check, all of label 0 would be wrong


def test_a_label_that_top_k_crowds_out_says_so(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    right = make_right(made, 6)
    right[:, 0] &= output.head.logits(vectors).argmax(axis=1) != 0  # wrong wherever top_k keeps the label
    narrow = replace(output, table=replace(output.table, labels=output.labels.model_copy(update={"top_k": 1})))
    truth = answer(made, draw_sample(output, 1500, 6), right)
    wide = replace(output, table=replace(output.table, labels=output.labels.model_copy(update={"top_k": None})))
    assert calibrate(wide, truth, 0.1, wrong_answers=0)[0].accept is not None
    sure = calibrate(narrow, truth, 0.1, wrong_answers=0)[0]
    assert sure.accept is None
    assert sure.crowded_out


def test_the_scores_of_a_group_stay_probabilities(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    grouped = output.labels.model_copy(update={"groups": {"two": ("sure", "unsure")}})
    head = build_head(grouped, output.head.vectors, output.table.scale, output.weights)
    source = replace(output, table=replace(output.table, labels=grouped, head=head))
    found = calibrate(source, answer((source, made[1]), draw_sample(source, 300, 7), make_right(made, 7)), 0.6)
    assert [one.calibration for one in found[:2]] == [None, None]


@given(st.floats(1e-12, 1, allow_subnormal=False))
def test_thresholds_are_rounded_down(score: float) -> None:
    rounded = _round_down(score)
    assert rounded <= score
    assert rounded == pytest.approx(score, rel=1.1e-4)


def test_a_score_that_is_zero_in_float32_is_rounded_to_zero() -> None:
    assert _round_down(1e-305) == _round_down(5e-324) == 0


def test_best_f1_is_close_to_the_best(made: tuple[TaggedOutput, Floats]) -> None:
    output, vectors = made
    right = make_right(made, 8)
    found = calibrate(output, answer(made, draw_sample(output, 1500, 8, Goal("evaluation")), right), None)
    labels = make_label_set(output, found)
    scores = build_head(labels, output.head.vectors, output.table.scale, output.weights).scores(vectors)[:, 0]
    best = max(f1_score(right[:, 0], scores >= bar) for bar in np.quantile(scores, np.linspace(0.5, 1, 60)))
    accept = labels.names[0].accept
    assert accept is not None
    assert f1_score(right[:, 0], scores >= np.float32(accept)) >= best - 0.05


def test_answers_of_no_sample_are_refused(made: tuple[TaggedOutput, Floats]) -> None:
    truth = answer(made, draw_sample(made[0], 50, 9), make_right(made, 9))
    with pytest.raises(ConfigError, match="no sample of the output"):
        calibrate(made[0], replace(truth, designs=()))
    with pytest.raises(ConfigError, match="no sample of the output"):
        audit_labels(made[0], replace(truth, designs=()))


def test_a_calibrated_label_set_survives_yaml(made: tuple[TaggedOutput, Floats], tmp_path: Path) -> None:
    output, _ = made
    labels = make_label_set(output, calibrate(output, answer(made, draw_sample(output, 200), make_right(made, 7))))
    assert labels.names[0].chosen_by
    path = tmp_path / "labels.yaml"
    path.write_text(yaml.safe_dump(labels.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
    assert LabelSet.model_validate(str(path)) == labels


def test_answers_that_chose_a_threshold_do_not_judge_it(made: tuple[TaggedOutput, Floats]) -> None:
    output, _ = made
    right = make_right(made, 10)
    sample = draw_sample(output, 100, 10)
    chose = answer(made, sample, right)
    labels = make_label_set(output, calibrate(output, chose, 0.9))
    assert labels.names[0].chosen_by is not None
    assert labels.names[2].chosen_by is None
    assert 0 in separate(labels, chose)[1]
    fresh = answer(made, draw_sample(output, 60, 11), right)
    assert separate(labels, fresh)[1] == set()
    # Two sources, of which only the second is new: its answers remain.
    count = len(chose.label)
    both = replace(
        chose,
        positions=np.concatenate([chose.positions, fresh.positions]),
        ids=[*chose.ids, *fresh.ids],
        embeddings=np.concatenate([chose.embeddings, fresh.embeddings]),
        image=np.concatenate([chose.image, fresh.image + len(chose.positions)]),
        label=np.concatenate([chose.label, fresh.label]),
        right=np.concatenate([chose.right, fresh.right]),
        weight=np.ones(count + len(fresh.label)),
        source=np.repeat([1, 2], [count, len(fresh.label)]),
    )
    kept, dependent = separate(labels, both)
    assert dependent == set()
    assert (kept.image[kept.label == 0] >= len(chose.positions)).all()
    assert (kept.label == 2).sum() == (both.label == 2).sum()
