"""Stratified sampling: choose the images that a person should check, for each label from a few score ranges.

Few images are near a threshold or have high scores, and these are the ones that answers are needed for. A label's
questions are therefore drawn from strata, which are ranges of its scores. Within a stratum each image has the same
chance. A label's questions are in random order, so that the first of them are a sample too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from curation.histogram import rank_within_groups
from curation.sampling.design import Design
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats
from storage.settings import ConfigError

OFFSETS = np.arange(-12.0, 9.0)
"""Borders between a label's bins, in logits from its threshold. A stratum is a range of bins. They are fixed, so that
one pass over the scores is enough."""
_AT_THRESHOLD = 12
"""The index of the offset 0: bins above it reach the threshold."""
DEFAULT_THRESHOLD = 0.1
"""The threshold that is assumed for a label without one: SigLIP gives correct labels scores of 0.1 to 0.5."""
NEAR = 3
"""The stratum below the threshold reaches at least this many logits down, unless few images reach the threshold."""
_MAX_CANDIDATES = 2_000_000
"""The reservoirs are pruned when they hold more candidates than this. It bounds memory."""
_NEVER = np.uint32(2**32 - 1)
"""The random number of an image that must not be drawn."""


def assume_threshold(threshold: float) -> float:
    """The threshold of a label for the choice of images: its own, or `DEFAULT_THRESHOLD` if it has none."""
    return threshold if 0 < threshold < 1 else DEFAULT_THRESHOLD


Purpose = Literal["precision", "evaluation", "audit"]


@dataclass(frozen=True)
class Goal:
    """What the answers are for. It decides how a label's questions are shared out.

    * `precision`: find the score from which a share `target` of the images is right. Needs answers above the threshold.
    * `evaluation`: estimate recall and the share of right images too. Needs answers below the threshold as well.
    * `audit`: judge what was accepted. Asks about nothing else.
    """

    purpose: Purpose = "precision"
    target: float = 0.9

    @property
    def share_above(self) -> float:
        """The share of a label's questions about images that reach its threshold."""
        return {"precision": 0.85, "evaluation": 0.4, "audit": 1.0}[self.purpose]

    @property
    def share_far_below(self) -> float:
        """The share of a label's questions about images that are not near its threshold."""
        return {"precision": 0.05, "evaluation": 0.3, "audit": 0.0}[self.purpose]

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read `precision=0.9` or `evaluation`. Raises `ConfigError`."""
        name, equals, value = text.partition("=")
        try:
            target = float(value) if equals else 0.9
        except ValueError:
            target = -1.0
        if name == "precision" and 0.5 <= target <= 0.999:
            return cls("precision", target)
        if text == "evaluation":
            return cls("evaluation")
        raise ConfigError(f"--for {text}: write precision=0.9, with a number from 0.5 to 0.999, or evaluation")


@dataclass(frozen=True)
class Stratum:
    """A range of bins, from `first` to before `end`, from which `size` images are drawn."""

    first: int
    end: int
    size: int


@dataclass(frozen=True)
class Sample:
    """A sample of Q questions: each is one image and one label.

    `position` (Q,) is the image's index in the output's order, `label` (Q,) the label's index in the label set,
    `score` (Q,) its score, `stratum` (Q,) its stratum in the `design`. `weight` (Q,) is the number of images in the
    stratum divided by the number drawn from it. `population` and `drawn` are these two numbers, by label and stratum.
    """

    position: NDArray[np.int64]
    label: NDArray[np.int64]
    score: Floats
    stratum: NDArray[np.int64]
    weight: NDArray[np.float64]
    design: Design
    population: dict[str, list[int]]
    drawn: dict[str, list[int]]


@dataclass(frozen=True)
class Exclusion:
    """Questions that must not be asked again: `position` and `label` (E,) as in `Sample`, in any order."""

    position: NDArray[np.int64]
    label: NDArray[np.int64]


NOTHING = Exclusion(np.zeros(0, np.int64), np.zeros(0, np.int64))


def draw_sample(
    output: TaggedOutput,
    per_label: int,
    seed: int = 0,
    goal: Goal = Goal(),
    *,
    labels: Sequence[int] | None = None,
    from_scores: Mapping[int, float] | None = None,
    exclude: Exclusion = NOTHING,
) -> Sample:
    """Draw `per_label` questions for each label, or all images if there are fewer, in one pass and constant memory.

    The labels' samples are independent: an image may be drawn for several labels. The same seed draws the same sample
    from the same output. For another goal, another `per_label`, or after the label set has changed, it draws other
    images, so that an audit does not repeat the questions that chose a threshold (see `_make_seed`). `labels` are the
    indices of the labels to ask about, by default all. With `from_scores`, a score by the label's index, only these
    labels are asked about, and only images whose score is at least the given one. An audit asks about the images that
    reach the label's `accept` threshold, or its threshold if it has none.

    Excluded questions are counted in their strata, and not drawn.
    """
    names = output.labels.names
    if from_scores is None and goal.purpose == "audit":
        both = zip(names, output.labels.thresholds(), strict=True)
        starts = [threshold if label.accept is None else label.accept for label, threshold in both]
        from_scores = {row: starts[row] for row in (range(len(names)) if labels is None else labels)}
    rows = sorted(from_scores) if from_scores is not None else range(len(names)) if labels is None else sorted(labels)
    chosen = np.asarray(rows, np.int64)
    borders = _make_borders(output, from_scores)[... if from_scores is not None else chosen]
    entropy = _make_seed(output, per_label, seed, goal)
    reservoirs = _Reservoirs(borders, per_label, np.random.default_rng(entropy), exclude, chosen)
    for scores in output.scores():
        reservoirs.add(scores[:, chosen])
    above = 1 if from_scores is not None else _AT_THRESHOLD + 1
    only = Goal("audit") if from_scores is not None else goal
    strata = [choose_strata(available, above, per_label, only) for available in reservoirs.available()]
    return _make_sample(output, reservoirs, strata, borders, chosen, entropy)


def _make_seed(output: TaggedOutput, per_label: int, seed: int, goal: Goal) -> list[int]:
    """Make the seed of a random generator from the user's seed and all that decides what is drawn.

    With the user's seed alone, an image would have the same random number in each sample of an output, so that an audit
    would draw the images again that the sample of the calibration drew.
    """
    labels = output.labels.model_dump(mode="json", exclude_defaults=True)
    about = [output.fingerprint["labels.digest"], labels, output.rows]
    content = json.dumps([*about, per_label, goal.purpose, goal.target], sort_keys=True)
    return [seed, int(hashlib.sha256(content.encode()).hexdigest()[:16], 16)]


def choose_strata(available: NDArray[np.int64], above: int, count: int, goal: Goal) -> list[Stratum]:
    """Share out a label's questions: three strata, from high scores to low ones. Their sizes add up to `count`.

    `available` (B,) is the number of images of each bin that may be drawn. Bins from `above` on reach the threshold;
    they are the first stratum. The second begins below it and goes down as far as `NEAR` bins, and at least until it
    has twice as many images as are drawn from it. If there are too few images at the threshold, it only does the
    latter, because its highest scores are then the best candidates. The third holds all other images. The sizes add up
    to less than `count` if there are not so many images.
    """
    room = int(available[above:].sum())
    top = min(room, max(1, round(count * goal.share_above)))
    if goal.purpose == "audit":
        return [Stratum(above, len(available), top), Stratum(0, above, 0)]
    far = round(count * goal.share_far_below)
    near = count - top - far
    first = above if top < round(count * goal.share_above) else max(0, above - NEAR)
    while first > 0 and available[first:above].sum() < 2 * near:
        first -= 1
    near, far = _move_surplus([near, far], [int(available[first:above].sum()), int(available[:first].sum())])
    top = min(room, count - near - far)
    return [Stratum(above, len(available), top), Stratum(first, above, near), Stratum(0, first, far)]


def _move_surplus(sizes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Move what does not fit into one stratum to the others."""
    given = [min(size, room) for size, room in zip(sizes, rooms, strict=True)]
    for index, room in enumerate(rooms):
        given[index] += min(sum(sizes) - sum(given), room - given[index])
    return given


