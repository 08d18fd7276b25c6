"""`sightline calibrate` and `evaluate`: use people's answers about an output's labels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from siglip.labels import LabelSet
from storage.settings import ConfigError

if TYPE_CHECKING:
    from curation.quality.calibration import LabelCalibration, Workload
    from curation.quality.evaluation import Evaluation
    from curation.quality.truth import Truth
    from curation.tagged_output import TaggedOutput

SHOWN = 40
_SHOWN_SUSPECTS = {"model": 10, "near-identical": 5, "outlier": 5}
"""How many suspect answers of each kind are printed. `--json` has up to a hundred of each."""
_MAX_NAMES = 5
_TABLE_WIDTH = 130
"""Columns of a terminal that the table of an evaluation takes at least: its intervals are hard to read when broken."""
OUTPUT = typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.", show_default=False)
TRUTH = typer.Option(
    "--truth",
    metavar="FILE",
    help="Answers: the folder of a sample, .jsonl, .csv, .parquet, or a Label Studio export (.json). Repeat for more.",
    show_default=False,
)
SAMPLE = typer.Option(
    "--sample", metavar="DIR", help="The folder of the sample that was answered, if the answers lie elsewhere."
)
STRICT = typer.Option("--strict", help="Refuse answers about unknown images and labels, instead of leaving them out.")
WRONG_SHARE = 0.02
"""The default of `--wrong-answers`: `curation.estimates.confidence.WRONG_ANSWERS`, which is slow to import."""
WRONG_ANSWERS = typer.Option(
    "--wrong-answers", min=0, max=0.2, help="The share of wrong answers that the intervals allow for."
)


def calibrate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[list[Path], TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="File for the calibrated label set.")
    ] = Path("calibrated.yaml"),
    precision: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Target precision: share of the accepted images that are right.")
    ] = 0.9,
    best_f1: Annotated[
        bool,
        typer.Option("--best-f1", help="Accept from the score with the best estimated F1, and promise no precision."),
    ] = False,
    sample: Annotated[list[Path] | None, SAMPLE] = None,
    wrong_answers: Annotated[float, WRONG_ANSWERS] = WRONG_SHARE,
    strict: Annotated[bool, STRICT] = False,
) -> None:
    """Find for each label the lowest score from which the target precision is shown. Writes a label set.

    A precision is shown when its one-sided 95 % lower bound reaches the target: 30 answers without an error show 90 %.
    Labels that do not reach it, and labels without answers, stay as they are. Apply the label set with `sightline
    retag`, and check the result with `sightline audit`: the answers that chose a threshold cannot judge it.
    """
    with open_truth(output, truth, strict=strict, samples=sample or ()) as (source, answers):
        from curation.quality import calibration

        target = None if best_f1 else precision
        found = calibration.calibrate(source, answers, target, wrong_answers)
        labels = calibration.make_label_set(source, found)
        workloads = calibration.count_workload(source, labels)
        write_labels(labels_out, labels)
        shown = [pair for pair in zip(found, workloads, strict=True) if pair[0].answers]
        accepts = dict(zip(source.labels.label_names(), source.labels.accepts(), strict=True))
        for one, workload in shown[:SHOWN]:
            if one.accept is not None:
                reached = "best F1" if best_f1 else f">= {precision:.0%}"
                result = f"{workload.accepted:,} accepted at {reached}, {workload.review:,} to review"
            elif one.trained:
                result = "not calibrated: these answers trained its probe, and fit it too well: draw another sample"
            elif best_f1:
                result = "not calibrated: no answer is right"
            elif one.crowded_out:
                result = "not calibrated: the target is not shown for the images on which top_k leaves the label"
            elif one.forecast is None:
                result = f"not calibrated: no threshold can be shown to reach the target, {one.answers:,} answers"
            else:
                result = f"not calibrated: about {one.forecast.more:,} more answers needed"
            before = accepts[one.label]
            if one.accept is None and before is not None:
                result += f"; it keeps accept {before:g} of an earlier calibration"
            out.print(f"{escape(one.label)}: {result}", highlight=False)
        print_omitted(len(shown))
        without = [one.label for one in found if not one.answers]
        if without:
            text = f"{len(without):,} labels without an answer right or wrong stay as they are: {name_some(without)}"
            out.print(escape(text), highlight=False)
        if not best_f1 and any(one.forecast for one in found):
            given = [*(f"--exclude {quote(str(path))}" for path in truth)]
            given += [f"--sample {quote(str(path))}" for path in sample or ()]
            given += [f"--wrong-answers {wrong_answers:g}"] if wrong_answers != WRONG_SHARE else []
            again = f"sightline sample {quote(output)} DIR --more {' '.join(given)} --for precision={precision:g}"
            out.print(escape(f"To ask where answers are missing: {again}"), highlight=False)
        _warn_of_top_k(source, found, workloads)
        count = sum(one.accept is not None for one in found)
        out.print(f"{count} of {len(found)} labels calibrated: {escape(str(labels_out))}", highlight=False)


def evaluate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[list[Path], TRUTH],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all metrics as JSON, for `sightline report --evaluation`.")
    ] = False,
    sample: Annotated[list[Path] | None, SAMPLE] = None,
    wrong_answers: Annotated[float, WRONG_ANSWERS] = WRONG_SHARE,
    strict: Annotated[bool, STRICT] = False,
) -> None:
    """Evaluate the labels that an output has: how much of each band is right, and how much was missed.

    Answers to a sample give estimates of the whole output with 95 % intervals. A figure that the sample cannot tell is
    shown as "-": answer more questions, or draw a sample with `--for evaluation`. Also lists answers that the model
    contradicts most: check these again.
    """
    with open_truth(output, truth, strict=strict, samples=sample or ()) as (source, answers):
        from curation.quality import evaluation

        metrics = evaluation.evaluate(source, answers, wrong_answers, curves=as_json)
        print_notices(metrics.notices[len(answers.notices) :])
        if as_json:
            print(json.dumps(metrics.as_dict(), ensure_ascii=False))
        else:
            _print_evaluation(metrics)


def _warn_of_top_k(source: TaggedOutput, found: list[LabelCalibration], after: list[Workload]) -> None:
    """Say if `top_k` would drop labels that are not calibrated: calibrated scores are higher than theirs."""
    from curation.quality.calibration import count_workload

    top_k = source.labels.top_k
    if top_k is None or top_k >= len(found) or all(one.accept is not None for one in found):
        return
    before = count_workload(source, source.labels)
    lost = sum(
        max(0, old.accepted + old.review - new.accepted - new.review)
        for one, old, new in zip(found, before, after, strict=True)
        if one.accept is None
    )
    if lost:
        message = (
            f"top_k {top_k}: labels that are not calibrated would be written {lost:,} times less, because calibrated "
            "scores are higher than theirs: raise top_k in the label set, or calibrate the others too"
        )
        err.print(message, highlight=False)


def write_labels(path: Path, labels: LabelSet) -> None:
    """Write a label set as YAML. A file of other content that is there is kept beside it. Raises `ConfigError`."""
    content = yaml.safe_dump(
        labels.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=120
    )
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != content:
            kept = path.with_name(f"{path.name}.before")
            path.replace(kept)
            err.print(escape(f"{path} was there: it is {kept} now"), highlight=False)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def open_truth(
    output: str, truth: Path | list[Path], *, strict: bool = False, samples: Sequence[Path] = ()
) -> Iterator[tuple[TaggedOutput, Truth]]:
    """Open the output and read the answers about it. Errors inside the block end the command with a message."""
    with report_errors():
        from curation.quality.truth import read_truth

        source = open_reported(output)
        answers = read_truth(truth, source, strict=strict, samples=samples)
        counted = f"{len(answers.image):,} answers about {len(answers.positions):,} images"
        if len(answers.unsure_image):
            counted += f", and {len(answers.unsure_image):,} unsure"
        err.print(counted, highlight=False)
        print_notices(answers.notices)
        yield source, answers


def print_notices(notices: Sequence[str]) -> None:
    """Print warnings about answers, a line each."""
    for notice in notices:
        err.print(escape(notice), highlight=False)


def name_some(names: Sequence[str]) -> str:
    """The first few names, and ", ..." if there are more."""
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


def print_omitted(count: int) -> None:
    """Say how many of `count` labels were not printed."""
    if count > SHOWN:
        out.print(f"and {count - SHOWN} more labels")


def _print_evaluation(metrics: Evaluation) -> None:
    from curation.quality.evaluation import rank_labels

    totals = Table(show_header=False, box=None)
    for name, band in (("accepted", metrics.accepted), ("to review", metrics.review)):
        if band.answers:
            count = f"{band.images:,} labels, " if band.images else ""
            totals.add_row(name, f"{count}{band.precision} right, from {band.answers:,} answers")
    for k, accuracy in metrics.top.items():
        totals.add_row(f"top-{k}", str(accuracy))
    for name in ("micro_precision", "micro_recall", "micro_f1", "mean_f1", "mean_average_precision"):
        if getattr(metrics, name).known:
            totals.add_row(name.replace("_", " "), str(getattr(metrics, name)))
    out.print(totals, highlight=False)
    table = Table("label", "accepted", "right", "to review", "right", "recall", "F1", "answers", box=None)
    for one in rank_labels(metrics.labels)[:SHOWN]:
        bands = [
            text
            for band in (one.accepted, one.review)
            for text in (f"{band.images:,}" if band.images or metrics.accepted.images else "-", str(band.precision))
        ]
        mark = "" if one.independent else " *"
        table.add_row(escape(one.label) + mark, *bands, str(one.recall), str(one.f1), f"{one.answers:,}")
    Console(file=out.file, width=max(out.width, _TABLE_WIDTH), emoji=False).print(table, highlight=False)
    print_omitted(len(metrics.labels))
    if any(not one.independent for one in metrics.labels):
        text = "* these answers chose the threshold or trained the probe: too good. Draw others, `sightline audit`"
        out.print(text, highlight=False)
    shares = [metrics.accepted.precision, metrics.review.precision, *(one.precision for one in metrics.labels)]
    if any(math.isfinite(share.low) for share in shares):
        out.print(
            f"Intervals: 95 %, for this output, if at most {metrics.wrong_answers:.0%} of the answers are wrong. "
            "-: not known from these answers.",
            highlight=False,
        )
    for pair in metrics.confusions[:5]:
        what = ("" if metrics.complete else "answered ") + ("image" if pair.images == 1 else "images")
        line = (
            f"{pair.right} is confused with {pair.given}: {pair.images:,.0f} {what} (the cosine of the two labels is "
            f"{pair.cosine:.2f})"
        )
        out.print(escape(line), highlight=False)
    for kind, shown in _SHOWN_SUSPECTS.items():
        for suspect in [one for one in metrics.suspects if one.kind == kind][:shown]:
            answer = f"answer {suspect.answer}, score {suspect.score:.3f}"
            line = f"check again: {suspect.key} ({suspect.id}), {suspect.label}: {answer}: {suspect.reason}"
            out.print(escape(line), highlight=False)
