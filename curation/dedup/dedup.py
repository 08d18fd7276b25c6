"""Find the copies among the images of an output: identical bytes, confirmed copies, and images that are only similar.

Identical bytes have the same SHA-256. A copy has a close embedding and the fingerprint of the same picture: it was
encoded again, resized, cropped a little, or has a watermark. Similar images have close embeddings only; they are told
apart, and never dropped.

Embeddings are compared within cells (`curation.dedup.cells`), so that the time grows little faster than the number of
images. Copies that share no cell are not found: each image is in its four nearest ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.dedup.earlier import Earlier
from curation.dedup.fingerprints import FINGERPRINT, compare_fingerprints, take_fingerprints
from curation.dedup.groups import NONE, Groups
from curation.dedup.mapped import MappedArray
from curation.dedup.parts import Parts
from curation.dedup.rows import Rows

COPY, SIMILAR = 0.85, 0.95
"""The lowest cosines of copies, whose thumbnails are compared too, and of similar images. An image whose edges are
cropped by 5 % keeps a cosine of 0.88 to 0.99, depending on the model."""
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


def find_copies(
    rows: Rows,
    folder: Path,
    *,
    against: bool = False,
    copy: float = COPY,
    similar: float = SIMILAR,
    earlier: Earlier | None = None,
) -> Found:
    """Group the rows that are not base rows with each other and with base rows, or only `against` the other output's.

    `earlier` has the groups of an earlier run, which stay. Memory holds about 150 bytes a row, and what `Parts` states.
    `folder` is for temporary files: those of `Parts`, and 5.8 kB for each image that is close to another one.
    """
    count = len(rows)
    first = rows.find_identical()
    if against:  # identical images of the output itself are not in question
        first = np.where(rows.other[first], first, np.arange(count))
    alone = first == np.arange(count)
    new = ~rows.base & alone
    parts = Parts(rows, alone, new, folder)
    confirmed = all("thumbnail" in output.columns for output in rows.outputs)
    near = parts.find_near(min(copy, similar) if confirmed else similar)
    leads = rows.other if against else np.ones(count, np.bool_)
    prints = _Prints(rows, near if confirmed else np.zeros(count, np.bool_), folder)
    copies = Groups(copy, rows.rank, new, leads & alone, prints.confirm)
    if earlier is not None:
        copies.join(earlier.copies)
    if confirmed:
        parts.group(copies, near)
    kept = alone & ((copies.leader == NONE) | (copies.leader == np.arange(count)))
    likenesses = Groups(similar, rows.rank, new & kept, leads & kept)
    if earlier is not None:
        likenesses.join(earlier.similar)
    parts.group(likenesses, near & kept)
    return Found(rows, first, copies, likenesses, confirmed)


class _Prints:
    """The fingerprints of the rows that are near another one, in a file."""

    def __init__(self, rows: Rows, near: NDArray[np.bool_], folder: Path) -> None:
        wanted = np.flatnonzero(near)
        self._place = np.full(len(rows), NONE, np.int32)
        self._place[wanted] = np.arange(len(wanted))
        self._prints = MappedArray(folder / "prints", FINGERPRINT, (len(wanted),))
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
