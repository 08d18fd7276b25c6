"""Statistics of an output in one pass: each label's score histogram, counts and example images; examples of rejects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from curation.estimates.cells import ACCEPT, NOT_WRITTEN, REVIEW, WrittenRegions
from curation.histogram import bin_scores, rank_within_groups
from curation.tagged_output import ID, TaggedOutput
from siglip.scoring import Floats

EDGES = np.linspace(-12.0, 6.0, 37)
"""Borders between the bars of a histogram, as logits of the score: on a linear axis nearly all scores would be in the
first bar."""
EXAMPLES = 5
REJECT_EXAMPLES = 5
Kind = Literal["highest", "just above", "just below"]
KINDS: tuple[Kind, ...] = ("highest", "just above", "just below")


@dataclass(frozen=True)
class Example:
    """An image, by its position in the output's order, and the label's score for it."""

    position: int
    score: float


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of one label over the whole output.

    `predicted` is the number of images whose score reaches the threshold. The label is written on `accepted` images in
    the band `accept` (0 without an `accept` score), and on `review` images below it: together fewer than `predicted`
    if `top_k` keeps it from some. `histogram` (len(EDGES) + 1,) counts the images in each bin. `examples` holds up to
    `EXAMPLES` images of each kind: those with the highest scores, the lowest scores at or above the threshold, and the
    highest scores below the threshold.
    """

    label: str
    threshold: float
    accept: float | None
    predicted: int
    accepted: int
    review: int
    histogram: NDArray[np.int64]
    examples: dict[Kind, list[Example]]


@dataclass(frozen=True)
class OutputStatistics:
    """Statistics of an output.

    `images` is the number of tagged images. Of these, `accepted` have at least one accepted label, `review` have labels
    but no accepted one, and `unlabelled` reach no label's threshold. `labels` is in the label set's order. `rejects`
    holds up to `REJECT_EXAMPLES` rejected rows for each reason: id, key, source, reason, detail.
    """

    images: int
    labels: list[LabelStatistics]
    rejects: dict[str, list[dict[str, Any]]]
    accepted: int
    review: int
    unlabelled: int


def compute_statistics(output: TaggedOutput) -> OutputStatistics:
    """Compute the statistics in one pass over the embeddings, with constant memory. Raises `StoreError`."""
    labels = output.labels
    thresholds = labels.thresholds()
    predict_from = np.asarray(thresholds, np.float32)
    count = len(predict_from)
    regions, every = WrittenRegions(labels), np.arange(count)
    predicted = np.zeros(count, np.int64)
    written, best = np.zeros((regions.count, count), np.int64), np.zeros(regions.count, np.int64)
    histogram = np.zeros((count, len(EDGES) + 1), np.int64)
    top = {kind: _TopExamples(count) for kind in KINDS}
    first = 0
    for scores in output.scores():
        passes = scores >= predict_from
        predicted += passes.sum(axis=0)
        region = regions.assign(scores, every)
        written += np.stack([(region == one).sum(axis=1) for one in range(regions.count)])
        best += np.bincount(region.max(axis=0), minlength=regions.count)
        histogram += bin_scores(scores, EDGES)[1]
        top["highest"].add(first, scores)
        top["just above"].add(first, np.where(passes, -scores, -np.inf))
        top["just below"].add(first, np.where(passes, -np.inf, scores))
        first += len(scores)
    found = [
        LabelStatistics(
            label.name,
            thresholds[row],
            label.accept,
            int(predicted[row]),
            int(written[ACCEPT, row]),
            int(written[REVIEW, row]),
            histogram[row],
            {kind: top[kind].examples(row, -1 if kind == "just above" else 1) for kind in KINDS},
        )
        for row, label in enumerate(labels.names)
    ]
    counts = (int(best[one]) for one in (ACCEPT, REVIEW, NOT_WRITTEN))
    return OutputStatistics(first, found, _find_rejects(output), *counts)


class _TopExamples:
    """For each label, the `EXAMPLES` images with the largest values so far. Of equal values the earlier image wins."""

    def __init__(self, labels: int) -> None:
        self._limit = np.full(labels, -np.inf, np.float32)
        self._values = np.zeros(0, np.float32)
        self._labels = np.zeros(0, np.int64)
        self._positions = np.zeros(0, np.int64)

    def add(self, first: int, values: Floats) -> None:
        """Add N images, the first of them at position `first`. `values` is (N, L); -inf leaves an image out."""
        rows, columns = np.nonzero(values > self._limit)
        all_values = np.concatenate([self._values, values[rows, columns]])
        all_labels = np.concatenate([self._labels, columns])
        positions = np.concatenate([self._positions, first + rows])
        order = np.lexsort((positions, -all_values, all_labels))
        labels = all_labels[order]
        rank = rank_within_groups(labels)
        kept = order[rank < EXAMPLES]
        self._values, self._labels, self._positions = all_values[kept], all_labels[kept], positions[kept]
        full = rank == EXAMPLES - 1
        self._limit[labels[full]] = all_values[order[full]]

    def examples(self, label: int, sign: int) -> list[Example]:
        """Return the kept images of one label, by its index, largest value first. Their score is `sign` times it.

        With `sign` -1, `add` was given negated scores, so that the images with the lowest scores were kept.
        """
        mine = self._labels == label
        return [
            Example(int(position), float(sign * value))
            for position, value in zip(self._positions[mine], self._values[mine], strict=True)
        ]


def _find_rejects(output: TaggedOutput) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in output.manifest["reasons"]}
    for batch in output.rejects([ID, "key", "source", "reason", "detail"]):
        for row in batch.to_pylist():
            listed = found.setdefault(row["reason"], [])
            if len(listed) < REJECT_EXAMPLES:
                listed.append(row)
        if all(len(listed) >= REJECT_EXAMPLES for listed in found.values()):
            break
    return found
