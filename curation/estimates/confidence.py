"""Confidence bounds of counts in a finite population, from simple random samples of its cells.

A *cell* is a part of the population that was sampled by itself: `size` images, of which `drawn` were drawn at random
without replacement and looked at, and `right` of these were right.

One cell has exact bounds: those of Clopper and Pearson (1934), with the hypergeometric distribution instead of the
binomial one. Several cells are combined as melded confidence intervals (Fay, Proschan and Brittain 2015, Biometrics
71): the quantiles of a function of random draws, one for each cell, from the cell's lower or upper confidence
distribution. The function must rise or fall with the count of each cell. For one cell, melding gives the exact bounds
again.

The confidence distributions are exact. The number of right images in a population of `size` is at most k with the same
probability with which the (right + 1)-th smallest of `drawn` random ranks exceeds k. Such a rank has a negative
hypergeometric distribution, which is `right` plus a beta-binomial one.

People answer some questions wrongly: at most a share `e` of them, at random. If a share q of all images would get the
answer "right", the share of right images is between (q - e) / (1 - e) and q / (1 - e). Among the answers that were
given there may be more wrong ones, by chance: a binomial number of them. All bounds are widened by this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]

LEVEL = 0.95
"""The confidence level of all printed intervals: each bound fails in at most 2.5 % of samples."""
ONE_SIDED = 0.05
"""The share of samples in which a printed lower bound, as in "at least 0.90 (95 %)", may fail."""
WRONG_ANSWERS = 0.02
"""The share of wrong answers that the bounds allow for unless another one is given."""
WIDEST = 0.5
"""A share whose interval is wider than this is "not known from this sample"."""
FEWEST_ANSWERS, FEWEST_IMAGES = 20, 5
"""A threshold is not chosen with fewer answers above it than the first, unless all images above it are answered, and
these are at least as many as the second."""
_LARGE_PART = 0.05
"""Of a cell with a larger part looked at, the number of wrong answers that were given in fact matters."""
DRAWS = 5_000
"""Random draws for a melded interval: its ends then fail in 2.5 +- 0.2 % of samples."""
_SEED = 20_150_101


@dataclass(frozen=True)
class Estimate:
    """A share between 0 and 1 with its 95 % interval. NaN where it is not defined, or not known from the sample.

    `low` and `high` are NaN for a figure that has no interval: one of answers that are not a sample, or that are about
    all images.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def __str__(self) -> str:
        if not self.known:
            return "-"
        if math.isnan(self.low):
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({_floor(self.low)} to {_ceil(self.high)})"


UNKNOWN = Estimate(math.nan)


@dataclass(frozen=True)
class Cells:
    """C cells of one population. All arrays are int64 (C,).

    `unsure` of the `drawn` images have an answer that says neither right nor wrong. The lower bounds count them as
    wrong, the upper bounds as right, and the values leave them out.
    """

    size: Counts
    drawn: Counts
    right: Counts
    unsure: Counts

    @property
    def total(self) -> int:
        """The number of images in all cells."""
        return int(self.size.sum())

    def pick(self, which: NDArray[np.bool_]) -> Cells:
        """The cells for which `which` (C,) is True."""
        return Cells(self.size[which], self.drawn[which], self.right[which], self.unsure[which])

    def join(self, other: Cells) -> Cells:
        """These cells and those of another label or region."""
        mine, others = vars(self), vars(other)
        return Cells(**{name: np.concatenate([mine[name], others[name]]) for name in mine})

    def estimate_right(self) -> float:
        """The estimated number of right images. NaN if a cell that has images has no answer but unsure ones."""
        sure = self.drawn - self.unsure
        if ((self.size > 0) & (sure == 0)).any():
            return math.nan
        return float((self.size * self.right / np.maximum(sure, 1)).sum())


def bound_share_below(size: int, drawn: int, right: int, wrong_answers: float, alpha: float) -> float:
    """The exact lower bound of the share of right images in one cell. It fails in at most `alpha` of samples."""
    if drawn == 0 or right == 0:
        return 0.0
    least = _find_count(size, lambda counts: np.asarray(_tail(size, counts, drawn, right) > alpha, bool))
    return float(_allow_below(least / size, wrong_answers))


