"""Cells of close embeddings, so that not all pairs of images are compared: k-means, fitted on a sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from siglip.scoring import Floats

CELL_ROWS, MOST_CELLS, NEAREST = 1024, 4096, 4
"""Rows for each cell, on average; the most cells, beyond which they get larger; and how many cells each row is in.

Two rows are compared if they share a cell. Many small cells for each row find more than few large ones of the same
cost: with a thousand cells, 96 % of the pairs of random vectors with a cosine of 0.9 share one of four cells; of two
cells of four times as many rows, 78 % share one."""
MOST_ROWS = 12_288
"""Cells with more rows are split again: their similarities would take over 600 MB."""
SAMPLE_PER_CELL = 64
_SPLIT_SAMPLE = 8192
_ASSIGNED = 2048


def fit_cells(sample: Floats, cells: int, seed: int = 0) -> Floats:
    """Fit the centres of cells on a sample, float32 (S, D): float32 (K, D) of unit norm, K up to `cells`."""
    cells = min(cells, len(sample))
    if cells <= 1:
        return _normalize(sample[:1])
    # Random rows to begin with: k-means++ takes longer than all that follows, and finds no better cells.
    fitted = MiniBatchKMeans(
        cells, init="random", batch_size=max(1024, 4 * cells), n_init=1, max_iter=20, random_state=seed
    ).fit(sample)
    return _normalize(fitted.cluster_centers_)


def assign_cells(embeddings: Floats, centers: Floats, nearest: int) -> NDArray[np.int32]:
    """Return the nearest cells of each row, nearest first, int32 (N, `nearest`). They are -1 if there are too few."""
    found = np.full((len(embeddings), nearest), -1, np.int32)
    for start in range(0, len(embeddings), _ASSIGNED):
        cosines = embeddings[start : start + _ASSIGNED] @ centers.T
        part = found[start : start + _ASSIGNED]
        for number in range(min(nearest, len(centers))):
            best = cosines.argmax(axis=1)
            part[:, number] = best
            cosines[np.arange(len(best)), best] = -np.inf
    return found


def list_cells(nearest: NDArray[np.int32], cells: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each cell that has several, in ascending order. `nearest` is what `assign_cells` returns.

    Memory holds 12 bytes for each cell of a row meanwhile.
    """
    flat = nearest.ravel()
    order = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat, np.arange(-1, cells), side="right", sorter=order)
    for start, end in pairwise(ends.tolist()):
        if end - start > 1:
            yield order[start:end] // nearest.shape[1]


def split_cell(rows: NDArray[np.int64], vectors: Any, most: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of a cell in parts of at most `most` rows, each part with close embeddings.

    `vectors` are the embeddings of all rows, (N, D). Rows are in the two nearest parts. Rows that k-means cannot part,
    because they are almost the same image, are yielded together, however many they are.
    """
    if len(rows) <= most:
        yield rows
        return
    rng = np.random.default_rng(len(rows))
    sample = np.sort(rng.choice(rows, min(len(rows), _SPLIT_SAMPLE), replace=False))
    centers = fit_cells(np.asarray(vectors[sample], np.float32), -(-2 * len(rows) // most))
    nearest = np.concatenate(
        [
            assign_cells(np.asarray(vectors[rows[start : start + _ASSIGNED]], np.float32), centers, 2)
            for start in range(0, len(rows), _ASSIGNED)
        ]
    )
    parts = [rows[part] for part in list_cells(nearest, len(centers))]
    if max(map(len, parts), default=0) > 0.9 * len(rows):
        yield rows
        return
    for part in parts:
        yield from split_cell(part, vectors, most)


def _normalize(vectors: NDArray[Any]) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)
