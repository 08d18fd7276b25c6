"""Groups of close images, each around a representative, in which every two members are close."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from curation.dedup.mapped import Stored
from curation.dedup.pairs import Neighbors
from siglip.scoring import Floats

NONE = -1
GUARD = 5e-4
"""Embeddings are compared as float16, which changes a cosine by less than this. It is added to each threshold."""
_HEADS = 256

Confirm = Callable[[int, NDArray[np.int64]], NDArray[np.bool_]]
"""Tells for a row which of some other rows are the same image: (row, rows) to bool (N,)."""


@dataclass(frozen=True)
class Members:
    """Members of groups with their representatives, int64 (P,) each, and their cosines, float32 (P,): 20 bytes each."""

    heads: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    cosines: Floats = field(default_factory=lambda: np.empty(0, np.float32))


class Groups:
    """The groups that are found so far among `rows` rows, for one threshold of the cosine.

    `leader` is each row's representative, int64 (N,): the row itself, or `NONE` if it is in no group. `cosine` is the
    cosine with the representative, float32 (N,). `radius`, float32 (N,), is the largest angle between a representative
    and a member, in radians, or an upper bound of it. Every two members of a group have at least the cosine
    `threshold`.

    Rows are taken as representatives in the order of `rank`, int64 (N,), the lowest first. Only rows for which `free`
    is true may be members of another row's group, and only rows for which `leads` is true may represent others.

    Memory holds 28 bytes a row.
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
        self.limit = threshold + GUARD
        self.leader = np.full(len(rank), NONE, np.int64)
        self.cosine = np.ones(len(rank), np.float32)
        self._rank, self._free, self._leads, self._confirm = rank, free, leads, confirm
        self._widest = _angle(self.limit)
        self.radius = np.zeros(len(rank), np.float32)
        self._size = np.ones(len(rank), np.int32)
        # The rows of each group, in a ring: without it, to find a group's members would take a pass over all rows.
        self._next = np.arange(len(rank))

    def add(self, rows: NDArray[np.int64], neighbors: Neighbors) -> None:
        """Look for groups among some rows, which are in ascending order of their rank.

        `neighbors` tells the close rows of each, by their indices in `rows`: those whose cosine is at least `limit`.
        """
        leader, free, leads = self.leader[rows], self._free[rows], self._leads[rows]
        hits = np.zeros(len(rows), np.int32)
        for place in np.flatnonzero(leads).tolist():
            row = int(rows[place])
            if leader[place] not in (NONE, row):
                continue
            near, cosines = neighbors(place)
            chosen = (leader[near] == NONE) & free[near]
            candidates, cosines = near[chosen], cosines[chosen]
            if self._confirm is not None and len(candidates):
                same = self._confirm(row, rows[candidates])
                candidates, cosines = candidates[same], cosines[same]
            if len(candidates):
                order = np.argsort(-cosines, kind="stable")
                self._extend(place, rows, leader, neighbors, candidates[order], cosines[order], hits)

    def _extend(
        self,
        place: int,
        rows: NDArray[np.int64],
        leader: NDArray[np.int64],
        neighbors: Neighbors,
        candidates: NDArray[np.int64],
        cosines: Floats,
        hits: NDArray[np.int32],
    ) -> None:
        """Add candidates to the group of the row at `place`, if they are close to all of its members.

        `leader` are the representatives of `rows`. `hits` is used to count the members that a row is close to.
        """
        row = int(rows[place])
        inside = np.flatnonzero((leader == row) & (rows != row)).tolist() if self._size[row] > 1 else []
        hits[:] = 0
        for member in inside:
            hits[neighbors(member)[0]] += 1
        needed = len(inside)
        # Of members that are not among these rows, only the largest angle to the representative is known.
        outside = self._size[row] - 1 > needed
        for candidate, cosine in zip(candidates.tolist(), cosines.tolist(), strict=True):
            angle = _angle(cosine)
            if hits[candidate] < needed or (outside and angle + self.radius[row] > self._widest):
                continue
            hits[neighbors(candidate)[0]] += 1
            needed += 1
            member = int(rows[candidate])
            leader[place] = leader[candidate] = self.leader[row] = self.leader[member] = row
            self.cosine[member] = cosine
            self._next[row], self._next[member] = self._next[member], self._next[row]
            self._size[row] += 1
            self.radius[row] = max(self.radius[row], angle)

    def list_mergeable(self, heads: NDArray[np.int64], radius: Floats, vectors: Stored) -> NDArray[np.int64]:
        """Return the pairs of groups that are close for certain, int64 (P, 2), among those that `heads` represent.

        Pairs are given by the two representatives, the one with the lower rank first, and are sorted by it. `radius`
        are the radii of the groups of all rows, float32 (N,), and `vectors` the embeddings, (N, D). Memory holds those
        of the heads, and 256 cosines for each. It reads nothing that changes, so that several threads may call it.
        """
        heads = heads[np.argsort(self._rank[heads], kind="stable")]
        found = [np.empty((0, 2), np.int64)]
        if not self._free[heads].any():
            return found[0]
        ours, radius = np.asarray(vectors[heads], np.float32), radius[heads]
        for start in range(0, len(heads), _HEADS):
            cosines = ours[start : start + _HEADS] @ ours[start:].T
            one, other = np.divmod(np.flatnonzero(cosines > self.limit), cosines.shape[1])
            later = (other > one) & self._free[heads[other + start]]
            one, other = one[later], other[later]
            angles = np.arccos(np.minimum(cosines[one, other], 1))
            one, other = one + start, other + start
            near = radius[one] + angles + radius[other] <= self._widest
            found.append(np.stack([heads[one[near]], heads[other[near]]], axis=1))
        return np.concatenate(found)

    def merge(self, pairs: NDArray[np.int64], vectors: Stored) -> list[int]:
        """Unite the pairs of groups that `list_mergeable` has found, unless they have changed since.

        `vectors` are the embeddings of all rows, (N, D). Returns the representatives of the groups that have grown.
        Rows of which there are more than a cell holds are in several cells, and form a group in each.
        """
        grown: list[int] = []
        for head, other in pairs.tolist():
            if self.leader[head] == head and self._leads[head]:
                angle = _angle(float(np.asarray(vectors[head], np.float32) @ np.asarray(vectors[other], np.float32)))
                if self._is_one(head, other, angle):
                    self._unite(head, other, angle, vectors)
                    grown.append(head)
        return grown

    def _is_one(self, head: int, other: int, angle: float) -> bool:
        """Tell whether two groups, whose representatives have this angle, are certainly one."""
        if self.leader[other] != other or not self._free[other]:
            return False
        if self.radius[head] + angle + self.radius[other] > self._widest:
            return False
        return self._confirm is None or bool(self._confirm(head, np.asarray([other]))[0])

    def _unite(self, head: int, other: int, angle: float, vectors: Stored) -> None:
        moved = self._list_members(other)
        self.leader[moved] = head
        self.cosine[moved] = np.asarray(vectors[moved], np.float32) @ np.asarray(vectors[head], np.float32)
        self._next[head], self._next[other] = self._next[other], self._next[head]
        self._size[head] += len(moved)
        self.radius[head] = max(self.radius[head], angle + self.radius[other])

    def join(self, members: Members) -> None:
        """Put rows into other rows' groups, as an earlier run has done. No row is in two of these groups."""
        order = np.argsort(members.heads, kind="stable")
        heads, rows, cosines = members.heads[order], members.rows[order], members.cosines[order]
        self.leader[heads] = self.leader[rows] = heads
        self.cosine[rows] = cosines
        np.add.at(self._size, heads, 1)
        np.maximum.at(self.radius, heads, np.arccos(np.minimum(cosines, 1)))
        first = np.r_[True, heads[1:] != heads[:-1]] if len(heads) else np.empty(0, np.bool_)
        last = np.roll(first, -1)
        self._next[heads[first]] = rows[first]
        self._next[rows[~last]] = rows[1:][~last[:-1]] if len(rows) else rows
        self._next[rows[last]] = heads[last]

    def _list_members(self, head: int) -> NDArray[np.int64]:
        members = [head]
        while (row := int(self._next[members[-1]])) != head:
            members.append(row)
        return np.asarray(members)


def _angle(cosine: float) -> float:
    return math.acos(min(1.0, cosine))
