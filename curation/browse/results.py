"""The images that a query of the page finds, in their order, with what is said about them."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.browse.query import BrowseQuery, Embedder
from curation.browse.snapshot import Snapshot
from curation.search.cutoff import LogitCounts, find_training_share
from curation.search.folding import fold_embeddings
from curation.search.query import Terms
from curation.search.ranking import Order, Ranking, sum_moments
from curation.search.search import compare
from curation.tagged_output import read_embeddings
from curation.where import Where
from siglip.heads import LinearHead
from siglip.scoring import Floats, sigmoid
from storage.settings import ConfigError

BINS = 24
"""Bins of the histogram of a label's scores."""
_SHOWN = ("key", "labels", "width", "height")
FIRST = 2000
"""The images that are put in order first: the page seldom shows more. Near-duplicates are folded among these."""
_THREADS = min(16, os.cpu_count() or 1)
_KEPT_RESULTS, _KEPT_CONDITIONS = 8, 8


@dataclass(frozen=True)
class Found:
    """The images of a query, K of N rows.

    `positions`, int64 (K,), are in no order: use `Result.slice`. `values`, float32 (K, C), are the columns of
    `compare`, and `keys`, float64 (K,), order them, the highest first. `searched` rows satisfy the conditions;
    `left_out` of them show something unwanted. `cutoff` is the score where relevant images end, `best` the highest
    score of a text; both are None without a text, and `cutoff` also if none is wanted. `histograms` has the scores of
    each label among the conditions, int64 (BINS,) from 0 to 1, without the condition on this score.
    """

    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    keys: NDArray[np.float64]
    searched: int
    left_out: int
    cutoff: float | None
    best: float | None
    label_counts: NDArray[np.int64]
    unlabelled: int
    histograms: dict[str, list[int]]


