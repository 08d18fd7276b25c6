"""The steps that a report tells of: what was done, how far it is, and the command for what was not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curation.report.steps import Step, describe_steps, read_audits, read_sample_state
from curation.tagged_output import TaggedOutput
from sightline.cli import app
from tests.support.outputs import make_output


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    return make_output(tmp_path_factory.mktemp("steps") / "made", 5)


@pytest.fixture
def sample(output: TaggedOutput, tmp_path: Path) -> Path:
    folder = tmp_path / "my sample"
    done = CliRunner().invoke(app, ["sample", output.uri, str(folder), "--per-label", "20"])
    assert done.exit_code == 0, done.output
    return folder


def answer(folder: Path, name: str, say: Callable[[int], str | None]) -> None:
    """Write a person's answers: what `say` returns for each question, None for no answer."""
    rows = pq.read_table(folder / "sample.parquet").drop_columns(["thumbnail"]).to_pylist()
    said = [{**row, "answer": say(number)} for number, row in enumerate(rows) if say(number)]
    (folder / f"answers{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))


def describe(output: TaggedOutput, *samples: Path, audits: tuple[Path, ...] = ()) -> dict[str, Step]:
    states, audited = ([read_sample_state(folder, output) for folder in some] for some in (samples, audits))
    return {step.name: step for step in describe_steps(output, states, audited, None)}


def test_a_step_that_was_not_done_or_is_not_known_names_its_command(output: TaggedOutput) -> None:
    steps = describe(output)
    assert [(step.name, step.state) for step in steps.values()] == [
        ("Tagged", "done"),
        ("Sampled", "unknown"),
        ("Reviewed", "unknown"),
        ("Calibrated", "open"),
        ("Retagged", "open"),
        ("Evaluated", "unknown"),
        ("Audited", "unknown"),
    ]
    for name, command in {
        "Sampled": f"sightline sample {output.uri} DIR",
        "Reviewed": "sightline review DIR",
        "Calibrated": f"sightline calibrate {output.uri} --truth DIR",
        "Retagged": f"sightline retag {output.uri} --labels calibrated.yaml --output NEW",
        "Evaluated": f"sightline evaluate {output.uri} --truth DIR --json > evaluation.json",
        "Audited": f"sightline audit {output.uri} DIR --all",
    }.items():
        assert steps[name].commands == [command]
    for name, option in (("Sampled", "--sample DIR"), ("Reviewed", "--sample DIR"), ("Audited", "--audit DIR")):
        assert steps[name].lines[0].startswith(f"Not known: give {option} to the report")
    assert "600 images have their labels" in steps["Tagged"].lines[0]


def test_the_commands_that_the_page_names_exist(output: TaggedOutput) -> None:
    for step in describe(output).values():
        for command in step.commands:
            _, name, *arguments = command.partition(" >")[0].split()
            shown = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, [name, "--help"]).output)
            assert all(one in shown for one in arguments if one.startswith("--")), command


def test_a_review_is_counted_to_its_end(output: TaggedOutput, sample: Path) -> None:
    questions = pq.read_metadata(sample / "sample.parquet").num_rows
    quoted = f"'{sample}'"
    steps = describe(output, sample)
    assert f"{questions} questions about" in steps["Sampled"].lines[0]
    assert (steps["Reviewed"].state, steps["Reviewed"].commands) == ("open", [f"sightline review {quoted}"])
    assert steps["Calibrated"].commands == [f"sightline calibrate {output.uri} --truth {quoted}"]

    answer(sample, "", lambda row: ("unsure" if row == 3 else "right") if row < 10 else None)
    step = describe(output, sample)["Reviewed"]
    assert step.state == "partly"
    assert step.lines == [f"{sample}: 10 of {questions} questions answered, 1 of them unsure"]

    # Another person answers all questions, three of them otherwise; one of these was answered with unsure before.
    answer(sample, "-ben", lambda row: "wrong" if row in (2, 3, 4) else "right")
    step = describe(output, sample)["Reviewed"]
    assert step.state == "partly"
    assert f"{questions} of {questions} questions answered, 2 of them unsure, 2 disagreements" in step.lines[0]
    assert "the person without a name and ben: 7 of 9 answers are equal" in step.lines[1]
    assert step.commands == [f"sightline review {quoted} --settle"]

    answer(sample, "-settled", lambda row: "right" if row in (2, 4) else None)
    step = describe(output, sample)["Reviewed"]
    assert (step.state, step.commands) == ("done", [])


def test_calibration_and_retagging_are_read_from_the_output(output: TaggedOutput) -> None:
    first, second, *others = output.labels.names
    changed = [
        first.model_copy(update={"accept": 0.5, "chosen_by": "00000000"}),
        second.model_copy(update={"accept": 0.5}),
    ]
    labels = output.labels.model_copy(update={"names": (*changed, *others)})
    calibrated = replace(output, table=replace(output.table, labels=labels))
    steps = describe(calibrated)
    assert steps["Calibrated"].lines == ["2 of 5 labels have an accept score: 1 chosen by answers, 1 set by hand"]
    assert "tagged with these accept scores" in steps["Retagged"].lines[0]
    run = {"retagged_from": "/elsewhere", "rows": 600, "changed": 7}
    steps = describe(replace(calibrated, manifest={**output.manifest, "run": run}))
    assert steps["Retagged"].lines == ["from /elsewhere: 7 of 600 images have other labels than before"]


def test_the_result_of_an_audit_is_told_once_it_is_answered(output: TaggedOutput, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    assert CliRunner().invoke(app, ["audit", output.uri, str(folder), "--all", "--per-label", "10"]).exit_code == 0
    step = describe(output, audits=(folder,))["Audited"]
    assert (step.state, step.commands) == ("open", [f"sightline review {folder}"])
    assert read_audits(output, [read_sample_state(folder, output)]) == ({}, [])
    answer(folder, "", lambda row: "right")
    assert describe(output, audits=(folder,))["Audited"].state == "done"
    results, notices = read_audits(output, [read_sample_state(folder, output)])
    assert set(results) == set(output.labels.label_names())
    assert re.fullmatch(
        r"label 0: \d+ tagged, 1.00 right, at least 0.\d+ \(95 %\), from 10 answers", results["label 0"]
    )
    assert notices == []
    # The command writes the same.
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", output.uri, "--to", str(page), "--audit", str(folder)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert results["label 0"] in text
    assert f"Audit: {results['label 0'].removeprefix('label 0: ')}" in text
    assert "sightline sample" in text


def test_a_sample_of_other_images_is_refused_and_missing_images_are_counted(
    output: TaggedOutput, sample: Path, tmp_path: Path
) -> None:
    other = make_output(tmp_path / "other", 3)
    table = pq.read_table(sample / "sample.parquet")

    def change(count: int) -> None:
        digests: list[Any] = [f"{row:064x}" for row in range(count)] + table["sha256"].to_pylist()[count:]
        column = table.schema.get_field_index("sha256")
        pq.write_table(table.set_column(column, "sha256", [digests]), sample / "sample.parquet")

    change(2)
    assert "2 of the images are not in this output" in describe(output, sample)["Sampled"].lines[0]
    assert f"drawn from {output.uri}" in describe(other, sample)["Sampled"].lines[0]
    change(table.num_rows)
    refused = CliRunner().invoke(app, ["report", other.uri, "--sample", str(sample)])
    assert refused.exit_code == 2
    assert f"is a sample of {output.uri}: none of its images is in {other.uri}" in " ".join(refused.stderr.split())
    nothing = CliRunner().invoke(app, ["report", other.uri, "--sample", str(tmp_path)])
    assert nothing.exit_code == 2
