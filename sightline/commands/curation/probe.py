"""`sightline probe`: learn from answers what prompts do not describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape

from sightline.commands.curation.quality import (
    OUTPUT,
    SAMPLE,
    SHOWN,
    STRICT,
    TRUTH,
    open_truth,
    print_omitted,
    write_labels,
)
from sightline.exits import err, out


def probe(
    output: Annotated[str, OUTPUT],
    truth: Annotated[list[Path], TRUTH],
    labels_out: Annotated[
        Path, typer.Option("--labels-out", metavar="FILE", help="File for the label set with probes.")
    ] = Path("probed.yaml"),
    gain: Annotated[
        float, typer.Option(min=0, max=1, help="Keep a probe only if its average precision is this much higher.")
    ] = 0.01,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the output: images with the same value are never on both sides of a comparison. By "
            "default, near-identical images are not.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[list[Path] | None, SAMPLE] = None,
    strict: Annotated[bool, STRICT] = False,
) -> None:
    """Train linear probes: a logistic regression on embeddings for each label, from answers. Writes a label set.

    A probe replaces a label's prompts only if its average precision on held-out answers is higher, and if a test says
    that this is not chance. A probe's scores are not comparable with those of the prompts: calibrate again after
    `sightline retag`.
    """
    with open_truth(output, truth, strict=strict, samples=sample or ()) as (source, answers):
        from curation.estimates.cells import weigh_answers
        from curation.quality.groups import NEAR_IDENTICAL, group_by_column, group_near_identical
        from curation.quality.probe import make_label_set, train_probes

        if group_by is None:
            groups = group_near_identical(answers.embeddings)
            kind = f"near-identical images (cosine >= {NEAR_IDENTICAL})"
        else:
            groups = group_by_column(source, answers, group_by)
            kind = f"images with the same {group_by}"
        sizes = np.bincount(groups)
        err.print(
            escape(f"{len(groups):,} images in {len(sizes):,} groups of {kind}, the largest with {sizes.max():,}"),
            highlight=False,
        )
        found = train_probes(source, weigh_answers(source, answers), groups, gain)
        write_labels(labels_out, make_label_set(source.labels, found))
        for one in found[:SHOWN]:
            compared = (
                "" if math.isnan(one.after) else f"average precision {one.before:.3f}, with a probe {one.after:.3f}"
            )
            result = ", ".join(filter(None, (compared, "kept" if one.probe else f"not kept: {one.reason}")))
            out.print(f"{escape(one.label)}: {result}", highlight=False)
        print_omitted(len(found))
        kept = sum(one.probe is not None for one in found)
        out.print(
            f"{kept} of {len(source.labels.names)} labels have a probe: {escape(str(labels_out))}", highlight=False
        )
