"""`sightline calibrate`, `probe` and `evaluate`: what answers say of an output's labels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from sightline.exits import err, out, report_errors
from siglip.labels import LabelSet
from storage.settings import ConfigError

if TYPE_CHECKING:
    from curation.evaluation import Evaluation
    from curation.tagged_output import TaggedOutput
    from curation.truth import Truth

SHOWN = 40
OUTPUT = typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.", show_default=False)
TRUTH = typer.Option(
    "--truth", metavar="FILE", help="Answers: .jsonl, .csv, .parquet, or Label Studio's .json.", show_default=False
)


def calibrate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="Where the calibrated label set goes.")
    ] = Path("calibrated.yaml"),
    precision: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Of what is accepted, this share is right.")
    ] = 0.9,
    best_f1: Annotated[bool, typer.Option("--best-f1", help="Accept from the score with the best F1 instead.")] = False,
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Of what is right, this share is accepted or left to review.")
    ] = 0.95,
) -> None:
    """Find the score from which each label can be trusted, and how much that leaves to people. Writes a label set.

    A precision counts as reached only if the lower bound (Wilson, 95 %) of held-out answers says so: 52 accepted ones
    without an error show 95 %. Labels with too few answers keep all for review. `sightline retag` applies the set.
    """
    with _work(output, truth) as (source, answers):
        from curation.calibration import calibrate as find
        from curation.calibration import count_workload, make_label_set

        found = find(source, answers, None if best_f1 else precision, recall)
        labels = make_label_set(source, found)
        work = count_workload(source, labels)
        write_labels(labels_out, labels)
        promise = "best F1" if best_f1 else f">= {precision:.0%}"
        for one, share in list(zip(found, work, strict=True))[:SHOWN]:
            if one.accept is not None:
                said = f"{share.accepted:,} accepted at {promise}, {share.review:,} to review"
            elif one.missing is None:
                said = f"not calibrated: no threshold reaches it with {one.answers} answers; {share.review:,} to review"
            else:
                said = f"not calibrated: about {one.missing:,} more accepted answers needed; {share.review:,} to review"
            out.print(f"{escape(one.label)}: {said}", highlight=False)
        _say_more(len(found))
        reached = sum(one.accept is not None for one in found)
        out.print(f"{reached} of {len(found)} labels calibrated: {escape(str(labels_out))}", highlight=False)


def probe(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="Where the label set with probes goes.")
    ] = Path("probed.yaml"),
    gain: Annotated[float, typer.Option(min=0, max=1, help="Average precision that a probe must gain.")] = 0.01,
) -> None:
    """Train labels from answers: a regression on embeddings wherever it beats the label's prompts. Writes a label set.

    Compared on held-out answers. A probe's scores are of its own: calibrate again after `sightline retag`.
    """
    with _work(output, truth) as (source, answers):
        from curation.probe import make_label_set, train_probes

        found = train_probes(source, answers, gain)
        write_labels(labels_out, make_label_set(source.labels, found))
        for one in found[:SHOWN]:
            compared = (
                "" if math.isnan(one.after) else f"average precision {one.before:.3f}, with a probe {one.after:.3f}"
            )
            said = compared if one.probe else ", ".join(filter(None, (compared, one.reason)))
            out.print(f"{escape(one.label)}: {said}", highlight=False)
        _say_more(len(found))
        kept = sum(one.probe is not None for one in found)
        out.print(
            f"{kept} of {len(source.labels.names)} labels have a probe: {escape(str(labels_out))}", highlight=False
        )


def evaluate(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, as `sightline report` reads it.")
    ] = False,
) -> None:
    """How right an output's labels are: precision, recall, F1 and average precision, with intervals.

    With one label an image also top-1 and top-5. Last, the answers that the model contradicts most: look at them again.
    """
    with _work(output, truth) as (source, answers):
        from curation.evaluation import evaluate as compare

        found = compare(source, answers)
        if as_json:
            print(json.dumps(found.as_dict(), ensure_ascii=False))
        else:
            _print_evaluation(found)


def write_labels(path: Path, labels: LabelSet) -> None:
    """A label set as YAML. Raises `ConfigError`."""
    content = yaml.safe_dump(
        labels.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=120
    )
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def _work(output: str, truth: Path) -> Iterator[tuple[TaggedOutput, Truth]]:
    """The output and the answers about it."""
    with report_errors():
        from curation.tagged_output import open_output
        from curation.truth import read_truth

        source = open_output(output)
        answers = read_truth(truth, source)
        err.print(f"{len(answers.image):,} answers about {len(answers.positions):,} images", highlight=False)
        yield source, answers


def _print_evaluation(found: Evaluation) -> None:
    from curation.evaluation import rank_labels

    totals = Table(show_header=False, box=None)
    for k, share in found.top.items():
        totals.add_row(f"top-{k}", str(share))
    for name in ("mean_average_precision", "mean_f1", "micro_precision", "micro_recall", "micro_f1"):
        totals.add_row(name.replace("_", " "), str(getattr(found, name)))
    out.print(totals, highlight=False)
    table = Table("label", "answers", "right", "precision", "recall", "F1", "average precision", box=None)
    for one in rank_labels(found.labels)[:SHOWN]:
        figures = (one.precision, one.recall, one.f1, one.average_precision)
        table.add_row(escape(one.label), f"{one.answers:,}", f"{one.right:,}", *map(str, figures))
    out.print(table, highlight=False)
    _say_more(len(found.labels))
    for pair in found.confusions[:5]:
        what = (
            f"{pair.right} taken for {pair.given}: {pair.images:,.0f} images (their texts' cosine is {pair.cosine:.2f})"
        )
        out.print(escape(what), highlight=False)
    for answer in found.suspects[:10]:
        what = (
            f"look again: {answer.key} ({answer.id}), {answer.label} is {answer.answer} and scores {answer.score:.3f}"
        )
        out.print(escape(what), highlight=False)


def _say_more(count: int) -> None:
    if count > SHOWN:
        out.print(f"and {count - SHOWN} more labels")
