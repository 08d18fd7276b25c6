"""The steps of a labelling project: what was done for an output, and the commands for what was not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.quality.audit import audit_labels
from curation.quality.truth import read_truth
from curation.quality.truth_files import find_exports, read_truth_folder
from curation.review.agreement import Reviews, read_reviews
from curation.review.answers import RIGHT, UNSURE, WRONG
from curation.sampling.files import read_sample
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError


@dataclass(frozen=True)
class Step:
    """A step. `lines` say what is known, and `commands` what to run next.

    `state` is done, partly, open, or unknown where only an option of the report would tell.
    """

    name: str
    state: str
    lines: list[str]
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SampleState:
    """What the folder of a sample tells: how many of its `questions` are `answered`, and how many of these `unsure`.

    `disputed` disagreements of several people are not settled.
    """

    folder: Path
    text: str
    questions: int
    answered: int
    unsure: int
    disputed: int
    agreements: list[str]

    @property
    def finished(self) -> bool:
        """Whether all questions are answered, and all disagreements settled."""
        return self.answered == self.questions and not self.disputed

    def describe_answers(self) -> str:
        """One line about the answers."""
        told = (
            f"{self.folder}: {self.answered:,} of {self.questions:,} questions answered, {self.unsure:,} of them unsure"
        )
        return f"{told}, {self.disputed:,} disagreements not settled" if self.disputed else told

    def list_commands(self) -> list[str]:
        """The commands that finish the review."""
        folder = shlex.quote(str(self.folder))
        commands = [f"sightline review {folder}"] if self.answered < self.questions else []
        return [*commands, f"sightline review {folder} --settle"] if self.disputed else commands


def read_sample_state(folder: Path, output: TaggedOutput) -> SampleState:
    """Read the state of a sample in one pass over the output's digests of images.

    Raises `ConfigError` if the folder holds no sample, or one of which no image is in the output.
    """
    questions, about = read_sample(folder)
    asked = {*zip(questions[ID].to_pylist(), questions["label"].to_pylist(), strict=True)}
    digests = pc.unique(questions["sha256"].combine_chunks())
    missing = len(digests) - _count_found(output, digests)
    drawn_from = about.get("output", "an output that it does not name")
    if missing and missing == len(digests):
        raise ConfigError(f"{folder} is a sample of {drawn_from}: none of its images is in {output.uri}")
    text = f"{folder}: {len(asked):,} questions about {len(digests):,} images"
    text += f", for {about['for']}" if "for" in about else ""
    if drawn_from != output.uri:
        text += f", drawn from {drawn_from}"
    if missing:
        text += f"; {missing:,} of the images are not in this output"
    reviews = read_reviews(folder)
    answers = _read_answers(folder, reviews)
    said = [answers[pair] for pair in asked & answers.keys()]
    disputed = len(reviews.disagreements().keys() - reviews.settled.keys())
    agreements = [str(one) for one in reviews.agreements()]
    return SampleState(folder, text, len(asked), len(said), said.count(UNSURE), disputed, agreements)


def describe_steps(
    output: TaggedOutput,
    samples: Sequence[SampleState],
    audits: Sequence[SampleState],
    evaluation: dict[str, Any] | None,
) -> list[Step]:
    """Describe the steps from tagging to the audit, in their order."""
    return [
        _describe_tagging(output),
        *_describe_samples(output, samples),
        *_describe_thresholds(output, samples),
        _describe_evaluation(output, samples, audits, evaluation),
        _describe_audits(output, audits),
    ]


def read_audits(output: TaggedOutput, audits: Sequence[SampleState]) -> tuple[dict[str, str], list[str]]:
    """Read the results of audits: a sentence for each audited label, by its name, and notices about the answers."""
    answered = [audit.folder for audit in audits if audit.answered > audit.unsure]
    if not answered:
        return {}, []
    truth = read_truth(answered, output)
    return {one.label: str(one) for one in audit_labels(output, truth)}, list(truth.notices)


def _count_found(output: TaggedOutput, digests: pa.Array) -> int:
    """How many of some distinct digests of images are in the output. One pass over its digests."""
    found = pa.array([], pa.string())
    for batch in output.batches(["sha256"], rows=65_536):
        mine = batch["sha256"].cast(pa.string())
        found = pc.unique(pa.concat_arrays([found, mine.filter(pc.is_in(mine, value_set=digests))]))
    return len(found)


def _read_answers(folder: Path, reviews: Reviews) -> dict[tuple[str, str], str]:
    """The answers that are in the folder, by image and label: those of the page, and exports of Label Studio."""
    if not (reviews.people or reviews.settled or find_exports(folder)):
        return {}
    rows = (row for file in read_truth_folder(folder) for row in file.rows if row.label is not None)
    return {(row.image, row.label or ""): row.answer for row in rows if row.answer in (RIGHT, WRONG, UNSURE)}


def _describe_tagging(output: TaggedOutput) -> Step:
    line = f"{output.rows:,} images have their labels, {output.rejected:,} could not be read or were refused"
    waiting = output.describe_waiting()
    return Step("Tagged", "partly" if waiting else "done", [line, *([waiting] if waiting else [])])


def _describe_samples(output: TaggedOutput, samples: Sequence[SampleState]) -> list[Step]:
    if not samples:
        uri = shlex.quote(output.uri)
        told = "Not known: give --sample DIR to the report."
        return [
            Step("Sampled", "unknown", [f"{told} If there is no sample yet:"], [f"sightline sample {uri} DIR"]),
            Step("Reviewed", "unknown", [f"{told} If it is not answered yet:"], ["sightline review DIR"]),
        ]
    answers = [line for one in samples for line in (one.describe_answers(), *one.agreements)]
    commands = [command for one in samples for command in one.list_commands()]
    begun = any(one.answered for one in samples)
    state = "done" if all(one.finished for one in samples) else "partly" if begun else "open"
    return [Step("Sampled", "done", [one.text for one in samples]), Step("Reviewed", state, answers, commands)]


def _describe_thresholds(output: TaggedOutput, samples: Sequence[SampleState]) -> list[Step]:
    """The steps calibrate and retag. An output does not tell of a calibration that was not applied to it."""
    uri, names = shlex.quote(output.uri), output.labels.names
    accepts = [label for label in names if label.accept is not None]
    chosen = sum(label.chosen_by is not None for label in accepts)
    retagged = output.manifest.get("run", {}).get("retagged_from")
    truth = "".join(f" --truth {shlex.quote(str(one.folder))}" for one in samples) or " --truth DIR"
    apply = f"sightline retag {uri} --labels calibrated.yaml --output NEW"
    if accepts:
        line = f"{len(accepts):,} of {len(names):,} labels have an accept score: {chosen:,} chosen by answers"
        by_hand = len(accepts) - chosen
        calibrated = Step("Calibrated", "done", [line + (f", {by_hand:,} set by hand" if by_hand else "")])
    else:
        told = f"None of the {len(names):,} labels has an accept score, so that nothing is accepted."
        calibrated = Step("Calibrated", "open", [told], [f"sightline calibrate {uri}{truth}"])
    if retagged:
        run = output.manifest["run"]
        line = f"from {retagged}: {run['changed']:,} of {run['rows']:,} images have other labels than before"
        return [calibrated, Step("Retagged", "done", [line])]
    if accepts:
        return [calibrated, Step("Retagged", "done", ["Not needed: the images were tagged with these accept scores."])]
    return [calibrated, Step("Retagged", "open", ["The calibrated label set is not applied."], [apply])]


def _describe_evaluation(
    output: TaggedOutput,
    samples: Sequence[SampleState],
    audits: Sequence[SampleState],
    evaluation: dict[str, Any] | None,
) -> Step:
    if evaluation:
        answered, names = len(evaluation["labels"]), len(output.labels.names)
        images = f"{evaluation['images']:,} images and {answered:,} of {names:,} labels"
        line = f"{evaluation['answers']:,} answers about {images}"
        return Step("Evaluated", "done", [line])
    folders = audits or samples
    truth = "".join(f" --truth {shlex.quote(str(one.folder))}" for one in folders) or " --truth DIR"
    command = f"sightline evaluate {shlex.quote(output.uri)}{truth} --json > evaluation.json"
    told = "Not known: give --evaluation FILE to the report. If there is no evaluation yet:"
    return Step("Evaluated", "unknown", [told], [command])


def _describe_audits(output: TaggedOutput, audits: Sequence[SampleState]) -> Step:
    uri = shlex.quote(output.uri)
    if not audits:
        told = "Not known: give --audit DIR to the report. If there is no fresh sample of what was accepted yet:"
        return Step("Audited", "unknown", [told], [f"sightline audit {uri} DIR --all"])
    lines = [line for one in audits for line in (one.describe_answers(), *one.agreements)]
    commands = [command for one in audits for command in one.list_commands()]
    begun = any(one.answered for one in audits)
    state = "done" if all(one.finished for one in audits) else "partly" if begun else "open"
    return Step("Audited", state, lines, commands)
