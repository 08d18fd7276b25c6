"""Cells: the parts of an output that a person's answers are a random sample of, with the number of their images.

A cell of a label holds the images that lie in the same stratum of each sample, and in the same *region* of the scores
that are judged, such as the band `accept`. Whatever the samples were drawn for, the answered images of a cell are a
simple random sample of the cell, because each sample drew from its strata at random.

This takes the numbers of answers as given. If a sample was placed because of earlier answers, these decided how many
answers a cell has. The effect is small, and `benchmarks/calibration.py` includes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Cells, Counts
from curation.quality.truth import Truth
from curation.sampling.design import Design
from curation.tagged_output import TaggedOutput, read_embeddings
from siglip.heads import LinearHead, accept_thresholds
from siglip.labels import LabelSet
from siglip.scoring import Floats, select

NOT_WRITTEN, REVIEW, ACCEPT = range(3)
"""The regions of `WrittenRegions`."""


class Regions(Protocol):
    """A division of images into regions, for some labels, by their scores."""

    count: int

    def assign(self, scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The region of N images for each of A labels, int64 (A, N), from the scores (N, L) of all labels."""


class WrittenRegions:
    """What an output says about a label: not written, written in the band `review`, or in the band `accept`.

    A label is written if its score reaches its threshold and it is among the image's `top_k` best. Written labels
    without an `accept` threshold are in `REVIEW`.
    """

    count = 3

    def __init__(self, labels: LabelSet) -> None:
        self._thresholds = np.asarray(labels.thresholds(), np.float32)
        self._accepts = accept_thresholds(labels)
        self._top_k = labels.top_k

    def assign(self, scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Regions`."""
        chosen = select(scores, self._thresholds, self._top_k)
        written = np.zeros(scores.shape, bool)
        written[np.repeat(np.arange(len(scores)), chosen.counts), chosen.labels] = True
        accepted = scores >= self._accepts
        return np.asarray(np.where(written, np.where(accepted, ACCEPT, REVIEW), NOT_WRITTEN).T[labels], np.int64)


class ThresholdRegions:
    """For each label the ranges between increasing thresholds, float32 (A, T). Region t holds scores that reach t."""

    def __init__(self, thresholds: Floats) -> None:
        self._thresholds = thresholds
        self.count = thresholds.shape[1] + 1

    def assign(self, scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Regions`. The rows of the thresholds belong to `labels`, in this order."""
        return np.stack(
            [
                np.searchsorted(edges, np.ascontiguousarray(scores[:, label]), side="right")
                for edges, label in zip(self._thresholds, labels, strict=True)
            ]
        ).astype(np.int64)


@dataclass(frozen=True)
class CellTable:
    """The cells of one label by sample stratum and region: int64 (C, R) each. See `Cells` for the counts."""

    size: Counts
    drawn: Counts
    right: Counts
    unsure: Counts

    def join_regions(self, first: int, end: int) -> Cells:
        """The cells of the regions from `first` to before `end`; regions are joined, and empty cells left out."""
        columns = [part[:, first:end].sum(axis=1) for part in (self.size, self.drawn, self.right, self.unsure)]
        cells = Cells(*columns)
        return cells.pick(cells.size > 0)

    def join_single(self, region: int) -> Cells:
        """The cells of one region."""
        return self.join_regions(region, region + 1)


def count_cells(
    output: TaggedOutput,
    truth: Truth,
    labels: NDArray[np.int64],
    regions: Regions,
    head: LinearHead | None = None,
) -> list[CellTable]:
    """Count the images and the answers of each cell, for the labels with these indices, in one pass over the output.

    `regions` divides by the scores of `head`, which is the output's own by default.
    """
    head = head or output.head
    names = [output.labels.label_names()[label] for label in labels]
    strata = _Strata(truth.designs, names)
    shape = (len(labels), strata.count, regions.count)
    size = np.zeros(shape, np.int64)
    for batch in output.batches(["embedding"]):
        embeddings = read_embeddings(batch)
        scores = head.scores(embeddings)
        size += _count(strata.assign(embeddings, (head, scores)), regions.assign(scores, labels), shape)
    row = np.full(len(output.labels.names), -1, np.int64)
    row[labels] = np.arange(len(labels))
    stratum = strata.assign(truth.embeddings)
    region = regions.assign(head.scores(truth.embeddings), labels)
    of_answers = []
    for images, rows in (
        (truth.image, row[truth.label]),
        (truth.image[truth.right], row[truth.label[truth.right]]),
        (truth.unsure_image, row[truth.unsure_label]),
    ):
        images, rows = images[rows >= 0], rows[rows >= 0]
        flat = (rows * strata.count + stratum[rows, images]) * regions.count + region[rows, images]
        of_answers.append(np.bincount(flat, minlength=size.size).reshape(shape))
    sure, right, unsure = of_answers
    return [CellTable(*parts) for parts in zip(size, sure + unsure, right, unsure, strict=True)]


class _OneRegion:
    count = 1

    def assign(self, scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Regions`."""
        return np.zeros((len(labels), len(scores)), np.int64)


def weigh_answers(output: TaggedOutput, truth: Truth) -> Truth:
    """Return the truth with the weight of each answer: the images of its stratum for each answer in it.

    Answers that are missing, because nobody has given them yet, do not bias weighted means: the weights are those of
    the answers that are there. One pass over the output. The weights are left as they are without a sample's design.
    """
    if not any(design.head is not None for design in truth.designs):
        return truth
    labels = np.unique(truth.label)
    strata = _Strata(truth.designs, [output.labels.label_names()[label] for label in labels])
    tables = count_cells(output, truth, labels, _OneRegion())
    row = np.searchsorted(labels, truth.label)
    stratum = strata.assign(truth.embeddings)[row, truth.image]
    weights = np.stack([table.size[:, 0] / np.maximum(table.drawn[:, 0] - table.unsure[:, 0], 1) for table in tables])
    return replace(truth, weight=weights[row, stratum])


class _Strata:
    """The strata of several designs together: images of one joint stratum are in the same stratum of each design."""

    def __init__(self, designs: Sequence[Design], names: Sequence[str]) -> None:
        self._designs, self._names = designs, names
        self.count = 1
        self._factors = []
        for design in designs:
            self._factors.append(self.count)
            self.count *= max(design.count_strata(name) for name in names)

    def assign(self, embeddings: Floats, known: tuple[LinearHead, Floats] | None = None) -> NDArray[np.int64]:
        """The joint stratum of N images for each of A labels: int64 (A, N).

        `known` is a head with its scores of these embeddings: they are not computed again for a design with this head.
        """
        joint = np.zeros((len(self._names), len(embeddings)), np.int64)
        for design, factor in zip(self._designs, self._factors, strict=True):
            if design.head is None:
                continue
            if known is not None and _is_same(design.head, known[0]):
                scores = known[1]
            else:
                scores = design.head.scores(embeddings)
            column = {name: index for index, name in enumerate(design.names)}
            for row, name in enumerate(self._names):
                if name in design.edges:
                    mine = np.ascontiguousarray(scores[:, column[name]])
                    joint[row] += factor * design.assign_strata(name, mine)
        return joint


def _is_same(one: LinearHead, other: LinearHead) -> bool:
    pairs = ((one.vectors, other.vectors), (one.gain, other.gain), (one.offset, other.offset))
    return one.groups == other.groups and all(np.array_equal(*pair) for pair in pairs)


def _count(strata: NDArray[np.int64], regions: NDArray[np.int64], shape: tuple[int, int, int]) -> Counts:
    labels, joint, count = shape
    flat = (np.arange(labels)[:, None] * joint + strata) * count + regions
    return np.bincount(flat.reshape(-1), minlength=labels * joint * count).reshape(shape)
