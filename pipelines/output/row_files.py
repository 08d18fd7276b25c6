"""The rows of a shard in data and reject files, which may hold rows of other shards too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import Output


@dataclass(frozen=True)
class RowFile:
    """The rows of a shard in a data or reject file: `rows` of them from row `first` of the file at `path`.

    `bytes` and `sha256` are of the whole file.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    first: int = 0

    @property
    def kind(self) -> str:
        """`data` or `rejects`."""
        return self.path.partition("/")[0]


def dump_files(files: Iterable[RowFile]) -> str:
    """Return the files of a shard as text, for a `ShardRef`."""
    return json.dumps([asdict(file) for file in files])


def load_files(text: str) -> list[RowFile]:
    """Parse what `dump_files` returned."""
    return [RowFile(**file) for file in json.loads(text)]


def make_row_file(row: Mapping[str, Any]) -> RowFile:
    """Return the file of a row of a ledger."""
    return RowFile(row["path"], row["rows"], row["bytes"], row["sha256"], row["first"])


def list_files(record: Mapping[str, Any]) -> list[RowFile]:
    """Return the files of a commit record."""
    names = ("path", "rows", "bytes", "sha256")
    return [RowFile(**{name: file[name] for name in names}, first=file.get("first", 0)) for file in record["files"]]


def read_rows(output: Output, file: RowFile, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard in a data or reject file.

    `columns` are all columns by default. Memory holds at most 65,536 rows of them, so this is for columns with small
    values. Raises `StoreError`, also if the file cannot be read as Parquet.
    """
    with output.open_rows(file.path, file.bytes) as parquet:
        for _, rows in read_slices(parquet, [("", file)], columns):
            yield rows


def read_slices(
    parquet: pq.ParquetFile,
    slices: Sequence[tuple[str, RowFile]],
    columns: Sequence[str] | None = None,
    batch_rows: int = 65_536,
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield the rows of some shards in one file, each batch with the name of its shard, in the order of the file.

    Each row group is read once at most, and those without a row of these shards are not read.
    """
    ordered = sorted(slices, key=lambda one: one[1].first)
    firsts = np.asarray([file.first for _, file in ordered])
    stops = firsts + [file.rows for _, file in ordered]
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if ((firsts < stop) & (stops > start)).any():
            position = start
            for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=columns):
                end = position + len(batch)
                for number in np.flatnonzero((firsts < end) & (stops > position)).tolist():
                    begin = max(int(firsts[number]), position)
                    yield ordered[number][0], batch.slice(begin - position, min(int(stops[number]), end) - begin)
                position = end
        start = stop
