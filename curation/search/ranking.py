"""What a query leaves out, and the order of the rest: from the similarities of all rows that are searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.search.cutoff import LogitCounts
from curation.search.query import Terms


@dataclass(frozen=True)
class Ranking:
    """The limits of a query, and how its rows are ordered.

    The columns of similarities are those of `curation.search.search.compare`: first those that order rows, of which
    there are `ordering`, and then the logits of unwanted texts. `cutoff` is the logit above which a row is relevant,
    None without a text or if no cut-off is wanted. `limits` has for the column of each unwanted text the logit above
    which a row is left out. `mean` and `deviation` are float64 (ordering,).
    """

    ordering: int
    cutoff: float | None
    limits: Mapping[int, float]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def make(
        cls,
        terms: Terms,
        counts: Mapping[int, LogitCounts],
        moments: NDArray[np.float64],
        searched: int,
        training_share: float,
        *,
        cut: bool,
    ) -> Ranking:
        """Make the ranking from what was counted in the rows that are searched.

        `counts` has the logits of each column that has logits. `moments`, float64 (2, C), are the sums of each column
        and of its squares. With `cut`, rows that are not relevant to the texts are left out.
        """
        texts = int(terms.wanted > 0)
        ordering = texts + (terms.example is not None)
        limits = {column: one.find_cutoff(training_share) for column, one in counts.items() if column >= ordering}
        cutoff = counts[0].find_cutoff(training_share) if texts and cut else None
        mean = moments[0, :ordering] / max(1, searched)
        variance = moments[1, :ordering] / max(1, searched) - mean**2
        return cls(ordering, cutoff, limits, mean, np.sqrt(np.maximum(variance, 1e-12)))

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

    def order(self, similarities: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the number that orders each row, float64 (N,): the highest is the best.

        It is the similarity, or the lower of two, each in standard deviations above the mean of the rows searched.
        """
        ordered = similarities[:, : self.ordering].astype(np.float64)
        if self.ordering > 1:
            ordered = (ordered - self.mean) / self.deviation
        return np.asarray(ordered.min(axis=1))
