"""Pairs of close rows in one part of the rows: found in blocks, and listed for each row."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip.scoring import Floats

_TILE = 1024
"""Rows of a block: its cosines with another block take 4 MB, which stay in a core's cache."""

PAIR = np.dtype([("one", np.int32), ("other", np.int32), ("cosine", np.float32)])
"""A pair of rows and its cosine, 12 bytes."""


class Close(NamedTuple):
    """The close pairs of M rows: `near` tells which rows are in one, bool (M,). `pairs`, `PAIR` (P,), are indices.

    `pairs` is None if there are more than the caller wants to have.
    """

    near: NDArray[np.bool_]
    pairs: NDArray[np.void] | None


def find_pairs(vectors: Floats, new: int, limit: float, most: int) -> Close:
    """Find the pairs with a cosine of at least `limit` among rows, float32 (M, D), the first `new` of which are new.

    Pairs without a new row are not looked for. Each pair is found once. Memory holds 4 MB of cosines and up to `most`
    pairs.
    """
    near = np.zeros(len(vectors), np.bool_)
    found: list[NDArray[np.void]] = []
    count = 0
    for start in range(0, new, _TILE):
        ours = vectors[start : min(start + _TILE, new)]
        for other in range(start, len(vectors), _TILE):
            cosines = ours @ vectors[other : other + _TILE].T
            close = cosines >= limit
            if other == start:
                close &= ~np.tri(*close.shape, dtype=np.bool_)
            if count > most:
                near[start : start + len(ours)] |= close.any(axis=1)
                near[other : other + _TILE] |= close.any(axis=0)
                continue
            flat = np.flatnonzero(close)
            ones, others = np.divmod(flat, close.shape[1])
            pairs = np.empty(len(flat), PAIR)
            pairs["one"], pairs["other"], pairs["cosine"] = ones + start, others + other, cosines.ravel()[flat]
            near[pairs["one"]] = near[pairs["other"]] = True
            count += len(flat)
            if count <= most:
                found.append(pairs)
            else:
                found.clear()
    return Close(near, np.concatenate([np.empty(0, PAIR), *found]) if count <= most else None)


class Neighbors(Protocol):
    """Tells which rows are close to each of some rows, by their indices."""

    def __call__(self, place: int) -> tuple[NDArray[np.int64], Floats]:
        """Return the close rows of one, int64 (K,) in ascending order and without itself, with their cosines, (K,)."""


class ListedNeighbors:
    """The neighbours of `rows` rows, from their pairs. Memory holds 40 bytes a pair."""

    def __init__(self, pairs: NDArray[np.void], rows: int) -> None:
        """List pairs, `PAIR` (P,), each of which is given once."""
        ones = np.concatenate([pairs["one"], pairs["other"]])
        others = np.concatenate([pairs["other"], pairs["one"]])
        order = np.lexsort((others, ones))
        self._others = others[order].astype(np.int64)
        self._cosines = np.concatenate([pairs["cosine"], pairs["cosine"]])[order]
        self._starts = np.searchsorted(ones[order], np.arange(rows + 1)).tolist()

    def __call__(self, place: int) -> tuple[NDArray[np.int64], Floats]:
        """Return the close rows of one, and their cosines."""
        part = slice(self._starts[place], self._starts[place + 1])
        return self._others[part], self._cosines[part]


class ComparedNeighbors:
    """The neighbours of M rows, float32 (M, D), with cosines of at least `limit`. Memory holds M x M cosines."""

    def __init__(self, vectors: Floats, limit: float) -> None:
        self._cosines = vectors @ vectors.T
        np.fill_diagonal(self._cosines, -1)
        self._limit = limit

    def __call__(self, place: int) -> tuple[NDArray[np.int64], Floats]:
        """Return the close rows of one, and their cosines."""
        cosines = self._cosines[place]
        places = np.flatnonzero(cosines >= self._limit)
        return places, cosines[places]