def _make_borders(output: TaggedOutput, from_scores: Mapping[int, float] | None) -> Floats:
    """The borders between the bins of each label, or of those in `from_scores`, as float32 scores (L, E)."""
    if from_scores is not None:
        return np.asarray([[from_scores[row]] for row in sorted(from_scores)], np.float32)
    thresholds = np.asarray([assume_threshold(value) for value in output.labels.thresholds()], np.float64)
    logits = np.log(thresholds / (1 - thresholds))[:, None] + OFFSETS
    borders = (1 / (1 + np.exp(-logits))).astype(np.float32)
    borders[:, _AT_THRESHOLD] = thresholds.astype(np.float32)  # exactly, as the job compares scores with it
    return np.maximum.accumulate(borders, axis=1)


class _Reservoirs:
    """Reservoir samples, one for each bin of each label.

    Each image gets a random number for each label. A reservoir keeps the `capacity` images with the smallest numbers.
    These are a simple random sample of the bin, and the smallest numbers of several bins are one of the bins together.
    """

    def __init__(
        self,
        borders: Floats,
        capacity: int,
        random: np.random.Generator,
        exclude: Exclusion,
        chosen: NDArray[np.int64],
    ) -> None:
        labels, self.bins = len(borders), borders.shape[1] + 1
        self.population = np.zeros((labels, self.bins), np.int64)
        self._excluded = np.zeros((labels, self.bins), np.int64)
        self._borders, self._capacity, self._random = borders, capacity, random
        self._first_bin = (np.arange(labels) * self.bins)[:, None]
        self._limits = np.full(labels * self.bins, _NEVER, np.uint32)
        self._candidates: list[tuple[NDArray[Any], ...]] = []
        self._count = self._position = 0
        self._most = min(_MAX_CANDIDATES, 100_000 + 4 * labels * self.bins * capacity)
        column = np.full(int(max(chosen.max(initial=0), exclude.label.max(initial=0))) + 1, -1, np.int64)
        column[chosen] = np.arange(labels)
        known = column[exclude.label] >= 0
        order = np.argsort(exclude.position[known], kind="stable")
        self._exclude = exclude.position[known][order], column[exclude.label[known]][order]

    def add(self, scores: Floats) -> None:
        """Add the next N images of the output, with the scores (N, L) of the chosen labels."""
        turned = np.ascontiguousarray(scores.T)
        pairs = zip(self._borders, turned, strict=True)
        bins = np.stack([np.searchsorted(edges, row, side="right") for edges, row in pairs])
        bins += self._first_bin
        self.population += np.bincount(bins.reshape(-1), minlength=self.population.size).reshape(self.population.shape)
        numbers = self._random.integers(0, _NEVER, turned.shape, np.uint32)
        positions, labels = self._exclude
        mine = slice(*np.searchsorted(positions, [self._position, self._position + len(scores)]))
        rows = positions[mine] - self._position
        numbers[labels[mine], rows] = _NEVER
        np.add.at(self._excluded.reshape(-1), bins[labels[mine], rows], 1)
        where, column = np.nonzero(numbers < self._limits[bins])
        found = bins[where, column], numbers[where, column], self._position + column, turned[where, column]
        self._candidates.append(found)
        self._count += len(column)
        self._position += len(scores)
        if self._count > self._most:
            self._prune()

    def available(self) -> NDArray[np.int64]:
        """The number of images of each bin that may be drawn, (L, bins)."""
        return np.asarray(self.population - self._excluded, np.int64)

    def draw(self, strata: Sequence[Sequence[Stratum]]) -> tuple[NDArray[Any], ...]:
        """Draw from each label's strata: arrays (Q,) of label, stratum, position and score.

        Strata are numbered from the lowest scores.
        """
        self._prune()
        bins, numbers, positions, scores = self._candidates[0]
        stratum_of = np.zeros(self.population.size, np.int64)
        sizes: list[int] = []
        for label, one in enumerate(strata):
            for stratum in one[::-1]:
                stratum_of[label * self.bins + stratum.first : label * self.bins + stratum.end] = len(sizes)
                sizes.append(stratum.size)
        first = np.cumsum([0, *(len(one) for one in strata)])
        stratum = stratum_of[bins]
        order = np.lexsort((numbers, stratum))
        chosen = order[rank_within_groups(stratum[order]) < np.asarray(sizes)[stratum[order]]]
        label = np.searchsorted(first, stratum[chosen], side="right") - 1
        return label, stratum[chosen] - first[label], positions[chosen], scores[chosen]

    def _prune(self) -> None:
        """Keep `capacity` images of each bin. The largest number kept is the limit for later candidates."""
        columns: list[NDArray[Any]] = [np.concatenate(chunks) for chunks in zip(*self._candidates, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        columns = [column[order] for column in columns]
        rank = rank_within_groups(columns[0])
        last = rank == self._capacity - 1
        self._limits[columns[0][last]] = columns[1][last]
        kept = tuple(column[rank < self._capacity] for column in columns)
        self._candidates, self._count = [kept], len(kept[0])


def _make_sample(
    output: TaggedOutput,
    reservoirs: _Reservoirs,
    strata: Sequence[Sequence[Stratum]],
    borders: Floats,
    chosen: NDArray[np.int64],
    entropy: list[int],
) -> Sample:
    label, stratum, position, score = reservoirs.draw(strata)
    names = output.labels.label_names()
    edges, population, drawn = {}, {}, {}
    for row, one in enumerate(strata):
        name = names[chosen[row]]
        rising = one[::-1]
        edges[name] = np.asarray(
            [borders[row, part.first - 1] if part.first else -1 for part in rising[1:]], np.float32
        )
        population[name] = [int(reservoirs.population[row, part.first : part.end].sum()) for part in rising]
        drawn[name] = [part.size for part in rising]
    # Within a label in random order, whatever the strata: a person who stops early leaves a sample.
    order = np.lexsort((np.random.default_rng([*entropy, 1]).random(len(label)), label))
    label, stratum, position, score = label[order], stratum[order], position[order], score[order]
    images = np.asarray([population[names[chosen[row]]][part] for row, part in zip(label, stratum, strict=True)])
    sizes = np.asarray([drawn[names[chosen[row]]][part] for row, part in zip(label, stratum, strict=True)])
    label = chosen[label]
    digest = hashlib.sha256(b"".join(column.tobytes() for column in (position, label, np.asarray(entropy, np.uint64))))
    design = Design(digest.hexdigest()[:16], output.rows, edges, tuple(names), output.head, output.weights)
    score = np.asarray(score, np.float32)
    return Sample(position, label, score, stratum, images / np.maximum(sizes, 1), design, population, drawn)
