"""Evaluation: metrics equal to scikit-learn's, intervals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, top_k_accuracy_score
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.evaluation import evaluate
from curation.quality.truth import Truth, read_truth
from curation.sampling.design import Design
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from sightline.cli import app
from siglip.heads import tag_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from tests.support.vectors import draw_vectors

WIDTH, LABELS, ROWS = 16, 7, 400


def embed(shard: int) -> Floats:
    return draw_vectors(ROWS, WIDTH, shard)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("evaluation") / "made")
    names = [{"name": f"label {row}", "threshold": 0.2 + row / 20} for row in range(LABELS)]
    labels = LabelSet.model_validate({"names": names, "top_k": None})
    write_output(root, SyntheticOutput(labels, np.eye(WIDTH, dtype=np.float32)[:LABELS], 2, embed, scale=Scale(20, -7)))
    return open_output(root)


def make_truth(
    output: TaggedOutput, seed: int, exclusive: bool = False, weighted: bool = False, noise: float = 3
) -> Truth:
    vectors = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    random = np.random.default_rng(seed)
    logits = output.head.logits(vectors).astype(np.float64) + random.normal(0, noise, (len(vectors), LABELS))
    right = logits >= logits.max(axis=1, keepdims=True) if exclusive else logits > 0
    image, label = (axis.reshape(-1) for axis in np.meshgrid(np.arange(2 * ROWS), np.arange(LABELS), indexing="ij"))
    weight = random.uniform(0.2, 5, len(image)) if weighted else np.ones(len(image))
    names = [str(row) for row in range(2 * ROWS)]
    positions = np.arange(2 * ROWS)
    return Truth(positions, names, names, vectors, image, label, right.reshape(-1), weight, True, exclusive)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_equal_scikit_learn(output: TaggedOutput, weighted: bool) -> None:
    truth = make_truth(output, 1, weighted=weighted)
    found = evaluate(output, truth)
    scores = output.head.scores(truth.embeddings)[truth.image, truth.label]
    predicted = scores >= np.asarray(output.labels.thresholds(), np.float32)[truth.label]
    averages = []
    for row, one in enumerate(found.labels):
        mine = truth.label == row
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth.right[mine], predicted[mine], average="binary", sample_weight=truth.weight[mine]
        )
        average = average_precision_score(truth.right[mine], scores[mine], sample_weight=truth.weight[mine])
        averages.append(average)
        figures = (one.precision, one.recall, one.f1, one.average_precision)
        assert [figure.value for figure in figures] == pytest.approx([precision, recall, f1, average])
        assert all(math.isnan(figure.low) for figure in figures)  # no sample: no interval
        assert (one.answers, one.right) == (mine.sum(), truth.right[mine].sum())
    micro = precision_recall_fscore_support(truth.right, predicted, average="binary", sample_weight=truth.weight)[:3]
    assert [found.micro_precision.value, found.micro_recall.value, found.micro_f1.value] == pytest.approx(micro)
    assert found.mean_average_precision.value == pytest.approx(np.mean(averages))
    assert found.confusions


def test_a_random_sample_and_all_images_give_the_same_values_as_scikit_learn_with_intervals(
    output: TaggedOutput,
) -> None:
    whole = replace(make_truth(output, 1), designs=(Design("", output.rows, {}),))
    found = evaluate(output, whole, wrong_answers=0)
    plain = evaluate(output, replace(whole, designs=()))
    for one, other in zip(found.labels, plain.labels, strict=True):
        for name in ("precision", "recall", "f1"):
            figure = getattr(one, name)
            assert figure.value == pytest.approx(getattr(other, name).value)
            # Everything is known, so that there is nothing to estimate.
            assert (figure.low, figure.high) == pytest.approx((figure.value, figure.value))


def test_top_k_keeps_a_label_from_being_predicted(output: TaggedOutput) -> None:
    labels = output.labels.model_copy(update={"top_k": 1})
    narrow = replace(output, table=replace(output.table, labels=labels))
    truth = make_truth(output, 1)
    chosen = tag_embeddings(truth.embeddings, labels, output.head)
    hits = sum(
        bool(truth.right.reshape(-1, LABELS)[image, label])
        for image, (found, _) in enumerate(chosen.rows())
        for label in found
    )
    assert evaluate(narrow, truth).micro_precision.value == pytest.approx(hits / len(chosen.labels))


def test_top_k_and_confusions_with_one_right_label_per_image(output: TaggedOutput) -> None:
    truth = make_truth(output, 2, exclusive=True)
    found = evaluate(output, truth)
    scores = output.head.scores(truth.embeddings)
    right = truth.label[truth.right]
    for k, share in found.top.items():
        assert share.value == pytest.approx(top_k_accuracy_score(right, scores, k=k, labels=np.arange(LABELS)))
    assert list(found.top) == [1, 5]
    best = scores.argmax(axis=1)
    pair = found.confusions[0]
    names = output.labels.label_names()
    counted = ((right == names.index(pair.right)) & (best == names.index(pair.given))).sum()
    assert pair.images == counted > 0
    assert [c.images for c in found.confusions] == sorted((c.images for c in found.confusions), reverse=True)


def test_confusions_are_found_among_answers_about_single_labels(output: TaggedOutput) -> None:
    truth = make_truth(output, 1)
    whole = {(one.right, one.given): one for one in evaluate(output, truth).confusions}
    kept = np.random.default_rng(3).random(len(truth.image)) < 0.4
    columns = {name: getattr(truth, name)[kept] for name in ("image", "label", "right", "weight")}
    some = evaluate(output, replace(truth, **columns, complete=False))
    assert not some.complete
    names, said = output.labels.label_names(), {}
    for image, label, right in zip(truth.image[kept], truth.label[kept], truth.right[kept], strict=True):
        said[int(image), names[label]] = bool(right)
    written = tag_embeddings(truth.embeddings, output.labels, output.head)
    labels = [{names[label] for label in found} for found, _ in written.rows()]
    assert some.confusions
    for pair in some.confusions:
        images = [
            image
            for image in range(2 * ROWS)
            if said.get((image, pair.right)) is True and said.get((image, pair.given)) is False
            if pair.given in labels[image]
        ]
        assert pair.images == len(images) > 0
        assert set(pair.examples) <= set(images)
        if (pair.right, pair.given) in whole:
            assert pair.images < whole[pair.right, pair.given].images


def test_equal_scores_share_a_rank(output: TaggedOutput, tmp_path: Path) -> None:
    """All scores of a saturated label are 1: its average precision is the share of right answers in any order."""
    truth = make_truth(output, 8)
    order = np.lexsort((~truth.right, truth.label))  # right answers first
    truth = replace(truth, image=truth.image[order], label=truth.label[order], right=truth.right[order])
    saturated = str(tmp_path / "saturated")
    texts = np.eye(WIDTH, dtype=np.float32)[:LABELS]
    write_output(saturated, SyntheticOutput(output.labels, texts, 2, embed, scale=Scale(20, 100)))
    for one in evaluate(open_output(saturated), truth).labels:
        assert one.average_precision.value == pytest.approx(one.right / one.answers)


def test_undefined_metrics_are_null_in_json(output: TaggedOutput) -> None:
    truth = make_truth(output, 6)
    first = truth.label == 0
    found = evaluate(output, replace(truth, right=truth.right & ~first))
    assert math.isnan(found.labels[0].average_precision.value)
    parsed = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert parsed["labels"][0]["average_precision"] == {"value": None, "low": None, "high": None}
    assert parsed["labels"][0]["recall"]["value"] is None


@pytest.mark.slow
def test_commands_evaluate_calibrate_and_probe(output: TaggedOutput, tmp_path: Path) -> None:
    truth = make_truth(output, 7)
    names = output.labels.label_names()
    keys = [key for batch in output.batches(["key"]) for key in batch["key"].to_pylist()]
    file = tmp_path / "truth.jsonl"
    by_image: dict[int, list[str]] = {position: [] for position in range(2 * ROWS)}
    for image, label, right in zip(truth.image, truth.label, truth.right, strict=True):
        if right:
            by_image[int(image)].append(names[label])
    file.write_text("".join(json.dumps({"key": keys[i], "labels": right}) + "\n" for i, right in by_image.items()))
    assert np.array_equal(read_truth(file, output).right, truth.right)
    printed = CliRunner().invoke(app, ["evaluate", output.uri, "--truth", str(file), "--json"])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["images"] == 800
    shown = CliRunner().invoke(app, ["evaluate", output.uri, "--truth", str(file)])
    assert "mean average precision" in shown.stdout
    assert "check again: image 0" in shown.stdout
    for command, verdict in (("calibrate", "of 7 labels calibrated"), ("probe", "of 7 labels have a probe")):
        target = tmp_path / f"{command}.yaml"
        done = CliRunner().invoke(app, [command, output.uri, "--truth", str(file), "--labels-out", str(target)])
        assert done.exit_code == 0, done.output
        assert verdict in done.stdout
        assert LabelSet.model_validate(str(target)).label_names() == names
        refused = CliRunner().invoke(app, [command, str(tmp_path), "--truth", str(file), "--labels-out", "none.yaml"])
        assert refused.exit_code == 2
        assert "not a finished output" in refused.stderr
        assert not Path("none.yaml").exists()
