"""The figures of an evaluation, as a report writes them: with their intervals, or why they are not known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from curation.estimates.confidence import Estimate
from curation.quality.evaluation import identify
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

_FIELDS = {"output", "digest", "labels", "accepted", "review", "micro_precision", "micro_recall", "suspects"}
_LABEL_FIELDS = {"label", "answers", "accepted", "review", "precision", "recall", "independent", "curve"}
NOT_KNOWN = Markup('<span class="unknown">not known</span>')
STAR = Markup('<span class="star" title="The answers chose the threshold, or trained the probe">*</span>')


def read_evaluation(path: Path, output: TaggedOutput) -> dict[str, Any]:
    """Read what `sightline evaluate --json` printed about an output.

    Raises `ConfigError` when the file holds anything else, or an evaluation of other labels or images.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not (isinstance(value, dict) and value.keys() >= _FIELDS and _are_labels(value["labels"])):
        raise ConfigError(f"{path} is not what `sightline evaluate --json` prints: run it again, with this version")
    if value["digest"] != identify(output):
        other = value["output"]
        if other == output.uri:
            raise ConfigError(f"{path} is about {other} with other labels or images: run `sightline evaluate` again")
        raise ConfigError(
            f"{path} is about {other}, and not about {output.uri}: run `sightline evaluate` with the latter"
        )
    return value


def show_estimate(value: dict[str, Any], independent: bool = True) -> Markup:
    """A figure as HTML: `0.92 (0.90 to 0.94)`, or "not known". A figure that is not independent has a star."""
    numbers = (math.nan if value[name] is None else float(value[name]) for name in ("value", "low", "high"))
    estimate = Estimate(*numbers)
    if not estimate.known:
        return NOT_KNOWN
    number, _, interval = str(estimate).partition(" ")
    star = Markup("") if independent else STAR
    return escape(number) + star + (Markup(' <span class="muted">{}</span>').format(interval) if interval else "")


def describe_band(
    band: dict[str, Any] | None, written: int, answered_labels: int, labels: int, independent: bool = True
) -> Markup:
    """Say how much of a band is right, for the headline. `written` is the number of labels in the band.

    `answered_labels` of the `labels` have answers; the band's figures are about these labels alone.
    """
    if not written:
        return Markup("nothing to judge")
    if band is None:
        return Markup("how many are right is not known: no evaluation was given")
    if not band["answers"]:
        return Markup("how many are right is not known: no answer is about them")
    share = show_estimate(band["precision"], independent)
    if band["precision"]["value"] is None:
        return Markup("the share that is right is not known from {} answers").format(f"{band['answers']:,}")
    if band["precision"]["low"] is None:
        return Markup(
            "{} right of the {} that have answers. They are no sample, so that nothing is known of the others"
        ).format(share, f"{band['answers']:,}")
    about = "" if answered_labels == labels else f", for the {answered_labels:,} of {labels:,} labels that have answers"
    return Markup("{} right, from {} answers{}").format(share, f"{band['answers']:,}", about)


def judges_fairly(label: dict[str, Any], *bands: str) -> bool:
    """Whether the answers about a label may judge these of its bands, or its whole scores if no band is named.

    Answers that chose the threshold or trained the probe make the figures too good, unless they are about all images of
    the band.
    """
    looked_at = bool(bands) and all(label[band]["answers"] == label[band]["images"] for band in bands)
    return bool(label["independent"]) or looked_at


def all_judge_fairly(evaluation: dict[str, Any], *bands: str) -> bool:
    """Whether `judges_fairly` holds for all labels of an evaluation."""
    return all(judges_fairly(label, *bands) for label in evaluation["labels"])


def _are_labels(labels: Any) -> bool:
    return isinstance(labels, list) and all(isinstance(one, dict) and one.keys() >= _LABEL_FIELDS for one in labels)
