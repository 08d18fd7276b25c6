"""Stratified sampling: choose the images that a person should check, by label and score, each with its weight.

Half of the images near a threshold may be tagged wrongly, but only one in a hundred of all images. Figures of a sample
that is full of borderline images therefore say nothing about the whole output by themselves. Each sampled image has a
weight, the number of images of its stratum that it stands for (Horvitz and Thompson 1952), and every module that reads
answers uses the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.histogram import bin_scores, rank_within_groups
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats

EDGES = np.arange(-12.0, 7.0)
"""Borders between a label's 20 strata, as logits of the score, 1 apart. They are fixed, so that one pass is enough."""
STRATA = len(EDGES) + 1
DEFAULT_THRESHOLD = 0.1
"""The threshold that is assumed for a label without one: SigLIP gives correct labels scores of 0.1 to 0.5."""
_MIN_PER_STRATUM = 2
_MAX_CANDIDATES = 2_000_000
"""The reservoirs are pruned when they hold more candidates than this. It bounds memory."""


@dataclass(frozen=True)
class Sample:
    """A sample of N questions: each is one image and one label.

    `position` (N,) is the image's index in the output's order, `label` (N,) the label's index in the label set,
    `stratum` (N,) the bin of its `score` (N,) between `EDGES`. `weight` (N,) is the number of images in the stratum
    divided by the number drawn from it. `population` (L, STRATA) is the number of images in each stratum.
    """

    position: NDArray[np.int64]
    label: NDArray[np.int64]
    score: Floats
    stratum: NDArray[np.int64]
    weight: NDArray[np.float64]
    population: NDArray[np.int64]


def draw_sample(output: TaggedOutput, per_label: int, seed: int = 0) -> Sample:
    """Draw about `per_label` images for each label, in one pass over the embeddings and with constant memory.

    At least two images are drawn from every stratum that has two, so that every image has a chance to be drawn; the
    other images are drawn mostly where the threshold will be (see `allocate`). The labels' samples are independent: an
    image may be drawn for several labels. The same seed draws the same sample from the same output.
    """
    labels = len(output.labels.names)
    reservoirs = _StratumReservoirs(labels, max(per_label, _MIN_PER_STRATUM))
    random = np.random.default_rng(seed)
    first = 0
    for scores in output.scores():
        reservoirs.add(first, scores, random.integers(0, 2**32, scores.shape, np.uint32))
        first += len(scores)
    thresholds = output.labels.thresholds()
    sizes = [allocate(*stratum, per_label) for stratum in zip(reservoirs.population, thresholds, strict=True)]
    return reservoirs.draw(np.stack(sizes))


def allocate(population: NDArray[np.int64], threshold: float, count: int) -> NDArray[np.int64]:
    """Allocate a label's sample of `count` images to its strata: the number of images to draw from each, (STRATA,).

    `population` (STRATA,) is the number of images in each stratum. Each stratum first gets two, or all the images it
    has, so that the sum may be a little more than `count`. Half of the rest is allocated in proportion to population
    times standard deviation (Neyman 1934), and half in proportion to the standard deviation alone, so that high scores,
    which few images have, are sampled too.

    The standard deviation of an answer is unknown before anyone has answered. It is taken as sqrt(p(1-p)), where p is
    a logistic curve through 1/2 at the label's threshold. Above the threshold it is at least 1/3, because the precision
    of accepted images can only be shown by answers about accepted images.
    """
    allocated = np.minimum(population, _MIN_PER_STRATUM)
    middle = np.concatenate([[EDGES[0] - 1], (EDGES[:-1] + EDGES[1:]) / 2, [EDGES[-1] + 1]])
    above = middle - _logit(threshold if 0 < threshold < 1 else DEFAULT_THRESHOLD)
    chance = 1 / (1 + np.exp(-above))
    deviation = np.maximum(np.sqrt(chance * (1 - chance)), np.where(above > 0, 1 / 3, 0)) * (population > 0)
    while (remaining := count - int(allocated.sum())) > 0 and (allocated < population).any():
        available = population - allocated
        open_ = available > 0
        neyman = population * deviation * open_
        share = neyman / max(neyman.sum(), 1e-300) + deviation * open_ / max((deviation * open_).sum(), 1e-300)
        more = np.minimum(available, np.floor(remaining * share / share.sum()).astype(np.int64))
        if not more.any():
            more[np.argmax(share * open_)] = 1
        allocated = allocated + more
    return np.asarray(allocated, np.int64)


class _StratumReservoirs:
    """Reservoir samples, one for each stratum of each label.

    Each image gets a random number for each label. A reservoir keeps the `capacity` images with the smallest numbers,
    which is a simple random sample of the stratum's images seen so far.
    """

    def __init__(self, labels: int, capacity: int) -> None:
        self.population = np.zeros((labels, STRATA), np.int64)
        self._capacity = capacity
        self._first = np.arange(labels) * STRATA
        self._limits = np.full(labels * STRATA, np.iinfo(np.uint32).max, np.uint32)
        self._candidates: list[tuple[NDArray[Any], ...]] = []
        self._count = 0

    def add(self, first: int, scores: Floats, numbers: NDArray[np.uint32]) -> None:
        """Add N images, the first of them at position `first`. `scores` and the random `numbers` are (N, L)."""
        bins, counts = bin_scores(scores, EDGES)
        strata = self._first + bins
        self.population += counts
        rows, labels = np.nonzero(numbers <= self._limits[strata])
        self._candidates.append((strata[rows, labels], numbers[rows, labels], first + rows, scores[rows, labels]))
        self._count += len(rows)
        if self._count > _MAX_CANDIDATES:
            self._prune()

    def draw(self, sizes: NDArray[np.int64]) -> Sample:
        """Draw `sizes` (L, STRATA) images from the strata. Rows are sorted by label, and randomly within a label."""
        self._prune()
        strata, numbers, positions, scores = self._candidates[0]
        chosen = rank_within_groups(strata) < sizes.reshape(-1)[strata]
        strata, numbers, positions, scores = (column[chosen] for column in (strata, numbers, positions, scores))
        weight = (self.population.reshape(-1) / np.maximum(sizes.reshape(-1), 1))[strata]
        order = np.lexsort((numbers, strata // STRATA))
        label, stratum = np.divmod(strata[order], STRATA)
        return Sample(
            positions[order], label, np.asarray(scores[order], np.float32), stratum, weight[order], self.population
        )

    def _prune(self) -> None:
        """Keep `capacity` images of each stratum. The largest number kept is the limit for later candidates."""
        columns: list[NDArray[Any]] = [np.concatenate(chunks) for chunks in zip(*self._candidates, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        columns = [column[order] for column in columns]
        rank = rank_within_groups(columns[0])
        last = rank == self._capacity - 1
        self._limits[columns[0][last]] = columns[1][last]
        kept = tuple(column[rank < self._capacity] for column in columns)
        self._candidates, self._count = [kept], len(kept[0])


def _logit(score: float) -> float:
    return float(np.log(score / (1 - score)))
