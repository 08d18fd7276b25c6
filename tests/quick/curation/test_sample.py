"""Stratified samples, their weights, and the files for and from Label Studio."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import curation.review.labelstudio
from benchmarks.outputs import SyntheticOutput, write_output
from curation.histogram import bin_scores
from curation.quality.truth import read_truth
from curation.review.labelstudio import CONFIG, write_tasks
from curation.sampling.files import Thumbnails, read_questions, read_sample, write_sample
from curation.sampling.sample import EDGES, STRATA, allocate, draw_sample
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its models are written for pydantic 1, which pydantic 2 warns about
    from label_studio_sdk.label_interface import LabelInterface

WIDTH, ROWS, SHARDS = 16, 1500, 4
NAMES = ['a "cat" & <dog>', "dog", "bird"]


def embed(shard: int) -> Floats:
    return draw_vectors(ROWS, WIDTH, shard)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("sample") / "made")
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.3})
    texts = np.eye(WIDTH, dtype=np.float32)[:3]
    made = SyntheticOutput(
        labels, texts, SHARDS, embed, scale=Scale(20, -8), thumbnail=lambda row: b"\xff\xd8" + bytes([row % 256])
    )
    write_output(root, made)
    return open_output(root)


@pytest.fixture(scope="module")
def scores(output: TaggedOutput) -> Floats:
    return np.concatenate(list(output.scores()))


def test_strata_are_bins_of_the_logit() -> None:
    logits = np.array([-80, -12.5, -11.5, -0.5, 0.5, 5.5, 6.5, 50], np.float32)
    scores = np.asarray(1 / (1 + np.exp(-logits)), np.float32)
    bins, counts = bin_scores(scores[None], EDGES)
    assert bins[0].tolist() == [0, 0, 1, 12, 13, 18, 19, 19]
    assert counts.shape == (8, STRATA)
    assert counts[2].tolist() == [0, 1, *[0] * 18]
    assert STRATA == len(EDGES) + 1 == 20


def test_each_stratum_gets_two_images_and_never_more_than_it_has() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        population = random.integers(0, 10 ** random.integers(1, 7), STRATA) * random.integers(0, 2, STRATA)
        count = int(random.integers(1, 300))
        drawn = allocate(population, float(random.random()), count)
        assert (drawn <= population).all()
        assert (drawn >= np.minimum(population, 2)).all()
        assert drawn.sum() >= min(count, population.sum())
        assert drawn.sum() <= max(count, 2 * STRATA)
    # Strata near the threshold get more images than strata of very low scores of the same size.
    population = np.full(STRATA, 100_000)
    drawn = allocate(population, 0.3, 200)
    assert drawn[11:14].min() > 3 * drawn[:5].max()


def test_a_sample_matches_the_scores_strata_and_weights_of_the_output(output: TaggedOutput, scores: Floats) -> None:
    sample = draw_sample(output, 60, seed=3)
    again = draw_sample(output, 60, seed=3)
    assert np.array_equal(sample.position, again.position)
    assert not np.array_equal(sample.position[:40], draw_sample(output, 60, seed=4).position[:40])
    assert np.array_equal(sample.score, scores[sample.position, sample.label])
    assert np.array_equal(sample.stratum, bin_scores(sample.score[None], EDGES)[0][0])
    for label in range(3):
        mine = sample.label == label
        assert len(set(sample.position[mine])) == mine.sum() >= 60
        strata = bin_scores(scores[:, label][None], EDGES)[0][0]
        assert np.array_equal(sample.population[label], np.bincount(strata, minlength=STRATA))
        for stratum in np.unique(strata):
            weight = sample.weight[mine & (sample.stratum == stratum)]
            assert weight.sum() == pytest.approx((strata == stratum).sum())
    assert sample.weight.sum() == pytest.approx(3 * SHARDS * ROWS)


@pytest.mark.parametrize("per_label", [1, 2, 3])
def test_the_weights_of_a_very_small_sample_add_up_to_all_images(output: TaggedOutput, per_label: int) -> None:
    # Two images are drawn from every stratum, also when `per_label` is smaller: reservoirs must hold at least two.
    assert draw_sample(output, per_label).weight.sum() == pytest.approx(3 * SHARDS * ROWS)


@pytest.mark.slow
def test_weighted_estimates_are_unbiased_and_unweighted_ones_are_not(
    output: TaggedOutput, scores: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over 300 samples: precision and recall at two thresholds, and the share of right images."""
    monkeypatch.setattr(
        "curation.sampling.sample._MAX_CANDIDATES", 5_000
    )  # so that the reservoirs are pruned several times
    random = np.random.default_rng(9)
    chance = 1 / (1 + np.exp(-(2 * np.log(scores / (1 - scores)) + 2)))
    right = random.random(scores.shape) < chance
    real: dict[str, float] = {}
    estimates: dict[str, list[tuple[float, float]]] = {}

    def figures(score: Floats, yes: np.ndarray, weight: np.ndarray) -> dict[str, float]:
        found = {"share right": (weight * yes).sum() / weight.sum()}
        for bar in (0.1, 0.5):
            predicted = score >= bar
            found[f"precision at {bar}"] = (weight * (predicted & yes)).sum() / (weight * predicted).sum()
            found[f"recall at {bar}"] = (weight * (predicted & yes)).sum() / (weight * yes).sum()
        return found

    real = figures(scores[:, 1], right[:, 1], np.ones(len(scores)))
    for seed in range(300):
        sample = draw_sample(output, 100, seed)
        mine = sample.label == 1
        yes, score = right[sample.position, 1][mine], sample.score[mine]
        weighted, naive = figures(score, yes, sample.weight[mine]), figures(score, yes, np.ones(mine.sum()))
        for name in real:
            estimates.setdefault(name, []).append((weighted[name], naive[name]))
    errors = {name: np.mean(values, axis=0) - real[name] for name, values in estimates.items()}
    assert all(abs(weighted) < 0.01 for weighted, _ in errors.values()), errors
    assert abs(errors["share right"][1]) > 0.1
    assert abs(errors["recall at 0.5"][1]) > 0.03


