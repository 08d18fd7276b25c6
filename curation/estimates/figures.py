"""The figures of a label, and of all labels together: precision of each band, recall, F1 and prevalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.estimates.cells import ACCEPT, NOT_WRITTEN, REVIEW, CellTable
from curation.estimates.confidence import (
    DRAWS,
    UNKNOWN,
    WIDEST,
    Cells,
    Doubles,
    Estimate,
    Melding,
    estimate_share,
    is_telling,
    make_estimate,
)
from curation.quality.truth import Truth

_WIDEST_PREVALENCE = 0.1
"""A prevalence whose interval is wider than this is not known from the sample: most labels are rarer."""


@dataclass(frozen=True)
class BandQuality:
    """The labels of a band: on how many `images` they are written, how many answers judge them, and the share right.

    `images` is 0 and `precision` not known without a sample's design.
    """

    images: int
    answers: int
    precision: Estimate


@dataclass(frozen=True)
class Figures:
    """The figures of one label, or of all labels together."""

    accepted: BandQuality
    review: BandQuality
    precision: Estimate
    recall: Estimate
    f1: Estimate
    prevalence: Estimate
    mean_f1: Estimate = UNKNOWN

    @classmethod
    def from_answers(cls, truth: Truth, region: NDArray[np.int64], mine: NDArray[np.bool_]) -> Figures:
        """The figures of the answered images themselves, with the answers' weights, and without intervals."""
        region, right, weight = region[mine], truth.right[mine], truth.weight[mine]
        written = region != NOT_WRITTEN
        found, missed = weight[written & right].sum(), weight[~written & right].sum()
        recall, f1 = _recall_and_f1(float(weight[written].sum()), found, missed)

        def share(which: NDArray[np.bool_]) -> Estimate:
            return Estimate(float(weight[which & right].sum() / weight[which].sum())) if which.any() else UNKNOWN

        accepted, review = region == ACCEPT, region == REVIEW
        return cls(
            BandQuality(0, int(accepted.sum()), share(accepted)),
            BandQuality(0, int(review.sum()), share(review)),
            share(written),
            Estimate(float(recall)),
            Estimate(float(f1)),
            share(np.ones(len(region), bool)),
        )


def estimate_figures(tables: Sequence[CellTable], wrong_answers: float) -> tuple[list[Figures], Figures]:
    """Estimate the figures of each label, and of all labels together with the mean of their F1."""
    found, f1s = [], []
    total = _Draws(*(np.zeros(DRAWS) for _ in range(5)))
    hits = missed = 0.0
    predicted = 0
    for number, table in enumerate(tables):
        above, below = table.join_regions(REVIEW, ACCEPT + 1), table.join_single(NOT_WRITTEN)
        draws = _Draws.of(above, below, wrong_answers, number)
        right, left = above.estimate_right(), below.estimate_right()
        total = total.add(draws)
        hits, missed, predicted = hits + right, missed + left, predicted + above.total
        f1s.append(draws.estimate(above.total, right, left, widest=1.0)[1])
        found.append(
            Figures(
                _judge_band(table.join_single(ACCEPT), wrong_answers),
                _judge_band(table.join_single(REVIEW), wrong_answers),
                estimate_share(above, wrong_answers),
                *draws.estimate(above.total, right, left),
                draws.estimate_share(above.join(below), wrong_answers),
            )
        )
    accepted, review = (
        _judge_band(reduce(Cells.join, [table.join_single(region) for table in tables]), wrong_answers)
        for region in (ACCEPT, REVIEW)
    )
    share = hits / predicted if predicted else math.nan
    precision = make_estimate(share, total.low_above / max(predicted, 1), total.high_above / max(predicted, 1))
    recall, f1 = total.estimate(predicted, hits, missed)
    return found, Figures(accepted, review, precision, recall, f1, UNKNOWN, _average(f1s))


def _judge_band(cells: Cells, wrong_answers: float) -> BandQuality:
    return BandQuality(cells.total, int(cells.drawn.sum()), estimate_share(cells, wrong_answers))


def estimate_recall(above: Cells, below: Cells, wrong_answers: float) -> Estimate:
    """The share of a label's right images that are in the cells `above` a threshold, and not in those `below` it."""
    draws = _Draws.of(above, below, wrong_answers)
    return draws.estimate(above.total, above.estimate_right(), below.estimate_right())[0]


@dataclass(frozen=True)
class _Draws:
    """Draws of the number of right images above and below a threshold, from lower and upper distributions, (DRAWS,).

    `least_below` are upper draws for the same numbers of answers, none of them right. They tell what the sample can say
    at best. Whether a figure is printed depends on this, because it must not depend on how the answers turned out: an
    interval that is narrow by chance covers less often.
    """

    low_above: Doubles
    high_above: Doubles
    low_below: Doubles
    high_below: Doubles
    least_below: Doubles

    @classmethod
    def of(cls, above: Cells, below: Cells, wrong_answers: float, seed: int = 0) -> _Draws:
        melding = Melding(wrong_answers, seed=seed)
        none = Cells(below.size, below.drawn, np.zeros_like(below.right), np.zeros_like(below.unsure))
        return cls(*melding.draw_right(above), *melding.draw_right(below), melding.draw_right(none)[1])

    def add(self, other: _Draws) -> _Draws:
        mine, others = vars(self), vars(other)
        return _Draws(**{name: mine[name] + others[name] for name in mine})

    def estimate(
        self, predicted: float, found: float, missed: float, widest: float = WIDEST
    ) -> tuple[Estimate, Estimate]:
        """Recall and F1, for `predicted` images above the threshold. Not known if the sample cannot tell."""
        low_above, high_above = np.maximum(self.low_above, 0), np.clip(self.high_above, 0, predicted)
        values = _recall_and_f1(predicted, found, missed)
        low = _recall_and_f1(predicted, low_above, self.high_below)
        high = _recall_and_f1(predicted, high_above, np.maximum(self.low_below, 0))
        least = _recall_and_f1(predicted, low_above, self.least_below)
        best = _recall_and_f1(predicted, high_above, np.zeros(1))
        made = [
            make_estimate(float(values[metric]), low[metric], high[metric], widest=1.0)
            if is_telling(least[metric], best[metric], widest)
            else UNKNOWN
            for metric in range(2)
        ]
        return made[0], made[1]

    def estimate_share(self, every: Cells, wrong_answers: float) -> Estimate:
        """The share of right images in all cells."""
        least = (self.high_above + self.least_below) / max(every.total, 1)
        if not is_telling(self.low_above / max(every.total, 1), least, _WIDEST_PREVALENCE):
            return UNKNOWN
        return estimate_share(every, wrong_answers, widest=1.0)


def _average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of the values, between the means of the lower and of the upper ends. Unknown if one of them is.

    For independent samples this covers at least as often as the intervals do, because their errors even out.
    """
    if not estimates or not all(one.known for one in estimates):
        return UNKNOWN
    value, low, high = (float(np.mean([getattr(one, end) for one in estimates])) for end in ("value", "low", "high"))
    return Estimate(value, low, high) if high - low <= WIDEST else UNKNOWN


def _recall_and_f1(predicted: float, found: Any, missed: Any) -> tuple[Any, Any]:
    """Recall and F1 from the number of predicted images and of found and missed right ones: numbers or draws."""
    with np.errstate(invalid="ignore", divide="ignore"):
        positives = np.asarray(found + missed, np.float64)
        return found / positives, 2 * found / (predicted + positives)
