"""The rows that are compared: of one output, or of an output and another one, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.dedup.mapped import MappedArray
from curation.tagged_output import TaggedOutput, read_embeddings

LARGEST, NEWEST = "largest", "newest"


class Rows:
    """The N rows of some outputs, one output after the other, with what decides which copy is kept.

    `vectors` are the embeddings as float16 (N, D), in a file of `folder`. `digests` are the SHA-256 of the images'
    bytes, uint64 (N, 4), also in a file. `rank`, int64 (N,), orders the rows: the lowest of a group is its
    representative. `other` tells which rows are of the other output, `base` which were there before: those, and the
    rows of an earlier run. They come first, in this order.

    Memory holds 10 bytes a row, 80 meanwhile, and 32 bytes a row more if nearly all images are identical to others.
    """

    def __init__(
        self, outputs: Sequence[TaggedOutput], base: int, seen: NDArray[np.bool_] | None, prefer: str, folder: Path
    ) -> None:
        """Read some outputs. The rows of the first `base` of them are of others.

        `seen` tells which rows an earlier run has looked at, bool (N,), None if there was none.
        """
        self.outputs = outputs
        self.starts = np.cumsum([0, *(output.rows for output in outputs)])
        count = int(self.starts[-1])
        width = outputs[0].width
        self.vectors = MappedArray(folder / "vectors", np.float16, (count, width))
        self.digests = MappedArray(folder / "digests", np.uint64, (count, 4))
        self.other = np.arange(count) < self.starts[base]
        self.base = self.other.copy() if seen is None else self.other | seen
        areas, preferred = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        pattern = prefer if prefer not in (LARGEST, NEWEST) else None
        first = 0
        for output in outputs:
            for batch in output.batches(["key", "width", "height", "sha256", "embedding"]):
                part = slice(first, first + len(batch))
                self.vectors[part] = read_embeddings(batch)
                self.digests[part] = _parse_digests(batch["sha256"].to_pylist())
                areas[part] = batch["width"].to_numpy().astype(np.int64) * batch["height"].to_numpy()
                if pattern is not None:
                    preferred[part] = [fnmatchcase(key, pattern) for key in batch["key"].to_pylist()]
                first += len(batch)
        number = np.arange(count)
        # The rows of an output are in the order in which they were planned, so later ones are newer.
        by = (-number,) if prefer == NEWEST else (number, -areas, ~preferred)
        self.rank = np.empty(count, np.int64)
        self.rank[np.lexsort((*by, ~self.base, ~self.other))] = number

    def __len__(self) -> int:
        return len(self.rank)

    def take(self, rows: NDArray[np.int64], column: str) -> list[Any]:
        """Return a column's values of some rows, in ascending order. Reads the row groups that they are in."""
        values: list[Any] = []
        for number, output in enumerate(self.outputs):
            start, stop = np.searchsorted(rows, self.starts[number : number + 2])
            if stop > start:
                found = output.take(rows[start:stop] - self.starts[number], [column])
                values += found[column].to_pylist()
        return values

    def find_identical(self) -> NDArray[np.int64]:
        """Return for each row the row of the same bytes with the lowest rank, int64 (N,): itself, if it is alone."""
        first = np.arange(len(self))
        # Few rows have the first word of another one's digest. Only those are compared whole.
        words = self.digests[: len(self), 0]
        order = np.argsort(words, kind="stable")
        same = words[order[1:]] == words[order[:-1]]
        rows = np.sort(order[np.r_[False, same] | np.r_[same, False]]) if len(order) else order
        del words, order, same
        digests = self.digests[rows]
        order = np.lexsort((self.rank[rows], *digests.T))
        rows, digests = rows[order], digests[order]
        starts = np.flatnonzero(np.r_[True, (digests[1:] != digests[:-1]).any(axis=1)]) if len(rows) else order
        first[rows] = np.repeat(rows[starts], np.diff(np.r_[starts, len(rows)]))
        return first


def _parse_digests(texts: list[str]) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint64).reshape(-1, 4)
