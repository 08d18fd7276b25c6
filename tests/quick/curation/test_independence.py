"""Answers that judge: fresh questions, answers that chose a threshold, and samples of other outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput, write_output
from benchmarks.truths import KnownTruth, make_binormal
from curation.estimates.cells import weigh_answers
from curation.quality.audit import LabelAudit, audit_labels
from curation.quality.calibration import calibrate, make_label_set, plan_round
from curation.quality.independence import make_fingerprint, separate
from curation.quality.probe import LabelProbe
from curation.quality.probe import make_label_set as probe_labels
from curation.quality.truth import Truth, read_truth
from curation.sampling.files import write_sample
from curation.sampling.sample import Exclusion, Goal, draw_sample
from curation.tagged_output import TaggedOutput, open_output
from sightline.cli import app
from siglip.heads import build_head
from siglip.label_text.fitted import Probe
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

ROWS, NAMES = 300, ["a", "b"]


@pytest.fixture(scope="module")
def known() -> KnownTruth:
    return make_binormal(8_000, seed=3)


def write(root: Path, seed: int = 0, weights: str = "made-up", width: int = 16, **labels: object) -> TaggedOutput:
    """An output of which most images reach a label's threshold. With another seed the images are others."""
    label_set = LabelSet.model_validate({"names": NAMES, "threshold": 1e-6, "top_k": None, **labels})
    texts = draw_vectors(2, width, 1)
    made = SyntheticOutput(
        label_set,
        texts,
        1,
        lambda shard: draw_vectors(ROWS, width, seed),
        weights=weights,
        digest=lambda row: f"{seed} {row}",
    )
    write_output(str(root), made)
    return open_output(str(root))


def answer_file(folder: Path, answers: dict[str, str]) -> Path:
    """Give the same answer to all questions about a label."""
    columns = ["id", "sha256", "label", "sample"]
    rows = pq.read_table(folder / "sample.parquet", columns=columns).to_pylist()
    lines = [json.dumps({**row, "answer": answers[row["label"]]}) for row in rows if row["label"] in answers]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sample_folder(output: TaggedOutput, folder: Path, *, audit: bool = False) -> Path:
    goal = Goal("audit" if audit else "precision")
    write_sample(output, draw_sample(output, 20, 0, goal), folder, 0, goal)
    return answer_file(folder, dict.fromkeys(NAMES, "right"))


def test_an_audit_with_the_same_seed_draws_other_images_than_the_sample(known: KnownTruth) -> None:
    """With the same random numbers, half of the images or more would be the same: those that chose the threshold."""
    sample = draw_sample(known.output, 100, 0)
    audit = draw_sample(known.output, 60, 0, Goal("audit"))
    rows, names = [6, 7], known.output.labels.label_names()
    for row in rows:
        asked = set(sample.position[(sample.label == row) & (sample.stratum == 2)].tolist())
        again = asked & set(audit.position[audit.label == row].tolist())
        expected = 60 * len(asked) / audit.population[names[row]][-1]
        assert len(again) < 2 * expected + 5


def test_after_a_calibration_the_same_seed_draws_other_images(known: KnownTruth) -> None:
    output, row = known.output, 7
    changed = replace(output, table=replace(output.table, labels=output.labels.model_copy(update={"threshold": 0.11})))
    one, other = (draw_sample(each, 60, 0, Goal("audit")).position for each in (output, changed))
    assert len(set(one[-60:].tolist()) & set(other[-60:].tolist())) < 20
    assert output.labels.names[row].threshold is None


def test_each_round_that_chose_a_threshold_is_recognized(known: KnownTruth) -> None:
    """The first round has a small part of all answers, and still is not independent."""
    output, random = known.output, np.random.default_rng(0)
    first = draw_sample(output, 30, 0)
    second = draw_sample(output, 300, 1, exclude=Exclusion(first.position, first.label))
    both = replace(known.answer(0, random, first, second), samples=(first.design.sample, second.design.sample))
    labels = make_label_set(output, calibrate(output, weigh_answers(output, both)))
    chosen = {row for row, label in enumerate(labels.names) if label.chosen_by}
    assert chosen
    alone = replace(known.answer(0, random, first), samples=(first.design.sample,))
    assert separate(labels, alone)[1] == chosen
    assert separate(labels, both)[1] == chosen
    files = replace(both, samples=())  # the same answers in files that name no sample
    labels = make_label_set(output, calibrate(output, weigh_answers(output, files)))
    assert separate(labels, replace(alone, samples=()))[1] == chosen


def test_unsure_answers_of_the_sample_that_chose_a_threshold_are_left_out_too(known: KnownTruth) -> None:
    output, random = known.output, np.random.default_rng(0)
    first = draw_sample(output, 100, 0)
    made = known.answer(0, random, first)
    truth = replace(made, samples=(first.design.sample,))
    labels = make_label_set(output, calibrate(output, weigh_answers(output, truth)))
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    output = replace(output, table=replace(output.table, labels=labels, head=head))
    second = draw_sample(output, 60, 0, Goal("audit"))
    both = known.answer(0, random, first, second)
    unsure = (both.label == 7) & (both.sources() == 1) & (np.arange(len(both.label)) % 3 == 0)
    both = replace(
        both,
        **{name: getattr(both, name)[~unsure] for name in ("image", "label", "right", "weight", "source")},
        unsure_image=both.image[unsure],
        unsure_label=both.label[unsure],
        unsure_source=both.sources()[unsure],
        samples=(first.design.sample, second.design.sample),
    )
    assert len(both.unsure_label)
    kept, dependent = separate(labels, both)
    assert 7 not in dependent
    assert not (kept.unsure_label == 7).any()
    name = labels.names[7].name
    assert [name in design.edges for design in kept.designs] == [False, True]
    [audit] = [one for one in audit_labels(output, both) if one.label == name]
    assert (audit.drawn, audit.unsure) == (60, 0)


