"""Stratified samples, their weights, and the files for and from Label Studio."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import curation.review.labelstudio
from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.truth import read_truth
from curation.review.labelstudio import CONFIG, read_answers, write_tasks
from curation.sampling.files import Thumbnails, read_design, read_questions, read_sample, write_sample
from curation.sampling.sample import Exclusion, Goal, choose_strata, draw_sample
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from sightline.cli import app
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError
from tests.support.outputs import make_output
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


GOALS = (Goal(), Goal("evaluation"), Goal("audit"))


@pytest.mark.parametrize("goal", GOALS)
def test_a_labels_questions_are_as_many_as_asked_for_and_fit_into_their_strata(goal: Goal) -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        population = random.integers(0, 10 ** random.integers(1, 7), 22) * random.integers(0, 2, 22)
        available = np.minimum(population, random.integers(0, 10**6, 22))
        count = int(random.integers(1, 300))
        strata = choose_strata(available, 13, count, goal)
        sizes = [stratum.size for stratum in strata]
        rooms = [int(available[stratum.first : stratum.end].sum()) for stratum in strata]
        assert all(0 <= size <= room for size, room in zip(sizes, rooms, strict=True))
        every = available[13:].sum() if goal.purpose == "audit" else available.sum()
        assert sum(sizes) == min(count, every)
        assert [stratum.end for stratum in strata[1:]] == [stratum.first for stratum in strata[:-1]]
        assert (strata[0].end, strata[-1].first) == (22, 0)


def test_a_sample_matches_the_scores_strata_and_weights_of_the_output(output: TaggedOutput, scores: Floats) -> None:
    sample = draw_sample(output, 60, seed=3)
    again = draw_sample(output, 60, seed=3)
    assert np.array_equal(sample.position, again.position)
    assert sample.design.sample == again.design.sample
    other = draw_sample(output, 60, seed=4)
    assert not np.array_equal(sample.position[:40], other.position[:40])
    assert sample.design.sample != other.design.sample
    assert np.array_equal(sample.score, scores[sample.position, sample.label])
    for label, name in enumerate(NAMES):
        mine = sample.label == label
        assert len(set(sample.position[mine])) == mine.sum() == 60
        strata = sample.design.assign_strata(name, scores[:, label])
        assert np.array_equal(sample.stratum[mine], strata[sample.position[mine]])
        assert sample.population[name] == np.bincount(strata, minlength=3).tolist()
        assert sample.drawn[name] == np.bincount(sample.stratum[mine], minlength=3).tolist()
        assert ((strata == 2) == (scores[:, label] >= np.float32(0.3))).all()
        for stratum in np.unique(sample.stratum[mine]):
            weight = sample.weight[mine & (sample.stratum == stratum)]
            assert weight.sum() == pytest.approx((strata == stratum).sum())


def test_the_first_questions_of_a_label_are_a_sample_of_its_strata(output: TaggedOutput) -> None:
    """The rank of a question within its label does not depend on its stratum or its score."""
    correlations = []
    for seed in range(40):
        sample = draw_sample(output, 60, seed, Goal("evaluation"))
        mine = sample.label == 1
        correlations.append(np.corrcoef(np.arange(mine.sum()), sample.score[mine])[0, 1])
    assert abs(np.mean(correlations)) < 4 / np.sqrt(40 * 60)


def test_excluded_questions_are_not_asked_again_and_count_in_their_strata(output: TaggedOutput, scores: Floats) -> None:
    first = draw_sample(output, 200, 0)
    second = draw_sample(output, 200, 0, exclude=Exclusion(first.position, first.label))
    pairs = [set(zip(one.position.tolist(), one.label.tolist(), strict=True)) for one in (first, second)]
    assert not pairs[0] & pairs[1]
    assert first.population == second.population
    only = draw_sample(output, 50, 0, from_scores={1: 0.2}, exclude=Exclusion(first.position, first.label))
    assert set(only.label.tolist()) == {1}
    assert (only.score >= np.float32(0.2)).all()
    assert only.population["dog"][1] == (scores[:, 1] >= np.float32(0.2)).sum()


def test_every_image_of_a_stratum_is_drawn_equally_often(
    output: TaggedOutput, scores: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curation.sampling.sample._MAX_CANDIDATES", 3_000)  # the reservoirs are pruned several times
    drawn = np.zeros(scores.shape, np.int64)
    for seed in range(120):
        sample = draw_sample(output, 40, seed)
        np.add.at(drawn, (sample.position, sample.label), 1)
    strata = draw_sample(output, 40, 0).design.assign_strata("dog", scores[:, 1])
    for stratum in (1, 2):
        counts = drawn[strata == stratum, 1]
        halves = counts[: len(counts) // 2].sum(), counts[len(counts) // 2 :].sum()
        assert abs(halves[0] - halves[1]) < 5 * np.sqrt(sum(halves)) + 5
        upper = scores[strata == stratum, 1] >= np.median(scores[strata == stratum, 1])
        assert abs(counts[upper].sum() - counts[~upper].sum()) < 5 * np.sqrt(counts.sum()) + 5


def test_goals_are_read_or_refused() -> None:
    assert Goal.parse("precision=0.95") == Goal("precision", 0.95)
    assert Goal.parse("precision") == Goal()
    assert Goal.parse("evaluation").purpose == "evaluation"
    for wrong in ("precision=2", "precision=", "recall=0.9", "evaluation=3", "audit", ""):
        with pytest.raises(ConfigError, match=r"write precision=0\.9"):
            Goal.parse(wrong)


def test_label_studio_accepts_the_tasks_and_its_export_is_read(output: TaggedOutput, tmp_path: Path) -> None:
    sample = draw_sample(output, 40)
    write_sample(output, sample, tmp_path / "sample", 0, Goal())
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
    truth = read_truth(tmp_path / "export.json", output, samples=[tmp_path / "sample"])
    kept = [n for n in range(1, len(tasks)) if n % 3 != 2]
    assert len(truth.image) == len(kept)
    rows = table.to_pylist()
    for answer, number in enumerate(kept):
        assert truth.ids[truth.image[answer]] == rows[number]["id"]
        assert NAMES[truth.label[answer]] == rows[number]["label"]
        assert truth.right[answer] == (number % 3 == 0)
    (tmp_path / "export.json").write_text('[{"annotations": [{"result": [{}]}]}]')
    with pytest.raises(ConfigError, match="not a JSON export of Label Studio"):
        read_truth(tmp_path / "export.json", output)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[", "Expecting value"),
        ('{"annotations": []}', "it is not a list of tasks"),
        ('[{"annotations": []}, "text"]', "its item 2 is not such a task"),
        ('[{"annotations": [{"result": [{"from_name": "answer"}]}]}]', "its item 1 is not such a task"),
    ],
)
def test_another_file_than_an_export_is_refused_in_plain_words(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_answers(tmp_path / "export.json")
    assert f"is not a JSON export of Label Studio with tasks of `sightline sample`: {why}" in str(refused.value)


def test_tasks_are_split_below_the_limits(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(output, draw_sample(output, 40), tmp_path / "sample", 0, Goal())
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
    write_sample(output, draw_sample(output, 1), tmp_path / "sample", 0, Goal())
    bare = {**next(read_questions(tmp_path / "sample")), "thumbnail": None}
    for source in ("https://example.test/a.jpg", "s3://bucket/a.png"):
        [file] = write_tasks(iter([{**bare, "source": source}]), output.labels, tmp_path)
        assert json.loads(file.read_text())[0]["data"]["image"] == source
    with pytest.raises(ConfigError, match="thumbnails: true"):
        write_tasks(iter([bare]), output.labels, tmp_path)


def test_a_sample_is_never_overwritten(output: TaggedOutput, tmp_path: Path) -> None:
    sample = draw_sample(output, 30)
    write_sample(output, sample, tmp_path / "sample", 0, Goal())
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
    assert about["strata"]["dog"]["images"] == sample.population["dog"]
    assert set(read["sample"].to_pylist()) == {sample.design.sample} == {about["sample"]}
    design = read_design(tmp_path / "sample")
    assert design.head is not None
    scored = output.head.scores(read_embeddings(output.to_arrow(["embedding"])))
    again = design.head.scores(read_embeddings(output.to_arrow(["embedding"])))
    assert np.array_equal(scored, again)
    assert np.array_equal(design.edges["dog"], sample.design.edges["dog"])
    assert pq.read_metadata(tmp_path / "sample" / "sample.parquet").num_rows == len(sample.position)
    with pytest.raises(ConfigError, match="is not empty"):
        write_sample(output, sample, tmp_path / "sample", 0, Goal())
    with pytest.raises(ConfigError, match="does not hold a sample"):
        read_sample(tmp_path)
    assert "$label" in CONFIG


def test_a_further_round_names_its_exclusions_and_says_when_a_list_is_cut(tmp_path: Path) -> None:
    made = make_output(tmp_path / "made", 7)
    names = made.labels.label_names()
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["sample", made.uri, str(first), "--per-label", "10", "--label", names[0]]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "excluded" not in read_sample(first)[1]
    rows = pq.read_table(first / "sample.parquet").drop_columns(["thumbnail"]).to_pylist()
    (first / "answers.jsonl").write_text("".join(json.dumps({**row, "answer": "right"}) + "\n" for row in rows))
    done = CliRunner().invoke(app, ["sample", made.uri, str(second), "--more", "--exclude", str(first)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.split())
    assert f"6 labels have no answers to plan by: sample them without --more: {', '.join(names[1:6])}, ..." in said
    assert read_sample(second)[1]["excluded"] == [str(first)]
