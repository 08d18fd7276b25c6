"""`sightline calibrate` and `evaluate`: use people's answers about an output's labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from siglip.labels import LabelSet
from storage.settings import ConfigError

if TYPE_CHECKING:
    from curation.quality.evaluation import Evaluation
    from curation.quality.truth import Truth
    from curation.tagged_output import TaggedOutput

SHOWN = 40
OUTPUT = typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.", show_default=False)
TRUTH = typer.Option(
    "--truth",
    metavar="FILE",
    help="Ground truth: .jsonl, .csv, .parquet, or a Label Studio export (.json).",
    show_default=False,
)


def calibrate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="File for the calibrated label set.")
    ] = Path("calibrated.yaml"),
    precision: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Target precision: share of the accepted images that are right.")
    ] = 0.9,
    best_f1: Annotated[
        bool, typer.Option("--best-f1", help="Accept from the score with the best F1, instead of a target precision.")
    ] = False,
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the right images that are accepted or left to review.")
    ] = 0.95,
) -> None:
    """Find each label's accept and review thresholds, and count the images that are left to review. Writes a label set.

    A precision counts as reached when the lower bound (Wilson, 95 %) of its estimate from held-out answers reaches it:
    52 accepted answers without an error show 95 %. Labels with too few answers leave all images to review. Apply the
    label set with `sightline retag`.
    """
    with open_truth(output, truth) as (source, answers):
        from curation.quality import calibration

        found = calibration.calibrate(source, answers, None if best_f1 else precision, recall)
        labels = calibration.make_label_set(source, found)
        workloads = calibration.count_workload(source, labels)
        write_labels(labels_out, labels)
        target = "best F1" if best_f1 else f">= {precision:.0%}"
        for one, workload in list(zip(found, workloads, strict=True))[:SHOWN]:
            if one.accept is not None:
                result = f"{workload.accepted:,} accepted at {target}"
            elif one.answers_needed is None:
                result = f"not calibrated: no threshold reaches the target with {one.answers} answers"
            else:
                result = f"not calibrated: about {one.answers_needed:,} more accepted answers needed"
            out.print(f"{escape(one.label)}: {result}, {workload.review:,} to review", highlight=False)
        print_omitted(len(found))
        reached = sum(one.accept is not None for one in found)
        out.print(f"{reached} of {len(found)} labels calibrated: {escape(str(labels_out))}", highlight=False)


def evaluate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all metrics as JSON, for `sightline report --evaluation`.")
    ] = False,
) -> None:
    """Evaluate an output's labels against ground truth: precision, recall, F1 and average precision, with intervals.

    Also top-1 and top-5 accuracy when each image has exactly one right label, and the answers that the model
    contradicts most: check these answers again.
    """
    with open_truth(output, truth) as (source, answers):
        from curation.quality import evaluation

        metrics = evaluation.evaluate(source, answers)
        if as_json:
            print(json.dumps(metrics.as_dict(), ensure_ascii=False))
        else:
            _print_evaluation(metrics)


def write_labels(path: Path, labels: LabelSet) -> None:
    """Write a label set as YAML. Raises `ConfigError`."""
    content = yaml.safe_dump(
        labels.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=120
    )
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def open_truth(output: str, truth: Path) -> Iterator[tuple[TaggedOutput, Truth]]:
    """Open the output and read the answers about it. Errors inside the block end the command with a message."""
    with report_errors():
        from curation.quality.truth import read_truth

        source = open_reported(output)
        answers = read_truth(truth, source)
        err.print(f"{len(answers.image):,} answers about {len(answers.positions):,} images", highlight=False)
        yield source, answers


def _print_evaluation(metrics: Evaluation) -> None:
    from curation.quality.evaluation import rank_labels

    totals = Table(show_header=False, box=None)
    for k, accuracy in metrics.top.items():
        totals.add_row(f"top-{k}", str(accuracy))
    for name in ("mean_average_precision", "mean_f1", "micro_precision", "micro_recall", "micro_f1"):
        totals.add_row(name.replace("_", " "), str(getattr(metrics, name)))
    out.print(totals, highlight=False)
    table = Table("label", "answers", "right", "precision", "recall", "F1", "average precision", box=None)
    for one in rank_labels(metrics.labels)[:SHOWN]:
        figures = (one.precision, one.recall, one.f1, one.average_precision)
        table.add_row(escape(one.label), f"{one.answers:,}", f"{one.right:,}", *map(str, figures))
    out.print(table, highlight=False)
    print_omitted(len(metrics.labels))
    for pair in metrics.confusions[:5]:
        line = (
            f"{pair.right} is confused with {pair.given}: {pair.images:,.0f} images (the cosine of the two labels is "
            f"{pair.cosine:.2f})"
        )
        out.print(escape(line), highlight=False)
    for suspect in metrics.suspects[:10]:
        answer = f"answer {suspect.answer}, score {suspect.score:.3f}"
        line = f"check again: {suspect.key} ({suspect.id}), {suspect.label}: {answer}"
        out.print(escape(line), highlight=False)


def print_omitted(count: int) -> None:
    """Print how many labels were left out of a list of `SHOWN`; nothing when none were."""
    if count > SHOWN:
        out.print(f"and {count - SHOWN} more labels")
