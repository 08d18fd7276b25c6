"""Groups of close images, each around a representative, in which every two members are close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip.scoring import Floats

NONE = -1
GUARD = 5e-4
"""Embeddings are compared as float16, which changes a cosine by less than this. It is added to each threshold."""

Confirm = Callable[[int, NDArray[np.int64]], NDArray[np.bool_]]
"""Tells for a row which of some other rows are the same image: (row, rows) to bool (N,)."""


class Groups:
    """The groups that are found so far among `rows` rows, for one threshold of the cosine.

    `leader` is each row's representative, int64 (N,): the row itself, or `NONE` if it is in no group. `cosine` is the
    cosine with the representative, float32 (N,). Every two members of a group have at least the cosine `threshold`.

    Rows are taken as representatives in the order of `rank`, int64 (N,), the lowest first. Only rows for which `free`
    is true may be members of another row's group, and only rows for which `leads` is true may represent others.
    """

    def __init__(
        self,
        threshold: float,
        rank: NDArray[np.int64],
        free: NDArray[np.bool_],
        leads: NDArray[np.bool_],
        confirm: Confirm | None = None,
    ) -> None:
        self.threshold = threshold
        self.leader = np.full(len(rank), NONE, np.int64)
        self.cosine = np.ones(len(rank), np.float32)
        self._rank, self._free, self._leads, self._confirm = rank, free, leads, confirm
        self._widest = np.arccos(min(1.0, threshold + GUARD))
        self._radius = np.zeros(len(rank), np.float32)  # of each representative's group, as an angle
        self._size = np.ones(len(rank), np.int32)

    def add(self, rows: NDArray[np.int64], vectors: Floats) -> None:
        """Look for groups among some rows, whose embeddings are float32 (M, D). Memory holds M x M cosines."""
        order = np.argsort(self._rank[rows], kind="stable")
        rows, vectors = rows[order], vectors[order]
        cosines = np.clip(vectors @ vectors.T, -1, 1)
        np.fill_diagonal(cosines, -1)
        limit = self.threshold + GUARD
        for place in np.flatnonzero((cosines >= limit).any(axis=1)).tolist():
            row = int(rows[place])
            if self.leader[row] not in (NONE, row) or not self._leads[row]:
                continue
            near = cosines[place] >= limit
            near &= (self.leader[rows] == NONE) & self._free[rows]
            candidates = np.flatnonzero(near)
            if self._confirm is not None and len(candidates):
                candidates = candidates[self._confirm(row, rows[candidates])]
            if len(candidates):
                self._extend(place, rows, cosines, candidates[np.argsort(-cosines[place, candidates], kind="stable")])

    def _extend(self, place: int, rows: NDArray[np.int64], cosines: Floats, candidates: NDArray[np.int64]) -> None:
        """Add candidates to the group of the row at `place`, if they are close to all of its members."""
        row = int(rows[place])
        inside = np.flatnonzero((self.leader[rows] == row) & (rows != row))
        lowest = cosines[inside].min(axis=0) if len(inside) else np.ones(len(rows), np.float32)
        # Of members that are not among these rows, only the largest angle to the representative is known.
        outside = self._size[row] - 1 > len(inside)
        for candidate in candidates.tolist():
            angle = float(np.arccos(cosines[place, candidate]))
            if outside and angle + self._radius[row] > self._widest:
                continue
            if lowest[candidate] < self.threshold + GUARD:
                continue
            member = int(rows[candidate])
            self.leader[row], self.leader[member] = row, row
            self.cosine[member] = cosines[place, candidate]
            self._size[row] += 1
            self._radius[row] = max(self._radius[row], angle)
            np.minimum(lowest, cosines[candidate], out=lowest)
            lowest[candidate] = 1

    def merge(self, rows: NDArray[np.int64], vectors: Any) -> bool:
        """Unite groups, given by the rows that represent them, if all their members are close for certain.

        `vectors` are the embeddings of all rows, (N, D). Rows of which there are more than a cell holds are in several
        cells, and form a group in each. Returns whether any were united.
        """
        heads = rows[(self.leader[rows] == rows)]
        heads = heads[np.argsort(self._rank[heads], kind="stable")]
        ours = np.asarray(vectors[heads], np.float32)
        angles = np.arccos(np.clip(ours @ ours.T, -1, 1))
        united = False
        for place, head in enumerate(heads.tolist()):
            if self.leader[head] != head or not self._leads[head]:
                continue
            for other in (place + 1 + np.flatnonzero(angles[place, place + 1 :] < self._widest)).tolist():
                member = int(heads[other])
                angle = float(angles[place, other])
                if self.leader[member] != member or not self._free[member]:
                    continue
                if self._radius[head] + angle + self._radius[member] > self._widest:
                    continue
                if self._confirm is not None and not self._confirm(head, heads[other : other + 1])[0]:
                    continue
                moved = np.flatnonzero(self.leader == member)
                self.leader[moved] = head
                self.cosine[moved] = np.asarray(vectors[moved], np.float32) @ ours[place]
                self._size[head] += len(moved)
                self._radius[head] = max(self._radius[head], angle + self._radius[member])
                united = True
        return united

    def join(self, row: int, member: int, cosine: float) -> None:
        """Put a row into another one's group, as an earlier run has done. `cosine` is theirs."""
        self.leader[row], self.leader[member], self.cosine[member] = row, row, cosine
        self._size[row] += 1
        self._radius[row] = max(self._radius[row], float(np.arccos(min(1.0, cosine))))