class Result:
    """A query's result, which the page reads in parts. Threads may share it.

    The first images are in order at once, and all of them when the page goes further.
    """

    def __init__(self, name: str, snapshot: Snapshot, terms: Terms, found: Found, *, fold: bool) -> None:
        self.name, self.snapshot, self.terms, self.found = name, snapshot, terms, found
        self._lock = threading.Lock()
        self._places = _find_first(found, FIRST)
        self._copies = np.zeros(len(self._places), np.int64)
        self._folded = 0
        if fold and len(self._places):
            self._fold()
        self.count = len(found.positions) - self._folded
        """The number of images, where near-duplicates that are folded into one are one."""

    def slice(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Return the images from `start` to `stop`: positions, similarities, and the number of copies of each."""
        with self._lock:
            if stop > len(self._places) and len(self._places) < self.count:
                self._places = np.concatenate([self._places, self._find_rest()])
            places = self._places[start:stop]
            copies = np.zeros(len(places), np.int64)
            known = self._copies[start:stop]
            copies[: len(known)] = known
            return self.found.positions[places], self.found.values[places], copies

    def all_positions(self) -> NDArray[np.int64]:
        """Return the positions of all images in their order, int64 (K,)."""
        return self.slice(0, max(1, self.count))[0]

    def _fold(self) -> None:
        rows = self.snapshot.take(self.found.positions[self._places], ["embedding"])
        kept, self._copies = fold_embeddings(read_embeddings(rows), len(self._places))
        self._folded = len(self._places) - len(kept)
        self._places = self._places[kept]

    def _find_rest(self) -> NDArray[np.int64]:
        """Return the places of the images that are behind the first ones, in their order."""
        ordered = _sort(self.found, np.arange(len(self.found.positions)))
        return ordered[len(self._places) + self._folded :]


def _find_first(found: Found, count: int) -> NDArray[np.int64]:
    """Return the places of the first `count` images, in their order. It is the order of all, to the ties."""
    keys = found.keys
    if len(keys) <= count:
        return _sort(found, np.arange(len(keys)))
    limit = np.partition(keys, len(keys) - count)[len(keys) - count]
    above = np.flatnonzero(keys > limit)
    equal = np.flatnonzero(keys == limit)
    equal = equal[np.argsort(found.positions[equal], kind="stable")][: count - len(above)]
    return np.concatenate([_sort(found, above), equal])


def _sort(found: Found, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort places by their keys, the highest first. Equally good images are in the order of the output."""
    return places[np.lexsort((found.positions[places], -found.keys[places]))]


class Searcher:
    """Answers the page's queries, one after the other. Threads may share it."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._lock = threading.Lock()
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._conditions: OrderedDict[tuple[str, int], NDArray[np.bool_]] = OrderedDict()
        self._count = 0

    def search(self, query: BrowseQuery, snapshot: Snapshot) -> tuple[Result, float]:
        """Answer a query, and return its result and the seconds that it took.

        The result is exact: every row of the snapshot is compared. Memory holds 8 bytes for each row and each text or
        example, and about 20 for each image that is found. Raises `ConfigError`, in one line, for a query that is not
        possible.
        """
        begun = time.perf_counter()
        terms = self._embedder.make_terms(query, snapshot)
        with self._lock:
            found = self._find(query, terms, snapshot)
            self._count += 1
            result = Result(str(self._count), snapshot, terms, found, fold=query.fold)
            self._results[result.name] = result
            while len(self._results) > _KEPT_RESULTS:
                self._results.popitem(last=False)
        return result, time.perf_counter() - begun

    def get(self, name: str) -> Result | None:
        """Return a result by its name, or None if it is no longer there."""
        with self._lock:
            if name in self._results:
                self._results.move_to_end(name)
            return self._results.get(name)

    def _find(self, query: BrowseQuery, terms: Terms, snapshot: Snapshot) -> Found:
        values, scores = _compare(query, terms, snapshot)
        searched = self._check_conditions(query, snapshot)
        histograms = {}
        for place, condition in enumerate(query.labels):
            bins = np.minimum((scores[searched, place] * BINS).astype(np.int64), BINS - 1)
            histograms[condition.label] = np.bincount(bins, minlength=BINS).tolist()
            if condition.min is None:
                searched = searched & snapshot.find(condition.label)
            else:
                searched = searched & (scores[:, place] >= condition.min)
        kept, left_out, ranking, best = self._limit(query, terms, values, searched, snapshot)
        positions = np.flatnonzero(kept)
        if query.order == "best" and ranking is not None:
            keys = ranking.order(values[positions])
        elif query.order == "best" and query.labels:
            keys = scores[positions, 0].astype(np.float64)
        else:
            keys = positions.astype(np.float64) * (1 if query.order == "last" else -1)
        label_counts, unlabelled = snapshot.count_labels(kept)
        cutoff = None if ranking is None else ranking.cutoff
        return Found(
            positions,
            values[positions],
            keys,
            int(searched.sum()),
            left_out,
            None if cutoff is None else _to_score(cutoff),
            None if best is None else _to_score(best),
            label_counts,
            unlabelled,
            histograms,
        )

    def _limit(
        self,
        query: BrowseQuery,
        terms: Terms,
        values: NDArray[np.float32],
        searched: NDArray[np.bool_],
        snapshot: Snapshot,
    ) -> tuple[NDArray[np.bool_], int, Ranking | None, float | None]:
        """Leave out what is unwanted or not relevant.

        Returns the rows that stay, the number of those left out, the ranking, and the highest logit of a wanted text.
        """
        if not values.shape[1]:
            return searched, 0, None, None
        inside = values[searched]
        example = {int(terms.wanted > 0)} if terms.example is not None else set()
        counts = {column: LogitCounts() for column in range(values.shape[1]) if column not in example}
        for column, one in counts.items():
            one.add(inside[:, column])
        order = Order.estimate(*sum_moments(inside[:, : terms.ordering]))
        share = find_training_share(snapshot.output.model)
        ranking = Ranking.make(terms, counts, order, share, cut=query.cutoff == "auto")
        unwanted = searched & ranking.find_unwanted(values)
        kept = searched & ~unwanted
        if ranking.cutoff is not None:
            kept &= ranking.find_relevant(values)
        kept[list(terms.shown)] = False
        best = counts[0].best if terms.wanted and len(inside) else None
        # Only with unwanted texts, the images keep the order of the output.
        return kept, int(unwanted.sum()), ranking if terms.ordering else None, best

    def _check_conditions(self, query: BrowseQuery, snapshot: Snapshot) -> NDArray[np.bool_]:
        """Tell which rows satisfy the conditions that need no embeddings, bool (N,)."""
        rows = snapshot.live
        if query.where.strip():
            rows = rows & self._check_where(query.where, snapshot)
        if query.unlabelled:
            rows = rows & (np.diff(snapshot.labels.starts) == 0)
        return rows

    def _check_where(self, sql: str, snapshot: Snapshot) -> NDArray[np.bool_]:
        key = (sql, snapshot.version)
        if key not in self._conditions:
            where = Where(sql, snapshot.output)
            parts = [where.keep(snapshot.read(number, where.columns)) for number in range(len(snapshot.batches))]
            self._conditions[key] = np.concatenate(parts) if parts else np.zeros(0, np.bool_)
            while len(self._conditions) > _KEPT_CONDITIONS:
                self._conditions.popitem(last=False)
        self._conditions.move_to_end(key)
        return self._conditions[key]


def _compare(query: BrowseQuery, terms: Terms, snapshot: Snapshot) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return for each row the columns of `compare`, float32 (N, C), and the scores of the labels asked for, (N, K)."""
    names = snapshot.output.labels.label_names()
    for one in query.labels:
        if one.label not in names:
            raise ConfigError(f"the output has no label {one.label!r}: search for it as a text")
    labels = [names.index(one.label) for one in query.labels]
    columns = int(terms.wanted > 0) + (terms.example is not None) + len(terms.head.gain) - terms.wanted
    values = np.zeros((snapshot.rows, columns), np.float32)
    scores = np.zeros((snapshot.rows, len(labels)), np.float32)
    if not columns and not labels:
        return values, scores
    head, places = _narrow(snapshot.output.head, labels)

    def fill(part: tuple[int, Floats]) -> None:
        start, embeddings = part
        if columns:
            values[start : start + len(embeddings)] = compare(embeddings, terms)
        if labels:
            scores[start : start + len(embeddings)] = head.scores(embeddings)[:, places]

    # One row after the other is a product of its own, so that BLAS uses one core, and rows do not depend on threads.
    with ThreadPoolExecutor(_THREADS) as threads:
        deque(threads.map(fill, snapshot.embeddings()), maxlen=0)
    return values, scores


def _narrow(head: LinearHead, labels: Sequence[int]) -> tuple[LinearHead, list[int]]:
    """Return a head of some labels, with all of their groups, and the place of each label in it."""
    groups = [group for group in head.groups if set(group) & set(labels)]
    rows = list(dict.fromkeys([*labels, *(row for group in groups for row in group)]))
    place = {row: number for number, row in enumerate(rows)}
    narrow = LinearHead(
        head.vectors[rows],
        head.gain[rows],
        head.offset[rows],
        tuple(tuple(place[row] for row in group) for group in groups),
    )
    return narrow, [place[row] for row in labels]


def _to_score(logit: float) -> float:
    return float(sigmoid(np.asarray(logit, np.float32)))


def describe_rows(result: Result, start: int, stop: int) -> list[dict[str, Any]]:
    """Return what the page shows of the images from `start` to `stop` of a result."""
    positions, values, copies = result.slice(start, stop)
    rows: list[dict[str, Any]] = result.snapshot.take(positions, _SHOWN).to_pylist()
    texts = int(result.terms.wanted > 0)
    for index, row in enumerate(rows):
        row["position"], row["copies"] = int(positions[index]), int(copies[index])
        row["score"] = float(sigmoid(values[index, :1])[0]) if texts else None
        row["similarity"] = float(values[index, texts]) if result.terms.example is not None else None
        row["labels"] = row["labels"] or []
    return rows