def bound_share_above(size: int, drawn: int, right: int, wrong_answers: float, alpha: float) -> float:
    """The exact upper bound of the share of right images in one cell: the lower bound of the others, from 1."""
    wrong = bound_share_below(size, drawn, drawn - right, 0.0, alpha)
    return float(_allow_above(1 - wrong, wrong_answers))


def reaches(size: Counts, drawn: Counts, right: Counts, share: float, alpha: float) -> NDArray[np.bool_]:
    """Whether each cell's lower bound, without wrong answers, reaches `share`. Arrays are int64 (C,). Cheap."""
    from scipy.stats import hypergeom

    below = np.maximum(np.ceil(share * size - 1e-9).astype(np.int64) - 1, 0)  # the largest count under the share
    tail = hypergeom.sf(right - 1, size, below, drawn)
    return np.asarray((drawn > 0) & (right > 0) & (tail <= alpha), bool)


def is_enough(size: Counts, drawn: Counts) -> NDArray[np.bool_]:
    """Whether a threshold may rest on `drawn` of `size` images: see `FEWEST_ANSWERS`."""
    return np.asarray((drawn >= FEWEST_ANSWERS) | ((drawn == size) & (size >= FEWEST_IMAGES)), bool)


def target_of_answers(share: float, wrong_answers: float) -> float:
    """The share of right answers that shows a share of right images, whichever the wrong answers are."""
    return share + wrong_answers * (1 - share)


class Melding:
    """Draws from the confidence distributions of cells. One object gives the same draws for the same cells.

    Without `noisy`, the number of wrong answers among those that were given is taken as the expected one.
    """

    def __init__(
        self, wrong_answers: float = WRONG_ANSWERS, draws: int = DRAWS, seed: int = 0, *, noisy: bool = True
    ) -> None:
        self._wrong_answers = wrong_answers
        self._noisy = noisy
        self.draws = draws
        self._random = np.random.default_rng([_SEED, seed])

    def draw_right(self, cells: Cells) -> tuple[Doubles, Doubles]:
        """Draw the number of right images of all cells together: from the lower and the upper distributions, (draws,).

        The allowance for wrong answers may make single draws negative, or larger than the number of images. They are
        not cut off here: the mean of numbers that are cut off at 0 is too large, and draws are added up. Cut off the
        result.
        """
        low, high = np.zeros(self.draws), np.zeros(self.draws)
        for size, drawn, right, unsure in zip(cells.size, cells.drawn, cells.right, cells.unsure, strict=True):
            looked_at = drawn if self._noisy else 0
            mistakes = self._random.binomial(looked_at, self._wrong_answers, self.draws)
            least, most = (right, right + unsure) if self._noisy else (0, 0)
            below, above = self._draw(size, drawn, right, 0), self._draw(size, drawn, right + unsure, 1)
            false = self._wrong_answers * (size - looked_at)
            low += least - mistakes + (below - least - false) / (1 - self._wrong_answers)
            high += most + mistakes + (above - most) / (1 - self._wrong_answers)
        return low, high

    def _draw(self, size: int, drawn: int, right: int, more: int) -> Doubles:
        """Draw from the lower (`more` 0) or upper (`more` 1) confidence distribution of a cell's count."""
        first, second = right + more, drawn - right + 1 - more
        if first == 0:
            return np.zeros(self.draws)
        if second == 0:
            return np.full(self.draws, float(size))
        share = self._random.beta(first, second, self.draws)
        return np.asarray(right + self._random.binomial(size - drawn, share), np.float64)


def make_estimate(value: float, low: Doubles | float, high: Doubles | float, widest: float = WIDEST) -> Estimate:
    """Make an estimate from a value and draws of its lower and upper bound. Not known when the interval is too wide."""
    bottom, top = _find_ends(low, high)
    if math.isnan(value) or math.isnan(bottom) or math.isnan(top) or top - bottom > widest:
        return UNKNOWN
    return Estimate(value, min(bottom, value), max(top, value))


