"""An output in one pass: how each label's scores are spread, which images it is surest of, and which it just missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from curation.histogram import bin_scores, rank_within
from curation.tagged_output import ID, TaggedOutput
from siglip.heads import accept_bars
from siglip.scoring import Floats

EDGES = np.linspace(-12.0, 6.0, 37)
"""Logits of the score between the bars of a histogram: on its own scale nearly all scores lie in the first bar."""
EXAMPLES = 5
REJECT_EXAMPLES = 5
Kind = Literal["surest", "just given", "just missed"]
KINDS: tuple[Kind, ...] = ("surest", "just given", "just missed")


@dataclass(frozen=True)
class Example:
    """An image, by its number in the output's order, and a label's score for it."""

    place: int
    score: float


@dataclass(frozen=True)
class LabelStatistics:
    """One label over the whole output.

    `given` images reach its threshold, and `accepted` of them the score from which it is sure (0 where it has none);
    fewer may be written where `top_k` cuts. `histogram` counts images between the `EDGES`, and outside of them on
    either side. `examples` has up to `EXAMPLES` images: the surest; of those that reach the threshold, the ones that
    do so least; and of those that do not, the nearest.
    """

    label: str
    threshold: float
    accept: float | None
    given: int
    accepted: int
    histogram: NDArray[np.int64]
    examples: dict[Kind, list[Example]]


@dataclass(frozen=True)
class OutputStatistics:
    """All labels, in the set's order, and a few of the rejected rows by reason: key, source, detail."""

    images: int
    labels: list[LabelStatistics]
    rejects: dict[str, list[dict[str, Any]]]
    unlabelled: int


def compute_statistics(output: TaggedOutput) -> OutputStatistics:
    """InputStats at every image once, with flat memory. `unlabelled` images reach no threshold. Raises `StoreError`."""
    labels = output.labels
    thresholds = labels.thresholds()
    bars = np.asarray(thresholds, np.float32)
    sure = accept_bars(labels)
    count = len(bars)
    given, accepted = np.zeros(count, np.int64), np.zeros(count, np.int64)
    histogram = np.zeros((count, len(EDGES) + 1), np.int64)
    best = {kind: _Best(count) for kind in KINDS}
    first = unlabelled = 0
    for scores in output.scores():
        passes = scores >= bars
        given += passes.sum(axis=0)
        accepted += (passes & (scores >= sure)).sum(axis=0)
        unlabelled += int((~passes.any(axis=1)).sum())
        histogram += bin_scores(scores, EDGES)[1]
        best["surest"].add(first, scores)
        best["just given"].add(first, np.where(passes, -scores, -np.inf))
        best["just missed"].add(first, np.where(passes, -np.inf, scores))
        first += len(scores)
    found = [
        LabelStatistics(
            label.name,
            thresholds[row],
            label.accept,
            int(given[row]),
            int(accepted[row]),
            histogram[row],
            {kind: best[kind].examples(row, -1 if kind == "just given" else 1) for kind in KINDS},
        )
        for row, label in enumerate(labels.names)
    ]
    return OutputStatistics(first, found, _find_rejects(output), unlabelled)


class _Best:
    """For each label the `EXAMPLES` images with the largest values so far; of equal ones, the first."""

    def __init__(self, labels: int) -> None:
        self._bar = np.full(labels, -np.inf, np.float32)
        self._values = np.zeros(0, np.float32)
        self._labels = np.zeros(0, np.int64)
        self._places = np.zeros(0, np.int64)

    def add(self, first: int, values: Floats) -> None:
        """Values (N, L) of images from number `first` on; -inf is no value."""
        rows, labels = np.nonzero(values > self._bar)
        together = np.concatenate([self._values, values[rows, labels]])
        whose = np.concatenate([self._labels, labels])
        places = np.concatenate([self._places, first + rows])
        order = np.lexsort((places, -together, whose))
        whose = whose[order]
        rank = rank_within(whose)
        kept = order[rank < EXAMPLES]
        self._values, self._labels, self._places = together[kept], whose[rank < EXAMPLES], places[kept]
        full = rank == EXAMPLES - 1
        self._bar[whose[full]] = together[order[full]]

    def examples(self, label: int, sign: int) -> list[Example]:
        """A label's, best first. `sign` gives the score back that a value was made of."""
        mine = self._labels == label
        return [
            Example(int(place), float(sign * value))
            for place, value in zip(self._places[mine], self._values[mine], strict=True)
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
