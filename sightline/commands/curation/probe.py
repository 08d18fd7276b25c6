"""`sightline probe`: learn from answers what prompts do not describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.curation.quality import OUTPUT, SHOWN, TRUTH, open_truth, print_omitted, write_labels
from sightline.exits import out


def probe(
    output: Annotated[str, OUTPUT],
    truth: Annotated[Path, TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="File for the label set with probes.")
    ] = Path("probed.yaml"),
    gain: Annotated[
        float, typer.Option(min=0, max=1, help="Keep a probe if its average precision is this much higher.")
    ] = 0.01,
) -> None:
    """Train linear probes: a logistic regression on embeddings for each label, from answers. Writes a label set.

    A probe replaces a label's prompts only if its average precision on held-out answers is higher. A probe's scores
    are not comparable with those of the prompts: calibrate again after `sightline retag`.
    """
    with open_truth(output, truth) as (source, answers):
        from curation.quality.probe import make_label_set, train_probes

        found = train_probes(source, answers, gain)
        write_labels(labels_out, make_label_set(source.labels, found))
        for one in found[:SHOWN]:
            compared = (
                "" if math.isnan(one.after) else f"average precision {one.before:.3f}, with a probe {one.after:.3f}"
            )
            result = compared if one.probe else ", ".join(filter(None, (compared, one.reason)))
            out.print(f"{escape(one.label)}: {result}", highlight=False)
        print_omitted(len(found))
        kept = sum(one.probe is not None for one in found)
        out.print(
            f"{kept} of {len(source.labels.names)} labels have a probe: {escape(str(labels_out))}", highlight=False
        )
