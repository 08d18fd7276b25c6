"""What a query leaves out, and the order of the rest: from the similarities of all rows that are searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.search.cutoff import LogitCounts
from curation.search.query import Terms


@dataclass(frozen=True)
class Order:
    """How rows are ordered: by one similarity, or by the lower of two, each in standard deviations above its mean.

    `mean` and `deviation` are float64 (O,), of the rows that are searched.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def estimate(cls, moments: NDArray[np.float64], rows: int) -> Order:
        """Make the order from the sums of the similarities of some rows and of their squares, float64 (2, O)."""
        mean, squares = moments / max(1, rows)
        return cls(mean, np.sqrt(np.maximum(squares - mean**2, 1e-12)))

    def __call__(self, similarities: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the number that orders each row, float64 (N,): the highest is the best.

        The first O columns of the similarities, float32 (N, C), are those that order.
        """
        ordered = similarities[:, : len(self.mean)].astype(np.float64)
        if len(self.mean) > 1:
            ordered = (ordered - self.mean) / self.deviation
        return np.asarray(ordered.min(axis=1))


def sum_moments(similarities: NDArray[np.float32]) -> tuple[NDArray[np.float64], int]:
    """Return the sums of similarities, float32 (N, C), and of their squares, float64 (2, C), and N."""
    squares = np.square(similarities, dtype=np.float64)
    return np.stack([similarities.sum(axis=0, dtype=np.float64), squares.sum(axis=0)]), len(similarities)


@dataclass(frozen=True)
class Ranking:
    """The limits of a query, and how its rows are ordered.

    The columns of similarities are those of `curation.search.search.compare`: first those that order rows, and then the
    logits of unwanted texts. `cutoff` is the logit above which a row is relevant, None without a text or if no cut-off
    is wanted. `limits` has for the column of each unwanted text the logit above which a row is left out.
    """

    order: Order
    cutoff: float | None
    limits: Mapping[int, float]

    @classmethod
    def make(
        cls,
        terms: Terms,
        counts: Mapping[int, LogitCounts],
        order: Order,
        training_share: float,
        *,
        cut: bool,
    ) -> Ranking:
        """Make the ranking from the order, and from what was counted in the rows that are searched.

        `counts` has the logits of each column that has logits. With `cut`, rows that are not relevant to the texts are
        left out.
        """
        unwanted = {column: one for column, one in counts.items() if column >= terms.ordering}
        limits = {column: one.find_cutoff(training_share) for column, one in unwanted.items()}
        return cls(order, counts[0].find_cutoff(training_share) if terms.wanted and cut else None, limits)

    def find_unwanted(self, similarities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Tell for rows with these similarities, float32 (N, C), whether they show something unwanted, bool (N,).

        False for rows that are not searched, whose similarities are NaN.
        """
        unwanted = np.zeros(len(similarities), np.bool_)
        with np.errstate(invalid="ignore"):
            for column, limit in self.limits.items():
                unwanted |= similarities[:, column] > limit
        return unwanted

    def find_relevant(self, similarities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Tell whether rows are within the cut-off, bool (N,). Without a cut-off, all are that are searched."""
        with np.errstate(invalid="ignore"):
            return np.asarray(similarities[:, 0] > (-np.inf if self.cutoff is None else self.cutoff), np.bool_)
