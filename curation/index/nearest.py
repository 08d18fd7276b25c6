"""The nearest rows of a query, from an index and from rows that it does not have, and what is known of all others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.search.cutoff import LogitCounts
from curation.search.query import Terms
from curation.search.ranking import Order, Ranking, sum_moments
from siglip.scoring import Floats


@dataclass(frozen=True)
class NearRows:
    """Rows, int64 (K,), of shards, with their embeddings, float32 (K, D), and the columns of `compare`, (K, C)."""

    shards: NDArray[np.int64]
    rows: NDArray[np.int64]
    embeddings: Floats
    similarities: NDArray[np.float32]

    @classmethod
    def empty(cls, width: int, columns: int) -> NearRows:
        """Return no rows."""
        none = np.zeros(0, np.int64)
        return cls(none, none, np.zeros((0, width), np.float32), np.zeros((0, columns), np.float32))

    def add(self, other: NearRows) -> NearRows:
        """Return these rows and others, each once, in the order of their shards."""
        shards, rows = np.concatenate([self.shards, other.shards]), np.concatenate([self.rows, other.rows])
        _, first = np.unique(np.stack([shards, rows]), axis=1, return_index=True)
        embeddings = np.concatenate([self.embeddings, other.embeddings])
        similarities = np.concatenate([self.similarities, other.similarities])
        return NearRows(shards[first], rows[first], embeddings[first], similarities[first])

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> NearRows:
        """Return some of these rows."""
        return NearRows(self.shards[places], self.rows[places], self.embeddings[places], self.similarities[places])


class Nearest:
    """The rows of a query that rank above all others, and counts of the logits of all rows.

    After `rank`, `rows` are in their order, best first; `kept` says which are results, bool (K,), `more` that there are
    more rows than these, and `within` that some of the others may be results.
    """

    def __init__(
        self,
        rows: NearRows,
        limits: NDArray[np.float32],
        sample: NDArray[np.float32],
        counts: dict[int, LogitCounts],
        matching: int,
        most: int,
    ) -> None:
        """Begin with the rows that an index finds of `matching` rows.

        `limits`, float32 (ordering,), are the highest similarities of the rows that it has not found. `sample` are the
        columns of `compare` of a sample of all rows, float32 (S, C). `counts` has the logits of each column that has
        some. Memory holds up to `most` rows besides those found.
        """
        self.rows = rows
        self.counts = counts
        self.searched = matching
        self._limits = limits
        self._most = len(rows.rows) + most
        self._order = Order.estimate(*sum_moments(sample[:, : len(limits)]))
        self._bound = float(self._order(limits[None])[0])
        self._relevant = 0
        self.kept = np.zeros(0, np.bool_)
        self.more = self.within = False
        self.ranking: Ranking

    def add(self, rows: NearRows) -> None:
        """Add rows that the index does not have."""
        for column, counted in self.counts.items():
            counted.add(rows.similarities[:, column])
        self.searched += len(rows.rows)
        self.rows = self.rows.add(rows)
        if len(self.rows.rows) > self._most:
            order = self._order(self.rows.similarities)
            places = np.argsort(-order, kind="stable")
            self._bound = max(self._bound, float(order[places[self._most]]))
            dropped = self.rows.similarities[places[self._most :], : len(self._limits)]
            self._limits = np.maximum(self._limits, dropped.max(axis=0))
            self.rows = self.rows.take(np.sort(places[: self._most]))

    def rank(self, terms: Terms, training_share: float, *, cut: bool) -> None:
        """Order the rows, and find which are results. With `cut`, rows that are not relevant to the texts are none."""
        self.ranking = Ranking.make(terms, self.counts, self._order, training_share, cut=cut)
        cutoff = self.ranking.cutoff
        self.within = cutoff is None or float(self._limits[0]) > cutoff
        order = self._order(self.rows.similarities)
        if self.within:  # others may rank above those that are not certain
            certain = order >= self._bound
            self.rows, order = self.rows.take(certain), order[certain]
        best = np.lexsort((self.rows.rows, self.rows.shards, -order))
        self.rows = self.rows.take(best)
        self.more = len(best) < self.searched
        relevant = self.ranking.find_relevant(self.rows.similarities)
        self._relevant = int(relevant.sum())
        self.kept = relevant & ~self.ranking.find_unwanted(self.rows.similarities)

    def may_lack(self, wanted: int) -> bool:
        """Tell whether there may be results among the rows that were not looked at, and fewer than wanted are here."""
        return self.more and self.within and int(self.kept.sum()) < wanted

    def count_relevant(self) -> int:
        """Return how many rows are within the cut-off and not left out: counted, or an estimate."""
        kept, cutoff = int(self.kept.sum()), self.ranking.cutoff
        if not (self.more and self.within) or cutoff is None:
            return kept
        share = kept / self._relevant if self._relevant else 1.0
        return max(kept, round(self.counts[0].count_above(cutoff) * share))

    def count_left_out(self) -> int:
        """Return about how many rows show something unwanted."""
        return min(
            self.searched,
            round(sum(self.counts[column].count_above(one) for column, one in self.ranking.limits.items())),
        )


def count_logits(found: NDArray[np.float32], limit: float, sample: NDArray[np.float32], rows: int) -> LogitCounts:
    """Count the logits of `rows` rows: those found, from `limit` on, and below it as a sample of the rows has them."""
    counts = LogitCounts()
    counts.add(found[found >= limit])
    left = rows - int((found >= limit).sum())
    if left > 0 and len(rest := sample[sample < limit]):
        counts.add(rest, left / len(rest))
    return counts
