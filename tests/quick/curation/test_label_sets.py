"""Checks and diffs of label sets, and the commands `sightline labels check` and `diff`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from curation.label_sets import Finding, check_labels, diff_labels
from sightline.cli import app
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.families import FAMILIES
from siglip.labels import LabelSet

RULE = FAMILIES["siglip"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))


def check(encoder: Encoder, near: float, **labels: object) -> list[Finding]:
    return check_labels(LabelSet.model_validate(labels), RULE, encoder, near)


def test_a_good_label_set_has_no_findings(encoder: Encoder) -> None:
    assert check(encoder, 0.999, names=["red circle", "blue star"]) == []
    assert check(encoder, 0.999, names=["red circle"]) == []


def test_all_problems_are_found_at_once(encoder: Encoder) -> None:
    long = "a very long label of far more words than the text tower of the small checkpoint has places for them"
    names = ["C", "C++", "C#", "!!!", "???", long, "red circle", {"name": "round", "prompts": ["a red circle", "..."]}]
    findings = check(encoder, 1.1, names=names)
    assert [(finding.problem, finding.labels) for finding in findings] == [
        ("empty prompt", ("!!!",)),
        ("empty prompt", ("???",)),
        ("empty prompt", ("round",)),
        ("same prompts", ("C", "C++", "C#")),
        ("too long", (long,)),
    ]
    assert [finding.fatal for finding in findings] == [True] * 4 + [False]
    assert "the model reads 16" in findings[-1].detail


def test_tokens_are_counted_before_truncation(encoder: Encoder) -> None:
    assert encoder.count_tokens(["a", "a " * 200]).tolist()[1] > 100
    whole = encoder.count_tokens(["a red circle"])[0]
    assert (encoder.tokenize(["a red circle"])[0][whole - 1 :] == 1).all(), (
        "the end token is counted, the padding is not"
    )


def test_near_duplicates_are_sorted_and_leave_out_same_prompts(encoder: Encoder) -> None:
    findings = check(encoder, 0.3, names=["red circle", "red disc", "Red Circle!", "blue star"])
    near = [finding for finding in findings if finding.problem == "near duplicate"]
    assert findings[0].problem == "same prompts"
    assert ("red circle", "Red Circle!") not in [finding.labels for finding in near]
    cosines = [float(finding.detail.rpartition(" ")[2]) for finding in near]
    assert len(cosines) > 1
    assert cosines == sorted(cosines, reverse=True)


def test_diff_lists_every_label_that_changed() -> None:
    before = LabelSet.model_validate({"names": ["cat", "dog", "bird", "fish"], "threshold": 0.1})
    after = LabelSet.model_validate(
        {"names": ["dog", {"name": "bird", "prompts": ["a bird", "birds"]}, {"name": "fish", "threshold": 0.4}, "cow"],
         "threshold": 0.1}
    )  # fmt: skip
    changes = diff_labels(before, after)
    assert [(change.label, change.what, change.scores) for change in changes] == [
        ("cat", "removed", True),
        ("cow", "added", True),
        ("bird", "prompts: 'This is a photo of bird.' became 'a bird' and 1 more", True),
        ("fish", "threshold: 0.1 became 0.4", False),
    ]
    assert diff_labels(before, before) == []
    templates = LabelSet.model_validate({"names": ["cat"], "templates": ["{}", "a {}"]})
    assert len(diff_labels(LabelSet.model_validate(["cat"]), templates)) == 1


def test_commands_exit_with_1_for_fatal_findings_and_2_for_bad_input(tmp_path: Path) -> None:
    run = CliRunner().invoke
    bad, good = tmp_path / "bad.txt", tmp_path / "good.yaml"
    bad.write_text("C\nC++\n[red]cat\n")
    good.write_text("names: [C]\n")
    found = run(app, ["labels", "check", str(bad), "--near", "1"])
    assert found.exit_code == 1
    assert "same prompts: C, C++" in found.output
    assert "3 labels, 1 findings" in found.output
    assert run(app, ["labels", "check", str(good)]).exit_code == 0
    changed = run(app, ["labels", "diff", str(bad), str(good)])
    assert changed.exit_code == 0
    assert "[red]cat: removed" in changed.output
    assert "3 labels became 1; the scores of 2 change" in changed.output
    for wrong in (["check", str(tmp_path / "none.txt")], ["check", str(good), "--model", str(tmp_path / "none")]):
        refused = run(app, ["labels", *wrong])
        assert refused.exit_code == 2
        assert len(refused.output.strip().splitlines()) == 1


def test_labels_that_the_tokenizer_does_not_read_are_found(encoder: Encoder) -> None:
    long = "a label with far more words than the text tower of the small checkpoint reads"
    names = ["红", "C", "C#", "红 red", f"{long} one", f"{long} two", "red 红 circle"]
    findings = [finding for finding in check(encoder, 1.1, names=names) if finding.problem != "too long"]
    assert [(finding.problem, finding.labels, finding.fatal) for finding in findings] == [
        ("same prompts", ("C", "C#"), True),
        ("unreadable", ("红",), True),
        ("same tokens", (f"{long} one", f"{long} two"), True),
        ("unknown characters", ("红 red",), False),
        ("unknown characters", ("red 红 circle",), False),
    ]
