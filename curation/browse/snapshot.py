"""What the page knows of an output at one moment: its rows in memory-mapped files, and their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation.index.labels import RowLabels, number_labels
from curation.index.table import name_shard
from curation.tagged_output import TaggedOutput, add_id, read_vectors, stored_columns
from siglip.scoring import Floats


@dataclass(frozen=True)
class Snapshot:
    """The rows of an output that have been copied to this machine, N of them.

    A row's position is its index in the order in which rows were copied. It stays the same in later snapshots of the
    same output. `number` is another one when another output has taken its place: then positions begin anew. `live`,
    bool (N,), is False for rows that are no longer in the output, because their shard was replaced.

    `batches` are the copied rows, each with the number of its shard in the first column (see `name_shard`) and the
    output's own columns behind it. `labels` are the labels of the rows. `rejects` are the images that could not be
    tagged. `wanted` is the number of rows that the output has.
    """

    output: TaggedOutput
    batches: tuple[pa.RecordBatch, ...]
    live: NDArray[np.bool_]
    labels: RowLabels
    rejects: pa.Table
    wanted: int
    version: int
    number: int = 1

    @property
    def rows(self) -> int:
        """The number N of rows that were copied, with those that are no longer in the output."""
        return len(self.live)

    @property
    def has_thumbnails(self) -> bool:
        """Whether the output has thumbnails."""
        return "thumbnail" in self.output.columns

    def starts(self) -> NDArray[np.int64]:
        """The position of the first row of each batch, and N: int64 (B + 1,)."""
        return np.cumsum([0, *map(len, self.batches)], dtype=np.int64)

    def embeddings(self) -> Iterator[tuple[int, Floats]]:
        """Yield the position of each batch's first row, and its embeddings as float32 (K, D) of unit norm."""
        for start, batch in zip(self.starts().tolist(), self.batches, strict=False):
            yield start, read_vectors(batch["embedding"])

    def read(self, batch: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Return columns of one batch, as `TaggedOutput.batches` names them: `id`, and `input_id`, are possible."""
        return self._select(self.batches[batch], columns)

    def take(self, positions: Sequence[int] | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return columns of the rows at some positions, in their order, as `TaggedOutput.take` does."""
        wanted = np.asarray(positions, np.int64)
        starts = self.starts()
        at = np.searchsorted(starts, wanted, side="right") - 1
        order = np.argsort(at, kind="stable")
        parts = []
        for batch in np.unique(at).tolist():
            places = wanted[order[at[order] == batch]] - starts[batch]
            parts.append(pa.Table.from_batches([self._select(self.batches[batch], columns, pa.array(places))]))
        if not parts:
            return pa.table({name: [] for name in columns})
        return pa.concat_tables(parts).take(pa.array(np.argsort(order, kind="stable")))

    def thumbnail(self, position: int) -> bytes | None:
        """Return the thumbnail of a row, a JPEG, or None if it has none."""
        if not self.has_thumbnails:
            return None
        starts = self.starts()
        batch = int(np.searchsorted(starts, position, side="right")) - 1
        value: bytes | None = self.batches[batch]["thumbnail"][position - int(starts[batch])].as_py()
        return value

    def find(self, label: str) -> NDArray[np.bool_]:
        """Tell for each row whether the output has given it a label of its label set, bool (N,)."""
        return self.labels.have_all([number_labels(self.output)[label]])

    def count_labels(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
        """Count how many of some rows, bool (N,), have each label, int64 (L,), and how many have none."""
        lengths = np.diff(self.labels.starts)
        known = len(self.output.labels.names)
        counts = np.bincount(self.labels.numbers[np.repeat(rows, lengths)], minlength=known)
        return counts.astype(np.int64), int(rows[lengths == 0].sum())

    def find_live(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each position, int64 (K,), that of the same image in the output now, -1 if it is not there.

        They differ where a shard was replaced, as by a retry of its rejected images.
        """
        found = positions.copy()
        stale = np.flatnonzero(~self.live[positions])
        if not len(stale):
            return found
        starts = self.starts()
        at = np.searchsorted(starts, positions[stale], side="right") - 1
        places: dict[tuple[int, int], list[int]] = {}
        for index, batch, position in zip(stale.tolist(), at.tolist(), positions[stale].tolist(), strict=True):
            row = position - int(starts[batch])
            image = self.batches[batch].column(0)[row].as_py(), self.batches[batch]["row"][row].as_py()
            places.setdefault(image, []).append(index)
        found[stale] = -1
        shards = np.unique([shard for shard, _ in places])
        for start, batch in zip(starts.tolist(), self.batches, strict=False):
            numbers = batch.column(0).to_numpy()
            for place in np.flatnonzero(np.isin(numbers, shards) & self.live[start : start + len(batch)]).tolist():
                image = int(numbers[place]), batch["row"][place].as_py()
                found[places.get(image, [])] = start + place
        return found

    def _select(self, batch: pa.RecordBatch, columns: Sequence[str], places: pa.Array | None = None) -> pa.RecordBatch:
        # The output may have a column of the same name as the first one, so names are looked up in the others.
        own = pa.RecordBatch.from_arrays(batch.columns[1:], schema=pa.schema([*batch.schema][1:]))
        stored, shards = own.select(stored_columns(columns, self.output)), batch.column(0)
        if places is not None:
            stored, shards = stored.take(places), shards.take(places)
        return add_id(stored, _name_shards(shards), columns)


def _name_shards(numbers: pa.Array) -> pa.Array:
    encoded = pc.dictionary_encode(numbers)
    names = pa.array([name_shard(number) for number in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)