def test_answers_that_trained_a_probe_do_not_calibrate_or_judge_it(known: KnownTruth) -> None:
    """A probe fits the answers that trained it better than other images: the thresholds would be too low."""
    output, random = known.output, np.random.default_rng(0)
    first, second = draw_sample(output, 100, 0), draw_sample(output, 100, 1)
    old = replace(known.answer(0, random, first), samples=(first.design.sample,))
    probe = Probe.of(np.eye(1, output.width, 7, np.float32)[0] * 100, -5, output.weights)
    trained = LabelProbe(output.labels.names[7].name, 100, 50, 0.5, 0.9, 0.01, probe, "", make_fingerprint(old, 7))
    labels = probe_labels(output.labels, [trained])
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    probed = replace(output, table=replace(output.table, labels=labels, head=head))
    found = calibrate(probed, weigh_answers(output, old))
    assert (found[7].trained, found[7].accept) == (True, None)
    assert not found[6].trained
    assert labels.names[7].name in plan_round(probed, weigh_answers(output, old), 0.9).unanswered
    assert separate(labels, old)[1] == {7}
    new = weigh_answers(output, replace(known.answer(0, random, second), samples=(second.design.sample,)))
    calibrated = make_label_set(probed, calibrate(probed, new))
    assert calibrated.names[7].accept is not None
    assert calibrated.names[7].trained_by == labels.names[7].trained_by
    mine = first.label == 7
    part = replace(first, position=first.position[mine], label=first.label[mine])
    only = replace(known.answer(0, random, part), samples=(first.design.sample,))
    assert all(one.accept is None for one in calibrate(probed, weigh_answers(output, only)))


def test_answers_about_other_images_with_the_same_ids_are_left_out(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other", seed=1)
    folder = sample_folder(one, tmp_path / "sample")
    assert not read_truth(folder, one).notices
    with pytest.raises(ConfigError, match="images are not those that the answers are about, by sha256"):
        read_truth(folder, other)


def test_a_sample_of_another_models_output_is_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other", weights="another", width=8)
    folder = sample_folder(one, tmp_path / "sample")
    with pytest.raises(ConfigError, match="drawn from an output of another model"):
        read_truth(folder, other)


def test_of_two_files_the_last_counts_whatever_its_rows_are(tmp_path: Path) -> None:
    output = write(tmp_path / "one")
    whole, answers = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    whole.write_text('{"key": "image 00000003", "labels": ["a"]}\n')
    answers.write_text('{"key": "image 00000003", "label": "a", "answer": "wrong"}\n')

    def right(truth: Truth) -> dict[int, bool]:
        return dict(zip(truth.label.tolist(), truth.right.tolist(), strict=True))

    assert right(read_truth([whole, answers], output)) == {0: False, 1: False}
    assert right(read_truth([answers, whole], output)) == {0: True, 1: False}


def test_an_error_without_answers_says_what_was_left_out(tmp_path: Path) -> None:
    folder = sample_folder(write(tmp_path / "one"), tmp_path / "sample")
    renamed = write(tmp_path / "other", names=["dog", "cat"])
    with pytest.raises(ConfigError, match=r"no answer says right or wrong \(.*2 labels are not in the output's label"):
        read_truth(folder, renamed)


def test_an_audit_tells_of_each_label_what_is_not_known(tmp_path: Path) -> None:
    output = write(tmp_path / "one")
    folder = sample_folder(output, tmp_path / "audit", audit=True)

    def audit(answers: dict[str, str]) -> list[str]:
        return [str(one) for one in audit_labels(output, read_truth(answer_file(folder, answers), output))]

    images = {one.label: one.images for one in audit_labels(output, read_truth(folder, output))}
    assert audit({"b": "right"})[0] == f"a: {images['a']} tagged, none looked at: not known"
    unsure = audit({"a": "unsure", "b": "right"})[0]
    assert unsure == f"a: {images['a']} tagged, 20 looked at, 20 unsure: not known"
    assert str(LabelAudit("a", "tagged", 9, 9, 1.0, 0.5, True, 3)) == "a: 9 tagged, all looked at, 3 unsure, 1.00 right"
    partly = LabelAudit("a", "accepted", 90, 20, float("nan"), 0.0)
    assert "not known, because a range of their scores was not asked about" in str(partly)


def test_calibrate_says_which_labels_keep_an_earlier_accept_score(tmp_path: Path) -> None:
    output = write(tmp_path / "one", names=[{"name": "a", "accept": 0.5}, "b"])
    folder = answer_file(sample_folder(output, tmp_path / "sample"), {"a": "wrong", "b": "unsure"})
    arguments = ["calibrate", output.uri, "--truth", str(folder), "--labels-out", str(tmp_path / "out.yaml")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "it keeps accept 0.5 of an earlier calibration" in done.stdout
    assert "1 labels without an answer right or wrong stay as they are: b" in done.stdout


def test_a_round_can_follow_answers_that_lie_outside_of_their_sample(tmp_path: Path) -> None:
    output = write(tmp_path / "one")
    folder = sample_folder(output, tmp_path / "sample")
    outside = tmp_path / "export.jsonl"
    (folder / "answers.jsonl").rename(outside)
    arguments = ["sample", output.uri, str(tmp_path / "more"), "--exclude", str(outside)]
    arguments += ["--sample", str(folder), "--more", "--wrong-answers", "0.1"]
    assert "no thumbnails" in CliRunner().invoke(app, arguments).stderr
    done = CliRunner().invoke(app, [*arguments, "--to", "label-studio"])
    assert "belong to the sample" not in done.stderr
