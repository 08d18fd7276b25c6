"""`sightline labels check` and `diff`: check label sets, and compare label sets or outputs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import FAILED, out, report_errors
from siglip.checkpoint import pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import ModelConfig
from siglip.labels import LabelSet
from storage.mirror import Mirror
from storage.settings import ConfigError, describe_error
from storage.store import StoreOptions

SHOWN = 40


class RuleChoice(StrEnum):
    """The values of `model.text_rule`."""

    auto = "auto"
    canonicalize = "canonicalize"
    lowercase = "lowercase"


app = typer.Typer(no_args_is_help=True, help="Check and compare label sets.")


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(help="A label set: .yaml, .json, .csv, .tsv, or .txt with a label on each line.")
    ],
    model: Annotated[str, typer.Option(help="The checkpoint to check for: a value of a job's model.source.")] = "tiny",
    text_rule: Annotated[RuleChoice, typer.Option(help="What a job's model.text_rule names.")] = RuleChoice.auto,
    show: Annotated[bool, typer.Option("--show", help="Print the texts that the model gets for each label.")] = False,
    near: Annotated[
        float, typer.Option(min=0, max=1, help="Report two labels whose embeddings have at least this cosine.")
    ] = 0.98,
) -> None:
    """Find labels that a model cannot tell apart, and prompts that it cannot read.

    Exit codes: 0 a job accepts these labels, whatever else was found; 1 a job refuses them; 2 a file or model cannot be
    read.
    """
    with report_errors():
        from curation.label_sets import check_labels
        from siglip.encoder import Encoder

        labels = read_labels(file)
        try:
            config = ModelConfig(source=model, text_rule=text_rule.value, compile=False)
            pinned = pin_model(config, Mirror(StoreOptions.from_environment()))
            findings = check_labels(labels, pinned.rule, Encoder(pinned), near)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        for label, prompts in zip(labels.names, labels.prompts(pinned.rule), strict=True) if show else ():
            out.print(escape(f"{label.name}: {' | '.join(prompts) or 'a probe, which has no text'}"), highlight=False)
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
    before: Annotated[str, typer.Argument(help="A label set file, or a finished output of `sightline tag`.")],
    after: Annotated[str, typer.Argument(help="The label set file or output to compare with.")],
) -> None:
    """List what changed, label by label, between two label sets or two outputs of the same images."""
    with report_errors():
        if Path(before).is_file() and Path(after).is_file():
            _diff_labels(Path(before), Path(after))
        else:
            _diff_outputs(before, after)


def _diff_labels(before: Path, after: Path) -> None:
    from curation.label_sets import diff_labels

    first, second = read_labels(before), read_labels(after)
    changes = diff_labels(first, second)
    for change in changes:
        out.print(f"{escape(change.label)}: {escape(change.what)}", highlight=False)
    scored = len({change.label for change in changes if change.scores})
    out.print(f"{len(first.names)} labels became {len(second.names)}; the scores of {scored} change")


def _diff_outputs(before: str, after: str) -> None:
    from curation.output_diff import diff_outputs

    for name, other in ((before, after), (after, before)):
        if Path(name).is_file():
            raise ConfigError(f"{name} is a file and {other} is not: compare two label sets, or two outputs")
    found = diff_outputs(open_reported(before), open_reported(after))
    for one in found.labels[:SHOWN]:
        out.print(f"{escape(one.label)}: {one.before:,} became {one.after:,}", highlight=False)
        for count, verb, keys in ((one.gained, "gained", one.gained_by), (one.lost, "lost", one.lost_by)):
            if count:
                out.print(escape(f"  {count:,} {verb} it, such as {', '.join(keys)}"), highlight=False)
    if len(found.labels) > SHOWN:
        out.print(f"and {len(found.labels) - SHOWN} more labels")
    out.print(f"{found.changed:,} of {found.images:,} images changed", highlight=False)


def read_labels(path: Path) -> LabelSet:
    """Read a label set file. Raises `ConfigError`."""
    try:
        return LabelSet.model_validate(str(path))
    except ValidationError as error:
        message = describe_error(error, LabelSet).removeprefix("config: ")
        if message.startswith("label file"):  # it names the path, which pydantic calls the given value
            raise ConfigError(message.partition(" (given:")[0]) from None
        raise ConfigError(f"{path}: {message}") from None
