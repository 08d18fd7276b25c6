"""The rows that are compared, in parts of close embeddings, with the close pairs of each part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curation.dedup.cells import (
    CELL_ROWS,
    MOST_ROWS,
    NEAREST,
    fit_cells,
    list_cells,
    split_cell,
)
from curation.dedup.groups import GUARD, NONE, Groups
from curation.dedup.mapped import Stored
from curation.dedup.pairs import PAIR, Close, ComparedNeighbors, ListedNeighbors, find_pairs
from curation.dedup.rows import Rows
from siglip.config import count_cores
from siglip.scoring import Floats

Item = TypeVar("Item")
Result = TypeVar("Result")
PAIRS_PER_ROW = 16
"""Parts with more close pairs are compared again when they are grouped, so that the file of pairs stays small."""
_ROUNDS = 4
"""How often groups of neighbouring cells are united."""
_BLOCK = 4096


class Parts:
    """The rows in question in parts, of those that have a new row.

    A part has at most `MOST_ROWS` rows, or rows that k-means cannot part. Each row is in `NEAREST` parts or more, or
    all are in one. The parts are in a file of `folder`, 4 bytes for each row in them, as are their close pairs, 12
    bytes each and up to `PAIRS_PER_ROW` for each row of a part.

    Memory holds 60 bytes a row while the cells are assigned, and the embeddings that they are fitted on.
    """

    def __init__(self, rows: Rows, wanted: NDArray[np.bool_], new: NDArray[np.bool_], folder: Path) -> None:
        """Part the rows that are `wanted`, bool (N,). Some of them are `new`, bool (N,)."""
        self._vectors, self._rank, self._new = rows.vectors, rows.rank, new
        self._starts = [0]
        self._pairs: list[tuple[int, int] | None] = []
        self._paths = folder / "parts", folder / "pairs"
        with self._paths[0].open("wb") as file:
            for part in _list_parts(np.flatnonzero(wanted), rows.vectors):
                if new[part].any():
                    file.write(part.astype(np.int32).tobytes())
                    self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _rows(self, number: int) -> NDArray[np.int64]:
        start, stop = self._starts[number : number + 2]
        return np.fromfile(self._paths[0], np.int32, stop - start, offset=4 * start).astype(np.int64)

    def find_near(self, threshold: float) -> NDArray[np.bool_]:
        """Tell which rows have another one with at least this cosine, one of them new: bool (N,).

        Of rows that k-means cannot part, all are taken for near if many of them are new. All cores compare, and memory
        holds the embeddings of one part for each.
        """
        near = np.zeros(len(self._rank), np.bool_)
        count = 0

        def find(number: int) -> tuple[NDArray[np.int64], Close]:
            part = self._rows(number)
            part = part[np.argsort(~self._new[part], kind="stable")]
            new = int(self._new[part].sum())
            if len(part) <= MOST_ROWS:
                vectors = self._read(part)
                return part, find_pairs(vectors, new, threshold + GUARD, PAIRS_PER_ROW * len(part))
            return part, Close(self._find_in_large(part, new, threshold + GUARD), None)

        self._pairs.clear()
        with self._paths[1].open("wb") as file:
            for part, close in map_on_cores(find, range(len(self))):
                near[part[close.near]] = True
                if close.pairs is None:
                    self._pairs.append(None)
                    continue
                close.pairs["one"], close.pairs["other"] = part[close.pairs["one"]], part[close.pairs["other"]]
                file.write(close.pairs.tobytes())
                self._pairs.append((count, len(close.pairs)))
                count += len(close.pairs)
        return near

    def _find_in_large(self, part: NDArray[np.int64], new: int, limit: float) -> NDArray[np.bool_]:
        """Find the near rows among more than `MOST_ROWS` rows, of which the first `new` are new."""
        near = np.ones(len(part), np.bool_)
        if new > _BLOCK:
            return near
        ours = self._read(part[:new])
        for start in range(0, len(part), _BLOCK):
            close = ours @ self._read(part[start : start + _BLOCK]).T >= limit
            if start == 0:
                np.fill_diagonal(close, False)
                near[:_BLOCK] = close.any(axis=0)
            else:
                near[start : start + _BLOCK] = close.any(axis=0)
            near[:new] |= close.any(axis=1)
        return near

    def group(self, groups: Groups, near: NDArray[np.bool_]) -> None:
        """Group the near rows of each part, bool (N,). `find_near` has found them, with no higher threshold."""
        for number in range(len(self)):
            part = self._rows(number)
            rows = part[near[part]]
            rows = rows[np.argsort(self._rank[rows], kind="stable")]
            # Rows that cannot be parted are almost the same image: a few of them represent all.
            while len(rows) > MOST_ROWS:
                groups.add(rows[:MOST_ROWS], ComparedNeighbors(self._read(rows[:MOST_ROWS]), groups.limit))
                taken = groups.leader[rows[:MOST_ROWS]]
                heads = rows[:MOST_ROWS][(taken == NONE) | (taken == rows[:MOST_ROWS])]
                rows = np.concatenate([heads[: MOST_ROWS // 2], rows[MOST_ROWS:]])
            if len(rows) > 1:
                groups.add(rows, self._list_neighbors(number, rows, groups.limit))
        self._merge(groups)

    def _merge(self, groups: Groups) -> None:
        """Unite groups that are close for certain, of one part or of neighbouring ones."""
        changed = np.ones(len(self._rank), np.bool_)
        for _ in range(_ROUNDS):
            # The threads see the groups as they were before the round, so that the result is always the same.
            leader, radius = groups.leader.copy(), groups.radius.copy()

            def find(
                number: int,
                leader: NDArray[np.int64] = leader,
                radius: Floats = radius,
                changed: NDArray[np.bool_] = changed,
            ) -> NDArray[np.int64]:
                heads = np.unique(leader[self._rows(number)])
                heads = heads[heads != NONE]
                return groups.list_mergeable(heads[:0] if not changed[heads].any() else heads, radius, self._vectors)

            grown = [
                head for pairs in map_on_cores(find, range(len(self))) for head in groups.merge(pairs, self._vectors)
            ]
            if not grown:
                break
            changed = np.zeros(len(self._rank), np.bool_)
            changed[grown] = True

    def _list_neighbors(
        self, number: int, rows: NDArray[np.int64], limit: float
    ) -> ListedNeighbors | ComparedNeighbors:
        """Return the neighbours of some rows of a part, by their indices."""
        stored = self._pairs[number]
        if stored is None:
            return ComparedNeighbors(self._read(rows), limit)
        pairs = np.fromfile(self._paths[1], PAIR, stored[1], offset=PAIR.itemsize * stored[0])
        order = np.argsort(rows)
        pairs = pairs[pairs["cosine"] >= limit]
        for end in ("one", "other"):
            places = np.searchsorted(rows, pairs[end], sorter=order)
            inside = places < len(rows)
            pairs, places = pairs[inside], order[places[inside]]
            inside = rows[places] == pairs[end]
            pairs = pairs[inside]
            pairs[end] = places[inside]
        return ListedNeighbors(pairs, len(rows))

    def _read(self, rows: NDArray[np.int64]) -> Floats:
        return np.asarray(self._vectors[rows], np.float32)


def _list_parts(rows: NDArray[np.int64], vectors: Stored) -> Iterator[NDArray[np.int64]]:
    """Yield rows in parts of close embeddings, each in ascending order. `vectors` are those of all rows, (N, D)."""
    if len(rows) < 2:
        return
    # Few rows are all compared with each other: cells would not be cheaper.
    cells = fit_cells(rows, vectors, 1 if len(rows) <= MOST_ROWS else -(-len(rows) // CELL_ROWS))
    nearest = np.empty((len(rows), NEAREST), np.int32)

    def assign(start: int) -> None:
        part = slice(start, start + _BLOCK)
        nearest[part] = cells.assign(np.asarray(vectors[rows[part]], np.float32), NEAREST)

    for _ in map_on_cores(assign, range(0, len(rows), _BLOCK)):
        pass
    for cell in list_cells(nearest, len(cells)):
        yield from split_cell(rows[cell], vectors, MOST_ROWS)


def map_on_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results of some work in the order of the items, from a thread for each core.

    Each thread multiplies matrices on its own core, so that the steps between the products use all cores too. At most
    two results for each core are held.
    """
    cores = count_cores()
    waiting: deque[Future[Result]] = deque()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
