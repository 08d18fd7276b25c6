"""Cells of close embeddings, so that not all pairs of images are compared: k-means, fitted on a sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from curation.dedup.mapped import Stored
from siglip.scoring import Floats

CELL_ROWS, NEAREST = 1024, 4
"""Rows for each cell, on average, and how many cells each row is in.

Two rows are compared if they share a cell. Many small cells for each row find more than few large ones of the same
cost: with a thousand cells, 96 % of the pairs of random vectors with a cosine of 0.9 share one of four cells; of two
cells of four times as many rows, 78 % share one."""
MOST_ROWS = 12_288
"""Cells with more rows are split again: their similarities would take over 600 MB."""
_SAMPLE_PER_CELL, _MOST_SAMPLE = 64, 1 << 18
_REGIONS = 32
"""A row is compared with the centres in so many regions. In a million rows those are all: more cost 2 % of their time
for each million, and find 1 % more of the pairs of random vectors with a cosine of 0.9 among five million."""
_SPLIT_SAMPLE = 8192
_ASSIGNED = 2048


class Cells:
    """Cells of close vectors of unit norm, each around a centre.

    K cells are in about sqrt(K) regions, and each vector is compared with the centres of the nearest regions only, so
    that the time for a vector does not grow with the number of cells.
    """

    def __init__(self, sample: Floats, cells: int, seed: int = 0) -> None:
        """Fit `cells` cells on a sample, float32 (S, D): regions first, and then the cells of each region.

        There are up to one more for each region, and fewer if the sample has fewer vectors.
        """
        self.regions = _fit_centers(sample, round(cells**0.5), seed)
        home = np.concatenate(
            [(sample[at : at + _ASSIGNED] @ self.regions.T).argmax(axis=1) for at in range(0, len(sample), _ASSIGNED)]
        )
        fitted = []
        for region in range(len(self.regions)):
            rows = np.flatnonzero(home == region)
            fitted.append(_fit_centers(sample[rows], -(-cells * len(rows) // len(sample)), seed))
        self.centers = np.concatenate(fitted)
        self._starts = np.cumsum([0, *map(len, fitted)])

    def __len__(self) -> int:
        return len(self.centers)

    def assign(self, embeddings: Floats, nearest: int) -> NDArray[np.int32]:
        """Return the nearest cells of each vector, float32 (N, D), nearest first: int32 (N, `nearest`).

        They are -1 if there are too few.
        """
        found = np.full((len(embeddings), nearest), -1, np.int32)
        for start in range(0, len(embeddings), _ASSIGNED):
            self._assign(embeddings[start : start + _ASSIGNED], found[start : start + _ASSIGNED])
        return found

    def _assign(self, embeddings: Floats, found: NDArray[np.int32]) -> None:
        near = self._list_regions(embeddings)
        best = np.full(found.shape, -np.inf, np.float32)
        for region in range(len(self.regions)):
            rows = np.flatnonzero(near[:, region])
            first, stop = self._starts[region : region + 2]
            if not len(rows) or first == stop:
                continue
            cosines = embeddings[rows] @ self.centers[first:stop].T
            for _ in range(min(found.shape[1], stop - first)):
                place = cosines.argmax(axis=1)
                cosine = cosines[np.arange(len(rows)), place]
                better = cosine > best[rows, -1]
                if not better.any():
                    break
                rows_better = rows[better]
                best[rows_better, -1], found[rows_better, -1] = cosine[better], first + place[better]
                order = np.argsort(-best[rows_better], axis=1, kind="stable")
                best[rows_better] = np.take_along_axis(best[rows_better], order, axis=1)
                found[rows_better] = np.take_along_axis(found[rows_better], order, axis=1)
                cosines[np.arange(len(rows)), place] = -np.inf

    def _list_regions(self, embeddings: Floats) -> NDArray[np.bool_]:
        """Tell which regions are looked into for each vector, bool (N, R)."""
        cosines = embeddings @ self.regions.T
        if len(self.regions) <= _REGIONS:
            return np.ones(cosines.shape, np.bool_)
        return cosines >= np.partition(cosines, -_REGIONS, axis=1)[:, -_REGIONS, None]


def fit_cells(rows: NDArray[np.int64], vectors: Stored, cells: int) -> Cells:
    """Fit cells on a random sample of rows. `vectors` are the embeddings of all rows, (N, D).

    Memory holds up to 262,144 embeddings twice.
    """
    size = min(len(rows), _SAMPLE_PER_CELL * cells, _MOST_SAMPLE)
    chosen = np.sort(np.random.default_rng(0).choice(rows, size, replace=False))
    return Cells(np.asarray(vectors[chosen], np.float32), cells)


def _fit_centers(sample: Floats, count: int, seed: int) -> Floats:
    """Fit up to `count` centres, float32 (K, D) of unit norm."""
    count = min(count, len(sample))
    if count <= 1:
        return _normalize(sample[:1])
    # Random rows to begin with: k-means++ takes longer than all that follows, and finds no better cells.
    fitted = MiniBatchKMeans(
        count, init="random", batch_size=max(1024, 4 * count), n_init=1, max_iter=20, random_state=seed
    ).fit(sample)
    return _normalize(fitted.cluster_centers_)


def list_cells(nearest: NDArray[np.int32], cells: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each cell that has several, in ascending order. `nearest` is what `Cells.assign` returns.

    Memory holds 12 bytes for each cell of a row meanwhile.
    """
    flat = nearest.ravel()
    order = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat, np.arange(-1, cells), side="right", sorter=order)
    for start, end in pairwise(ends.tolist()):
        if end - start > 1:
            yield order[start:end] // nearest.shape[1]


def split_cell(rows: NDArray[np.int64], vectors: Stored, most: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of a cell in parts of at most `most` rows, each part with close embeddings.

    `vectors` are the embeddings of all rows, (N, D). Rows are in the two nearest parts. Rows that k-means cannot part,
    because they are almost the same image, are yielded together, however many they are.
    """
    if len(rows) <= most:
        yield rows
        return
    rng = np.random.default_rng(len(rows))
    sample = np.sort(rng.choice(rows, min(len(rows), _SPLIT_SAMPLE), replace=False))
    cells = Cells(np.asarray(vectors[sample], np.float32), -(-2 * len(rows) // most))
    nearest = np.concatenate(
        [
            cells.assign(np.asarray(vectors[rows[start : start + _ASSIGNED]], np.float32), 2)
            for start in range(0, len(rows), _ASSIGNED)
        ]
    )
    parts = [rows[part] for part in list_cells(nearest, len(cells))]
    if max(map(len, parts), default=0) > 0.9 * len(rows):
        yield rows
        return
    for part in parts:
        yield from split_cell(part, vectors, most)


def _normalize(vectors: NDArray[Any]) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)
