"""Columns of some rows of outputs, in a temporary file, to be read in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BATCH_ROWS = 65_536


class Described:
    """Rows that are added in ascending order of their positions, and taken in any order once it is closed.

    They are in an Arrow file, which is mapped into memory when it is read: memory holds the positions, 8 bytes a row,
    and one batch of `BATCH_ROWS` rows.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Make the file, for columns of this schema."""
        self._path, self._schema = path, schema
        self._writer = pa.ipc.new_file(str(path), schema)
        self._waiting: list[pa.RecordBatch] = []
        self._positions: list[NDArray[np.int64]] = []
        self._starts = [0]

    def __enter__(self) -> Described:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
        self._writer.close()

    def add(self, batch: pa.RecordBatch, positions: NDArray[np.int64]) -> None:
        """Add rows that have the columns of the schema, with their positions, int64 (N,)."""
        if len(batch):
            self._waiting.append(batch.select(self._schema.names).cast(self._schema))
            self._positions.append(positions)
            if sum(map(len, self._waiting)) >= BATCH_ROWS:
                self._write()

    def _write(self) -> None:
        if self._waiting:
            batch = pa.concat_batches(self._waiting)
            self._writer.write_batch(batch)
            self._starts.append(self._starts[-1] + len(batch))
            self._waiting.clear()

    def take(self, positions: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return some columns of the rows at positions, int64 (M,), in this order. The file has to be closed.

        Each position must have been added. The result is held in memory.
        """
        wanted, order = np.unique(positions, return_inverse=True)
        if len(self._positions) > 1:
            self._positions = [np.concatenate(self._positions)]
        places = np.searchsorted(self._positions[0], wanted)
        found = [self._schema.empty_table().select(list(columns))]
        with pa.memory_map(str(self._path)) as file, pa.ipc.open_file(file) as reader:
            ends = np.searchsorted(places, self._starts)
            for number in np.flatnonzero(ends[1:] > ends[:-1]).tolist():
                batch = reader.get_batch(number).select(list(columns))
                inside = places[ends[number] : ends[number + 1]] - self._starts[number]
                found.append(pa.Table.from_batches([batch.take(pa.array(inside))]))
        return pa.concat_tables(found).combine_chunks().take(pa.array(order))
