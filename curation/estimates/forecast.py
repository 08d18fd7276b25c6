"""Forecast: about how many more answers would show a precision, and about which images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curation.estimates.cells import CellTable
from curation.estimates.confidence import Doubles, is_enough, reaches, target_of_answers
from siglip.scoring import Floats

MOST_ANSWERS = 5_000
"""More answers than this are not forecast: the precision is then too close to the target."""
PRIOR_ANSWERS = 10.0
"""The number of answers that the fitted probability of the images above a threshold counts for, beside the answers."""


@dataclass(frozen=True)
class Forecast:
    """About `more` answers, about images drawn at random from those that reach threshold number `threshold`.

    With so many, the target is reached in about half of the cases.
    """

    more: int
    threshold: int


def forecast_answers(
    table: CellTable,
    thresholds: Floats,
    target: float,
    wrong_answers: float,
    alpha: float,
    at_most: int = MOST_ANSWERS,
) -> Forecast | None:
    """Forecast what it takes to show a precision of `target` for a label.

    The threshold is meant that accepts the most images for each further answer. The one that needs the fewest answers
    would often be so high that only five or ten images reach it, because looking at all of these shows any precision.

    `thresholds` (T,) are the scores between the table's regions, on the scale of probabilities. The share of right
    images above a threshold is taken from its answers, and from the probabilities, which count as `PRIOR_ANSWERS`
    answers. `alpha` is the share of samples in which the bound of the next round may fail. Returns None if no threshold
    can be shown with `at_most` answers.
    """
    share = target_of_answers(target, wrong_answers)
    expected = _expect_precision(table, thresholds)
    steps = np.unique(np.round(np.geomspace(1, at_most, 160)).astype(np.int64))
    found: list[tuple[float, Forecast]] = []
    last = table.size.shape[1]
    for region in range(1, last):
        cells = table.join_regions(region, last)
        if len(cells.size) == 1:
            drawn, right = int(cells.drawn[0]), int(cells.right[0])
        else:
            drawn = right = 0  # the answers of several cells do not add up: count only new ones
        prior = PRIOR_ANSWERS * expected[region - 1]
        precision = (right + prior) / (drawn + PRIOR_ANSWERS)
        more = np.unique(np.append(steps[steps <= cells.total - drawn], min(cells.total - drawn, at_most)))
        more = more[(more > 0) & is_enough(np.full(len(more), cells.total), drawn + more)]
        if precision <= share or not len(more):
            continue
        sizes = np.full(len(more), cells.total)
        shown = reaches(sizes, drawn + more, right + np.round(more * precision).astype(np.int64), share, alpha)
        if shown.any():
            needed = int(more[np.argmax(shown)])
            found.append((cells.total / needed, Forecast(needed, region - 1)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _expect_precision(table: CellTable, thresholds: Floats) -> Doubles:
    """The mean probability of the images that reach each threshold, float64 (T,)."""
    edges = np.append(thresholds, 1.0).astype(np.float64)
    middle = (edges[:-1] + edges[1:]) / 2
    sizes = table.size.sum(axis=0)[1:].astype(np.float64)
    above = np.cumsum(sizes[::-1])[::-1]
    return np.asarray(np.cumsum((sizes * middle)[::-1])[::-1] / np.maximum(above, 1), np.float64)