def test_label_studio_accepts_the_tasks_and_its_export_is_read(output: TaggedOutput, tmp_path: Path) -> None:
    sample = draw_sample(output, 40)
    write_sample(output, sample, tmp_path / "sample", 0)
    table, _ = read_sample(tmp_path / "sample")
    files = write_tasks(read_questions(tmp_path / "sample"), output.labels, tmp_path / "sample")
    tasks = json.loads(files[0].read_text())
    interface = LabelInterface((tmp_path / "sample" / "config.xml").read_text())
    interface.validate()
    for task in tasks:
        assert interface.validate_task({"data": task["data"]})
        for prediction in task["predictions"]:
            assert interface.validate_prediction(prediction, return_errors=True) == []
    assert len(tasks) == table.num_rows
    assert {task["data"]["label"] for task in tasks} == set(NAMES)
    assert {prediction["result"][0]["value"]["choices"][0] for task in tasks for prediction in task["predictions"]} == {
        "right",
        "wrong",
    }
    exported = []
    for number, task in enumerate(tasks):
        choice = ("right", "wrong", "unsure")[number % 3]
        result = [{"from_name": "answer", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}]
        earlier = {
            "result": json.loads(json.dumps(result).replace(choice, "wrong")),
            "updated_at": "2026-01-01T00:00:00Z",
        }
        annotation = {"result": result, "updated_at": "2026-01-02T00:00:00Z", "was_cancelled": False}
        assert interface.validate_annotation({"result": result})
        cancelled = {"result": result, "updated_at": "2026-01-03T00:00:00Z", "was_cancelled": True}
        annotations = [] if number == 0 else [annotation, earlier, cancelled]
        exported.append({"id": number, "annotations": annotations, "data": task["data"]})
    (tmp_path / "export.json").write_text(json.dumps(exported))
    truth = read_truth(tmp_path / "export.json", output)
    kept = [n for n in range(1, len(tasks)) if n % 3 != 2]
    assert len(truth.image) == len(kept)
    rows = table.to_pylist()
    for answer, number in enumerate(kept):
        assert truth.ids[truth.image[answer]] == rows[number]["id"]
        assert NAMES[truth.label[answer]] == rows[number]["label"]
        assert truth.right[answer] == (number % 3 == 0)
        assert truth.weight[answer] == pytest.approx(rows[number]["weight"])
    (tmp_path / "export.json").write_text('[{"annotations": [{"result": [{}]}]}]')
    with pytest.raises(ConfigError, match="not a JSON export of Label Studio"):
        read_truth(tmp_path / "export.json", output)


def test_tasks_are_split_below_the_limits(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(output, draw_sample(output, 40), tmp_path / "sample", 0)
    table, _ = read_sample(tmp_path / "sample")
    monkeypatch.setattr(curation.review.labelstudio, "MAX_TASKS", 50)
    monkeypatch.setattr(curation.review.labelstudio, "MAX_BYTES", 9_000)
    files = write_tasks(read_questions(tmp_path / "sample"), output.labels, tmp_path / "sample")
    counts = [len(json.loads(file.read_text())) for file in files]
    assert sum(counts) == table.num_rows
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= 9_100
    assert curation.review.labelstudio.MAX_TASKS <= 100_000


def test_images_without_thumbnails_are_shown_by_url_or_refused(output: TaggedOutput, tmp_path: Path) -> None:
    write_sample(output, draw_sample(output, 1), tmp_path / "sample", 0)
    bare = {**next(read_questions(tmp_path / "sample")), "thumbnail": None}
    for source in ("https://example.test/a.jpg", "s3://bucket/a.png"):
        [file] = write_tasks(iter([{**bare, "source": source}]), output.labels, tmp_path)
        assert json.loads(file.read_text())[0]["data"]["image"] == source
    with pytest.raises(ConfigError, match="thumbnails: true"):
        write_tasks(iter([bare]), output.labels, tmp_path)


def test_a_sample_is_never_overwritten(output: TaggedOutput, tmp_path: Path) -> None:
    sample = draw_sample(output, 5)
    write_sample(output, sample, tmp_path / "sample", 0)
    read, about = read_sample(tmp_path / "sample")
    assert "thumbnail" not in read.column_names
    everything = output.to_arrow(["id", "key", "thumbnail"]).to_pylist()
    thumbnails = Thumbnails(tmp_path / "sample")
    assert len(thumbnails) == read.num_rows == len(sample.position) > 64  # several row groups
    for row, question in enumerate(read_questions(tmp_path / "sample")):
        image = everything[sample.position[row]]
        assert (question["id"], question["key"], question["thumbnail"]) == (
            image["id"],
            image["key"],
            image["thumbnail"],
        )
        assert thumbnails.read(row) == image["thumbnail"]
        assert read["id"][row].as_py() == image["id"]
    assert about["population"]["dog"] == sample.population[1].tolist()
    assert pq.read_metadata(tmp_path / "sample" / "sample.parquet").num_rows == len(sample.position)
    with pytest.raises(ConfigError, match="is not empty"):
        write_sample(output, sample, tmp_path / "sample", 0)
    with pytest.raises(ConfigError, match="does not hold a sample"):
        read_sample(tmp_path)
    assert "$label" in CONFIG
