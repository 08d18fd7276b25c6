"""`sightline sample` and `audit`: choose the images that a person should check."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sightline.commands.curation.quality import SAMPLE, WRONG_ANSWERS, WRONG_SHARE, name_some, print_notices
from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from storage.settings import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from curation.sampling.sample import Exclusion, Goal, Sample
    from curation.tagged_output import TaggedOutput


class ReviewTool(StrEnum):
    """The tool that shows the sample to people."""

    review = "review"
    label_studio = "label-studio"


def sample(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the sample.")],
    per_label: Annotated[int, typer.Option(min=1, help="The number of questions about each label.")] = 100,
    for_: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="GOAL",
            help="What the answers are for: precision=0.9 asks mostly about images that reach the threshold, so that "
            "`calibrate` can show this precision; evaluation asks about the others too, so that recall can be known.",
        ),
    ] = "precision=0.9",
    label: Annotated[list[str] | None, typer.Option(help="Ask only about this label. Repeat for more.")] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Answers, or the folder of a sample: do not ask these questions again."),
    ] = None,
    more: Annotated[
        bool,
        typer.Option("--more", help="A further round: use the excluded answers to ask where they are not enough."),
    ] = False,
    to: Annotated[
        ReviewTool, typer.Option(help="The tool that shows the sample. label-studio also writes its tasks files.")
    ] = ReviewTool.review,
    sample: Annotated[list[Path] | None, SAMPLE] = None,
    wrong_answers: Annotated[float, WRONG_ANSWERS] = WRONG_SHARE,
    seed: Annotated[int, typer.Option(min=0, help="Random seed: the same seed draws the same sample.")] = 0,
) -> None:
    """Draw the images that a person should check, for each label from a few score ranges.

    A label's questions are in random order: whoever answers only the first of them has answered a sample. Reads the
    embeddings in one pass.
    """
    with report_errors():
        from curation.sampling.files import check_folder
        from curation.sampling.sample import Goal, draw_sample

        source = open_reported(output)
        goal = Goal.parse(for_)
        if more and not exclude:
            raise ConfigError("--more needs --exclude with the answers of the earlier rounds")
        if more and goal.purpose != "precision":
            raise ConfigError("--more places questions for a precision: write --for precision=0.9")
        check_folder(folder)
        _check_thumbnails(source, output, to)
        excluded, from_scores = _read_exclusion(
            source, exclude or [], sample or [], goal if more else None, wrong_answers
        )
        chosen = _find_labels(source, label)
        if from_scores is not None:
            from_scores = {row: score for row, score in from_scores.items() if chosen is None or row in chosen}
            if not from_scores:
                raise ConfigError("no label needs more answers")
        drawn = draw_sample(source, per_label, seed, goal, labels=chosen, from_scores=from_scores, exclude=excluded)
        _write(source, drawn, folder, seed, goal, to, exclude or [])


def audit(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag` or `retag`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the audit: new, or with its answers.")],
    label: Annotated[list[str] | None, typer.Option(help="Audit this label. Repeat for more.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Audit all labels.")] = False,
    per_label: Annotated[int, typer.Option(min=1, help="The number of questions about each label.")] = 60,
    wrong_answers: Annotated[float, WRONG_ANSWERS] = WRONG_SHARE,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of a new audit.")] = 0,
) -> None:
    """Check what was accepted: draw a fresh sample of it, and once it is answered say how much of it is right.

    Run it twice: with a new DIR it draws the questions for `sightline review DIR`, and afterwards it prints a sentence
    about each label. Labels without an `accept` threshold are judged by all images on which they are written.
    """
    with report_errors():
        from curation.sampling.files import check_folder
        from curation.sampling.sample import Goal, draw_sample

        source = open_reported(output)
        if (folder / "sample.parquet").exists():
            if label or all_:
                raise ConfigError(f"{folder} holds an audit: leave out --label and --all to see its result")
            _print_audit(source, folder, wrong_answers)
            return
        if not label and not all_:
            raise ConfigError("say what to audit: --label NAME, or --all")
        check_folder(folder)
        _check_thumbnails(source, output, ReviewTool.review)
        goal = Goal("audit")
        _write(
            source,
            draw_sample(source, per_label, seed, goal, labels=_find_labels(source, label)),
            folder,
            seed,
            goal,
            ReviewTool.review,
        )
        out.print(escape(f"Then: sightline audit {output} {folder}"), highlight=False)


def _print_audit(source: TaggedOutput, folder: Path, wrong_answers: float) -> None:
    from curation.quality.audit import audit_labels
    from curation.quality.truth import read_truth

    truth = read_truth(folder, source)
    print_notices(truth.notices)
    for one in audit_labels(source, truth, wrong_answers):
        out.print(escape(str(one)), highlight=False)


def _check_thumbnails(source: TaggedOutput, output: str, to: ReviewTool) -> None:
    if to is ReviewTool.review and "thumbnail" not in source.columns:
        raise ConfigError(f"{output} has no thumbnails to show: tag with `thumbnails: true`")


def _find_labels(source: TaggedOutput, names: list[str] | None) -> list[int] | None:
    known = {name: row for row, name in enumerate(source.labels.label_names())}
    if unknown := [name for name in names or [] if name not in known]:
        raise ConfigError(f"{source.uri} has no label {unknown[0]!r}")
    return sorted({known[name] for name in names}) if names else None


def _read_exclusion(
    source: TaggedOutput, paths: list[Path], samples: list[Path], goal: Goal | None, wrong_answers: float
) -> tuple[Exclusion, dict[int, float] | None]:
    """Read the questions that are answered, and with a goal the score from which each label needs answers."""
    import numpy as np

    from curation.quality.calibration import plan_round
    from curation.quality.truth import read_truth
    from curation.sampling.sample import NOTHING, Exclusion

    if not paths:
        return NOTHING, None
    truth = read_truth(paths, source, samples=samples)
    print_notices(truth.notices)
    images = np.concatenate([truth.image, truth.unsure_image])
    excluded = Exclusion(truth.positions[images], np.concatenate([truth.label, truth.unsure_label]))
    if goal is None:
        return excluded, None
    plan = plan_round(source, truth, goal.target, wrong_answers)
    for names, what in (
        (plan.reached, f"reach {goal.target:.0%} and are not asked about again"),
        (plan.hopeless, f"cannot reach {goal.target:.0%} with a threshold, and are not asked about again"),
        (plan.unanswered, "have no answers to plan by: sample them without --more"),
    ):
        if names:
            err.print(escape(f"{len(names):,} labels {what}: {name_some(names)}"), highlight=False)
    return excluded, plan.from_scores


def _write(
    source: TaggedOutput,
    drawn: Sample,
    folder: Path,
    seed: int,
    goal: Goal,
    to: ReviewTool,
    excluded: Sequence[Path] = (),
) -> None:
    from curation.review.labelstudio import write_tasks
    from curation.sampling.files import read_questions, read_sample, write_sample

    # Absolute, as the output is: the review page names them, and may be started in another folder.
    write_sample(source, drawn, folder, seed, goal, [str(path.resolve()) for path in excluded])
    table, _ = read_sample(folder)
    if to is ReviewTool.label_studio:
        files = write_tasks(read_questions(folder), source.labels, folder)
        names = f"{len(files)} files" if len(files) > 1 else files[0].name
        next_step = f"import {names} into a project with {folder / 'config.xml'}"
    else:
        next_step = f"sightline review {folder}"
    images = len(set(table["id"].to_pylist()))
    message = f"{table.num_rows:,} questions about {images:,} images of {source.rows:,}. Next: {next_step}"
    out.print(escape(message), highlight=False)
