"""`sightline labels ...`: label sets checked and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.markup import escape

from sightline.exits import FAILED, out, report_errors
from siglip.checkpoint import CheckpointError, pin_model
from siglip.config import ModelConfig
from siglip.labels import LabelSet
from storage.settings import ConfigError

SHOWN = 40
app = typer.Typer(no_args_is_help=True, help="Check and compare label sets.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A label set: YAML, or a text file with a label a line.")],
    model: Annotated[str, typer.Option(help="The checkpoint that is to be asked: as model.source of a job.")] = "tiny",
    near: Annotated[float, typer.Option(min=0, max=1, help="The cosine from which two labels are nearly one.")] = 0.98,
) -> None:
    """What a model cannot tell apart, or never sees. Exit code 1 if a job with these labels would be refused."""
    with report_errors():
        from curation.label_sets import check_labels
        from siglip.encoder import Encoder

        labels = read_labels(file)
        try:
            pinned = pin_model(ModelConfig(source=model, compile=False))
            findings = check_labels(labels, pinned.rule, Encoder(pinned), near)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        for finding in findings[:SHOWN]:
            what = f"[red]{finding.problem}[/red]" if finding.fatal else finding.problem
            out.print(f"{what}: {escape(', '.join(finding.labels))}: {escape(finding.detail)}", highlight=False)
        if len(findings) > SHOWN:
            out.print(f"and {len(findings) - SHOWN} more")
        out.print(f"{len(labels.names)} labels, {len(findings)} findings")
        if any(finding.fatal for finding in findings):
            raise typer.Exit(FAILED)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A label set.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """What changed between two label sets, label by label."""
    with report_errors():
        from curation.label_sets import diff_labels

        first, second = read_labels(before), read_labels(after)
        changes = diff_labels(first, second)
        for change in changes:
            out.print(f"{escape(change.label)}: {escape(change.what)}", highlight=False)
        scored = len({change.label for change in changes if change.scores})
        out.print(f"{len(first.names)} labels became {len(second.names)}; the scores of {scored} change")


def read_labels(path: Path) -> LabelSet:
    """A label set's file. Raises `ConfigError`."""
    try:
        return LabelSet.model_validate(str(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
