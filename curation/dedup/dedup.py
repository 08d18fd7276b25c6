"""Find the copies among the images of an output: identical bytes, confirmed copies, and images that are only similar.

Identical bytes have the same SHA-256. A copy has a close embedding and the fingerprint of the same picture: it was
encoded again, resized, cropped a little, or has a watermark. Similar images have close embeddings only; they are told
apart, and never dropped.

Embeddings are compared within cells (`curation.dedup.cells`), so that the time grows little faster than the number of
images. Copies in different cells are not found: each image is in its two nearest ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.dedup.cells import CELL_ROWS, MOST_ROWS, SAMPLE_PER_CELL, assign_cells, fit_cells, list_cells, split_cell
from curation.dedup.fingerprints import FINGERPRINT, compare_fingerprints, take_fingerprints
from curation.dedup.groups import GUARD, NONE, Groups
from curation.dedup.rows import Rows

COPY, SIMILAR = 0.85, 0.95
"""The lowest cosines of copies, whose thumbnails are compared too, and of similar images. An image whose edges are
cropped by 5 % keeps a cosine of 0.88 to 0.99, depending on the model."""
_ROUNDS = 4
"""How often groups of neighbouring cells are united."""
_BLOCK = 4096
_FINGERPRINTS = 4096


@dataclass
class Found:
    """The groups among `rows`. For each row its representative, int64 (N,), `groups.NONE` if it is in no group.

    `identical` and `copies` are about the same image, `similar` is not: its groups are among the rows that are kept.
    `confirmed` is False if there are no thumbnails, so that no copies can be confirmed.
    """

    rows: Rows
    identical: NDArray[np.int64]
    copies: Groups
    similar: Groups
    confirmed: bool

    def representatives(self) -> NDArray[np.int64]:
        """Return for each row the row that is kept in its place, int64 (N,): itself, if it is kept."""
        kept = np.where(self.copies.leader == NONE, np.arange(len(self.rows)), self.copies.leader)
        return np.asarray(kept[self.identical])


@dataclass(frozen=True)
class Earlier:
    """The groups of an earlier run, as pairs of rows: the representative and the member, with their cosine."""

    copies: Sequence[tuple[int, int, float]] = ()
    similar: Sequence[tuple[int, int, float]] = ()


def find_copies(
    rows: Rows,
    folder: Path,
    *,
    against: bool = False,
    copy: float = COPY,
    similar: float = SIMILAR,
    earlier: Earlier = Earlier(),
) -> Found:
    """Group the rows that are not base rows with each other and with base rows, or only `against` the other output's.

    Memory holds about 100 bytes a row, and the cosines of one cell. `folder` is for temporary files: 2 bytes for each
    number of an embedding, and 2.7 kB for each image that is close to another one.
    """
    count = len(rows)
    first = rows.find_identical()
    if against:  # identical images of the output itself are not in question
        first = np.where(rows.other[first], first, np.arange(count))
    alone = first == np.arange(count)
    new = ~rows.base & alone
    parts = _Parts(rows, alone, new)
    near = parts.find_near(min(copy, similar))
    confirmed = all("thumbnail" in output.columns for output in rows.outputs)
    prints = _Prints(rows, near if confirmed else np.zeros(count, np.bool_), folder)
    leads = rows.other if against else np.ones(count, np.bool_)
    copies = Groups(copy, rows.rank, new, leads & alone, prints.confirm)
    for leader, member, cosine in earlier.copies:
        copies.join(leader, member, cosine)
    if confirmed:
        parts.group(copies, near)
    kept = alone & ((copies.leader == NONE) | (copies.leader == np.arange(count)))
    likenesses = Groups(similar, rows.rank, new & kept, leads & kept)
    for leader, member, cosine in earlier.similar:
        likenesses.join(leader, member, cosine)
    parts.group(likenesses, near & kept)
    return Found(rows, first, copies, likenesses, confirmed)


class _Parts:
    """The cells of the rows in question, in parts of bounded size."""

    def __init__(self, rows: Rows, wanted: NDArray[np.bool_], new: NDArray[np.bool_]) -> None:
        self._vectors, self._rank, self._new = rows.vectors, rows.rank, new
        self._rows = np.flatnonzero(wanted)
        self._cells = max(1, -(-len(self._rows) // CELL_ROWS))
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(self._rows, min(len(self._rows), SAMPLE_PER_CELL * self._cells), replace=False))
        centers = fit_cells(np.asarray(self._vectors[chosen], np.float32), self._cells)
        self._cells = len(centers)
        self._nearest = np.concatenate(
            [np.zeros((0, 2), np.int32)]
            + [
                assign_cells(np.asarray(self._vectors[self._rows[start : start + _BLOCK]], np.float32), centers)
                for start in range(0, len(self._rows), _BLOCK)
            ]
        )

    def _list(self) -> Iterator[NDArray[np.int64]]:
        for cell in list_cells(self._nearest, self._cells):
            for part in split_cell(self._rows[cell], self._vectors, MOST_ROWS):
                if self._new[part].any():
                    yield part

    def find_near(self, threshold: float) -> NDArray[np.bool_]:
        """Tell which rows have another one with at least this cosine, one of them new: bool (N,)."""
        near = np.zeros(len(self._rank), np.bool_)
        limit = threshold + GUARD
        for part in self._list():
            new = part[self._new[part]]
            for start in range(0, len(new), _BLOCK):
                some = new[start : start + _BLOCK]
                ours = np.asarray(self._vectors[some], np.float32)
                for other_start in range(0, len(part), _BLOCK):
                    others = part[other_start : other_start + _BLOCK]
                    close = ours @ np.asarray(self._vectors[others], np.float32).T >= limit
                    close &= some[:, None] != others[None]
                    near[some] |= close.any(axis=1)
                    near[others] |= close.any(axis=0)
        return near

    def group(self, groups: Groups, near: NDArray[np.bool_]) -> None:
        """Group the near rows of each part."""
        for part in self._list():
            rows = part[near[part]]
            rows = rows[np.argsort(self._rank[rows], kind="stable")]
            # Rows that cannot be parted are almost the same image: a few of them represent all.
            while len(rows) > MOST_ROWS:
                groups.add(rows[:MOST_ROWS], np.asarray(self._vectors[rows[:MOST_ROWS]], np.float32))
                taken = groups.leader[rows[:MOST_ROWS]]
                heads = rows[:MOST_ROWS][(taken == NONE) | (taken == rows[:MOST_ROWS])]
                rows = np.concatenate([heads[: MOST_ROWS // 2], rows[MOST_ROWS:]])
            if len(rows) > 1:
                groups.add(rows, np.asarray(self._vectors[rows], np.float32))
        for _ in range(_ROUNDS):
            united = False
            for part in self._list():
                leaders = np.unique(groups.leader[part])
                united |= groups.merge(leaders[leaders != NONE], self._vectors)
            if not united:
                break


class _Prints:
    """The fingerprints of the rows that are near another one, in a file."""

    def __init__(self, rows: Rows, near: NDArray[np.bool_], folder: Path) -> None:
        wanted = np.flatnonzero(near)
        self._place = np.full(len(rows), NONE, np.int32)
        self._place[wanted] = np.arange(len(wanted))
        self._prints: Any = np.memmap(folder / "prints", FINGERPRINT, "w+", shape=(max(1, len(wanted)),))
        self._readable = np.zeros(len(wanted), np.bool_)
        for start in range(0, len(wanted), _FINGERPRINTS):
            part = slice(start, start + _FINGERPRINTS)
            self._prints[part], self._readable[part] = take_fingerprints(rows.take(wanted[part], "thumbnail"))

    def confirm(self, row: int, others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of some rows are copies of a row, bool (N,)."""
        place, places = self._place[row], self._place[others]
        if not self._readable[place]:
            return np.zeros(len(others), np.bool_)
        same = compare_fingerprints(self._prints[place], self._prints[places]).are_copies()
        return same & self._readable[places]
