"""Audit: how much of what was accepted is right, from answers to a fresh sample of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from curation.estimates.cells import ACCEPT, REVIEW, WrittenRegions, count_cells
from curation.estimates.confidence import ONE_SIDED, WRONG_ANSWERS, bound_precision
from curation.quality.independence import separate
from curation.quality.truth import Truth, check_sampled
from curation.tagged_output import TaggedOutput


@dataclass(frozen=True)
class LabelAudit:
    """The result of an audit for one label.

    `images` have the label: accepted ones, or all on which it is written if the label has no `accept` threshold
    (`band` is then "tagged"). `right` is the estimated share of them for which it is right, NaN without an answer, and
    `bound` its lower bound, which fails in at most 5 % of audits. `drawn` images were looked at. `independent` is False
    if the same answers chose the threshold. `unsure` of the `drawn` images have an answer that says neither right nor
    wrong: `right` leaves them out, and `bound` counts them as wrong.
    """

    label: str
    band: str
    images: int
    drawn: int
    right: float
    bound: float
    independent: bool = True
    unsure: int = 0

    def __str__(self) -> str:
        what = f"{self.label}: {self.images:,} {self.band}"
        if not self.images:
            return what
        if not self.drawn:
            return f"{what}, none looked at: not known"
        unsure = f", {self.unsure:,} unsure" if self.unsure else ""
        if math.isnan(self.right):
            why = "" if self.unsure == self.drawn else ", because a range of their scores was not asked about"
            return f"{what}, {self.drawn:,} looked at{unsure}: not known{why}"
        if self.drawn == self.images:
            return f"{what}, all looked at{unsure}, {self.right:.2f} right"
        least = int(self.bound * 100 + 1e-9) / 100
        said = f"{what}, {self.right:.2f} right, at least {least:.2f} (95 %), from {self.drawn:,} answers{unsure}"
        return said if self.independent else f"{said}, which chose the threshold: draw a new audit"


def audit_labels(output: TaggedOutput, truth: Truth, wrong_answers: float = WRONG_ANSWERS) -> list[LabelAudit]:
    """Audit each label that was asked about, by the images on which the output has it in the band `accept`.

    A label without an `accept` threshold is audited by all images on which it is written. Bounds are those of
    `curation.estimates.confidence`, one-sided: images that people were unsure about count as wrong. One pass over the
    output. Raises `ConfigError` for answers that are no sample.
    """
    check_sampled(truth)
    truth, dependent = separate(output.labels, truth)
    asked = [row for row, name in enumerate(output.labels.label_names()) if any(name in d.edges for d in truth.designs)]
    rows = np.unique(np.concatenate([truth.label, truth.unsure_label, np.asarray(asked, np.int64)]))
    tables = count_cells(output, truth, rows, WrittenRegions(output.labels))
    found = []
    for row, table in zip(rows.tolist(), tables, strict=True):
        label = output.labels.names[row]
        cells = table.join_single(ACCEPT if label.accept is not None else REVIEW)
        right = cells.estimate_right() / cells.total if cells.total else float("nan")
        bound = bound_precision(cells, wrong_answers, ONE_SIDED)
        band = "accepted" if label.accept is not None else "tagged"
        found.append(
            LabelAudit(
                label.name,
                band,
                cells.total,
                int(cells.drawn.sum()),
                right,
                bound,
                row not in dependent,
                int(cells.unsure.sum()),
            )
        )
    return found
