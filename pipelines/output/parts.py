"""Parts: the rows of shards in work, as sinks write them, and the receipts that tell the driver of them.

Parts are what makes the model's work safe before a shard is complete. They lie beside `data/`, never in it.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.inputs.rows import WaitReason
from pipelines.output.layout import OutputFormat
from storage.schemes import open_store
from storage.store import Store, StoreOptions, join

MARKER = -1
"""The `row` of a shard's last line, which has no image: its `ending` says how the reading of the shard ended."""


@dataclass(frozen=True)
class Ending:
    """How the reading of a shard ended.

    At its end: `rows` are runs of the row numbers that its parts must hold, `rows_in` is how many rows the shard has,
    `skipped` counts members of tars that are no images, `lost` is about how many images broken archives held. Or with
    trouble of the store: `wait` is the reason, `detail` the store's words.
    """

    rows: list[int] = field(default_factory=list)
    rows_in: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    wait: WaitReason | None = None
    detail: str = ""

    def to_json(self) -> str:
        """As it travels with the marker row."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ending:
        """The ending that a marker row carries."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class PartWriter:
    """Where and in what format a job writes. Travels to the sink and to the commit tasks."""

    output: str
    options: StoreOptions
    format: OutputFormat
    fingerprint: str

    def open(self) -> Store:
        """The output's store."""
        return open_store(self.output, self.options)

    def write(self, shard: str, rows: pa.Table) -> str:
        """Write rows of a shard, named as in `shard_name`, as a part. Returns its URI."""
        schema = self.format.part_schema()
        table = pa.table({name: rows[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, schema) as writer:
            writer.write_table(table)
        uri = join(self.output, "parts", shard, f"{uuid.uuid4().hex}.arrow")
        self.open().put(uri, buffer.getvalue())
        return uri


def read_parts(store: Store, parts: Mapping[str, Sequence[int]]) -> Iterator[pa.Table]:
    """The rows of parts, each row once, in order: a replayed task may have written some twice.

    `parts` are their URIs with the runs of the rows in each. At most those that overlap are in memory at a time.
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
    """Row numbers as flat [start, stop, start, stop, ...] runs: a block's rows are one run, or a few."""
    if not len(rows):
        return []
    ordered = np.unique(rows)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.r_[0, breaks + 1]]
    stops = ordered[np.r_[breaks, len(ordered) - 1]] + 1
    return [int(n) for pair in zip(starts, stops, strict=True) for n in pair]


def decode_rows(runs: Sequence[int]) -> NDArray[np.int64]:
    """The row numbers that flat runs stand for, in order."""
    spans = [np.arange(runs[i], runs[i + 1]) for i in range(0, len(runs), 2)]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def covers(runs: Sequence[Sequence[int]], wanted: Sequence[int]) -> bool:
    """Whether runs, from several receipts and perhaps overlapping, hold every row of the runs that are wanted."""
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