def is_telling(low: Doubles, high: Doubles, widest: float = WIDEST) -> bool:
    """Whether the interval of draws of a lower and an upper bound is at most as wide as `widest`."""
    bottom, top = _find_ends(low, high)
    return top - bottom <= widest


def estimate_share(cells: Cells, wrong_answers: float = WRONG_ANSWERS, widest: float = WIDEST) -> Estimate:
    """The share of right images in the cells together. Exact bounds if only one cell is not fully known."""
    if cells.total == 0:
        return UNKNOWN
    value = cells.estimate_right() / cells.total
    open_ = cells.drawn - cells.unsure < cells.size
    if open_.sum() > 1 or _has_noise(cells, wrong_answers):
        low, high = Melding(wrong_answers).draw_right(cells)
        return make_estimate(value, low / cells.total, high / cells.total, widest)
    alpha = (1 - LEVEL) / 2
    low_right = high_right = 0.0
    for size, drawn, right, unsure in zip(cells.size, cells.drawn, cells.right, cells.unsure, strict=True):
        if size:
            numbers = int(size), int(drawn)
            low_right += size * bound_share_below(*numbers, int(right), wrong_answers, alpha)
            high_right += size * bound_share_above(*numbers, int(right + unsure), wrong_answers, alpha)
    return make_estimate(value, low_right / cells.total, high_right / cells.total, widest)


def bound_precision(cells: Cells, wrong_answers: float, alpha: float, *, noisy: bool = True) -> float:
    """The lower bound of the share of right images in the cells together, which fails in at most `alpha` of samples.

    Without `noisy`, see `Melding`.
    """
    if cells.total == 0:
        return 0.0
    cells = cells.pick(cells.size > 0)
    if len(cells.size) == 1 and not (noisy and _has_noise(cells, wrong_answers)):
        [size], [drawn], [right] = cells.size, cells.drawn, cells.right
        return bound_share_below(int(size), int(drawn), int(right), wrong_answers, alpha)
    low, _ = Melding(wrong_answers, noisy=noisy).draw_right(cells)
    return max(0.0, float(np.quantile(low, alpha))) / cells.total


def _find_ends(low: Doubles | float, high: Doubles | float) -> tuple[float, float]:
    """The ends of the interval of draws of a lower and an upper bound of a share."""
    alpha = (1 - LEVEL) / 2
    return max(0.0, float(np.quantile(low, alpha))), min(1.0, float(np.quantile(high, 1 - alpha)))


def _has_noise(cells: Cells, wrong_answers: float) -> bool:
    """Whether so large a part of a cell was looked at that chance among the wrong answers matters."""
    return wrong_answers > 0 and bool((cells.drawn > _LARGE_PART * cells.size).any())


def _find_count(size: int, passes: Callable[[Counts], NDArray[np.bool_]]) -> int:
    """The smallest count from 0 to `size` that `passes`, which is False up to some count and then True."""
    low, high = 0, size
    while low < high:
        steps = np.unique(np.linspace(low, high - 1, 33).astype(np.int64))
        passed = passes(steps)
        first = int(np.argmax(passed)) if passed.any() else len(steps)
        high = int(steps[first]) if first < len(steps) else high
        low = int(steps[first - 1]) + 1 if first else low
    return low


def _tail(size: int, counts: Counts, drawn: int, right: int) -> Doubles:
    """The probability of at least `right` right images among `drawn`, for populations with `counts` right images."""
    from scipy.stats import hypergeom

    return np.asarray(hypergeom.sf(right - 1, size, counts, drawn), np.float64)


def _allow_below(share: Doubles | float, wrong_answers: float) -> Any:
    return np.maximum(0.0, (share - wrong_answers) / (1 - wrong_answers))


def _allow_above(share: Doubles | float, wrong_answers: float) -> Any:
    return np.minimum(1.0, share / (1 - wrong_answers))


def _floor(share: float) -> str:
    return f"{math.floor(share * 100 + 1e-9) / 100:.2f}"


def _ceil(share: float) -> str:
    return f"{math.ceil(share * 100 - 1e-9) / 100:.2f}"
