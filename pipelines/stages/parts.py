"""Parts: files with some rows of a shard in progress. They keep the model's work until the shard is committed.

Parts are in `parts/`, never in `data/`. A shard's rows are numbered; a part's rows are described by *runs*, a flat list
[start, stop, start, stop, ...] of half-open ranges of row numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.inputs.rows import WaitReason
from storage.store import Store

SUMMARY_ROW = -1
"""The number of the row that ends a shard. It has no image; its `summary` column holds the `ShardSummary`."""


@dataclass(frozen=True)
class ShardSummary:
    """The result of reading a shard, known when the reader has reached the shard's end.

    `rows` are the runs of the rows that the shard's parts must hold, and `rows_in` is the number of rows in the shard.
    `skipped` counts members of tars that are no images. `lost` estimates the images that broken archives held. If the
    store failed, `wait` is the reason and `detail` the store's message, and the shard is left to the next run.
    `trouble` counts the rows that a later run tries again, by their host and what it did.
    """

    rows: list[int] = field(default_factory=list)
    rows_in: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    wait: WaitReason | None = None
    detail: str = ""
    trouble: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text for the `summary` column of blocks and receipts."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardSummary:
        """Parse the text of a `summary` column."""
        return cls(**json.loads(text))


def read_parts(store: Store, parts: Mapping[str, Sequence[int]]) -> Iterator[pa.Table]:
    """Read parts, given as URIs with the runs of their rows. Yield each row once, in order of row numbers.

    A replayed task may have written rows that another part holds too. Only parts whose rows overlap are in memory at
    the same time.
    """
    ordered = sorted(parts, key=lambda part: parts[part][0])
    waiting: list[pa.Table] = []
    for position, part in enumerate(ordered):
        waiting.append(pa.ipc.open_file(pa.py_buffer(store.read(part))).read_all())
        table = pa.concat_tables(waiting)
        rows = table["row"].to_numpy()
        _, first = np.unique(rows, return_index=True)
        if position + 1 < len(ordered):
            before = rows[first] < parts[ordered[position + 1]][0]
            waiting = [table.take(pa.array(first[~before]))]
            first = first[before]
        if len(first):
            yield table if np.array_equal(first, np.arange(len(rows))) else table.take(pa.array(first))


def encode_rows(rows: NDArray[np.int64]) -> list[int]:
    """Return the runs of row numbers, int64 (N,) in any order. The rows of a block are one run, or a few."""
    if not len(rows):
        return []
    ordered = np.unique(rows)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.r_[0, breaks + 1]]
    stops = ordered[np.r_[breaks, len(ordered) - 1]] + 1
    return [int(n) for pair in zip(starts, stops, strict=True) for n in pair]


def decode_rows(runs: Sequence[int]) -> NDArray[np.int64]:
    """Return the row numbers of runs, in order, as int64 (N,)."""
    spans = [np.arange(runs[i], runs[i + 1]) for i in range(0, len(runs), 2)]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def covers(runs: Sequence[Sequence[int]], wanted: Sequence[int]) -> bool:
    """Tell whether runs of several receipts, which may overlap, together hold every row of the runs `wanted`."""
    merged: list[list[int]] = []
    for start, stop in sorted((run[i], run[i + 1]) for run in runs for i in range(0, len(run), 2)):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    spans = iter(merged)
    span = next(spans, [0, 0])
    for i in range(0, len(wanted), 2):
        while span[1] < wanted[i + 1]:
            following = next(spans, None)
            if following is None:
                return False
            span = following
        if wanted[i] < span[0]:
            return False
    return True
