"""Reader of a finished output of `sightline tag`: its rows, its embeddings, and the head that scored them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import absolute
from pipelines.output.labels import LabelTable, make_format, read_label_table
from pipelines.output.ledger import Ledger
from pipelines.output.output import FINGERPRINT, MANIFEST, MANIFEST_VERSION, Output
from pipelines.output.row_files import RowFile, read_slices
from pipelines.output.schema import OutputFormat
from siglip.heads import LinearHead
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError
from storage.store import NotFound, Store, StoreError, StoreOptions, Unreachable

ID = "id"
"""Name of the column that `TaggedOutput` adds when it is requested: `<shard>/<row>`, unique within the output."""
INPUT_ID = "input_id"
"""Name of the passed-through column `id`, if an output has one, where `id` is the column that `TaggedOutput` adds."""


@dataclass(frozen=True)
class TaggedOutput:
    """A finished output, read-only: the shards in the ledgers that the manifest of its last run names.

    What a later run writes is not seen: open the output again to see it. A row's *position* is its index in
    the order of `batches`, which is always the same order for the same manifest.
    """

    output: Output
    ledger: Ledger
    manifest: dict[str, Any]
    fingerprint: dict[str, Any]
    table: LabelTable

    @property
    def uri(self) -> str:
        """The folder or s3://, gs:// or az:// prefix of the output."""
        return self.output.uri

    @property
    def store(self) -> Store:
        """The store that holds the output."""
        return self.output.store

    @property
    def format(self) -> OutputFormat:
        """The schema of the output's data and reject files."""
        return make_format(self.fingerprint, self.table)

    @property
    def columns(self) -> list[str]:
        """The names of the columns in `data/`. The `id` column is not stored and not among them."""
        return list(self.format.data_schema().names)

    @property
    def labels(self) -> LabelSet:
        """The label set that the images were scored with."""
        return self.table.labels

    @property
    def head(self) -> LinearHead:
        """The head that scored the embeddings: `head.scores(read_embeddings(batch))` gives float32 (N, L) scores."""
        return self.table.head

    @property
    def model(self) -> str:
        """The model's source, as the run's config named it. The checkpoint may no longer be there."""
        return self.table.model.source

    @property
    def weights(self) -> str:
        """The digest that identifies the model's weights."""
        return self.table.weights

    @property
    def width(self) -> int:
        """The number of dimensions D of an embedding."""
        return int(self.head.vectors.shape[1])

    @property
    def rows(self) -> int:
        """The number of tagged images."""
        return int(self.manifest["rows_tagged"])

    @property
    def rejected(self) -> int:
        """The number of images in the whole output that could not be tagged, from the manifest."""
        return int(self.manifest["rows_rejected"])

    def describe_waiting(self) -> str:
        """One line about the inputs that the last run could not plan; empty if there were none.

        Their images are not in the output. Of an input that changed, the images of its earlier version are.
        """
        waiting = self.manifest["waiting"]
        if not waiting:
            return ""
        counts, first = _count_reasons(waiting), waiting[0]["detail"]
        return f"inputs wait and are not in {self.uri}, or in an earlier version: {counts}, such as {first}"

    def batches(self, columns: Sequence[str], rows: int = 8192) -> Iterator[pa.RecordBatch]:
        """Yield the tagged rows as record batches of at most `rows` rows, always in the same order.

        `columns` may include `id`, and `input_id` for the output's own column `id`. Memory holds the requested columns
        of one row group at a time. Raises `StoreError`.
        """
        for slices in self._files("data"):
            yield from self._read(slices, columns, rows)

    def shard_batches(
        self, shards: Collection[str], columns: Sequence[str], rows: int = 8192
    ) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Yield the tagged rows of some shards: batches of stored columns, with the shard and the first row's position.

        Reads only the files that have rows of these shards. Raises `StoreError`.
        """
        position = 0
        for slices in self._files("data"):
            starts = [position]
            for _, file in slices:
                starts.append(starts[-1] + file.rows)
            position = starts[-1]
            chosen = [(str(number), file) for number, (shard, file) in enumerate(slices) if shard in shards]
            if chosen:
                with self._open(slices) as parquet:
                    for number, batch in read_slices(parquet, chosen, columns, rows):
                        yield slices[int(number)][0], starts[int(number)], batch
                        starts[int(number)] += len(batch)

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Yield the shards in the order of `batches`: a shard, its first row's position, and the number of its rows.

        A shard whose rows are in several files may come several times. Reads the ledgers, and no rows.
        """
        first = 0
        for slices in self._files("data"):
            for shard, file in slices:
                yield shard, first, file.rows
                first += file.rows

    def find_positions(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the positions of the rows with these ids, int64 (N,), -1 for an id that no row has.

        Reads one small column of the ids' shards. Raises `StoreError`.
        """
        wanted: dict[str, dict[int, list[int]]] = {}
        for index, id_ in enumerate(ids):
            shard, _, row = id_.rpartition("/")
            wanted.setdefault(shard, {}).setdefault(int(row), []).append(index)
        found = np.full(len(ids), -1, np.int64)
        for shard, first, batch in self.shard_batches(wanted.keys(), ["row"]) if wanted else ():
            rows = batch["row"].to_numpy()
            for place in np.flatnonzero(np.isin(rows, list(wanted[shard]))).tolist():
                found[wanted[shard][int(rows[place])]] = first + place
        return found

    def scores(self, head: LinearHead | None = None) -> Iterator[Floats]:
        """Yield the scores of all labels for all images, float32 (N, L) for each batch, in one pass.

        Uses the output's own head unless `head` is given.
        """
        for batch in self.batches(["embedding"]):
            yield (head or self.head).scores(read_embeddings(batch))

    def rejects(self, columns: Sequence[str], rows: int = 8192) -> Iterator[pa.RecordBatch]:
        """Yield the rejected rows, as `batches` does. Columns: key, source, row, stage, reason, detail, id."""
        for slices in self._files("rejects"):
            yield from self._read(slices, columns, rows)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all tagged rows into one table, in the order of `batches`.

        `columns` are all columns of `data/` by default and may include `id`, which is a passed-through column of this
        name if the output has one. The whole table is held in memory: a
        million embeddings of 768 float32 take 3 GB. Use `batches` for an output that is larger than memory.

        Raises `ConfigError` for a column that the output does not have, and `StoreError`.
        """
        wanted = self.columns if columns is None else list(columns)
        if unknown := [name for name in wanted if name != ID and name not in self.columns]:
            known = ", ".join([ID, *self.columns])
            raise ConfigError(f"{self.uri} has no column {unknown[0]!r}: its columns are {known}")
        if ID in self.columns:  # a passed-through column of this name is the user's own
            return pa.Table.from_batches(
                batch for slices in self._files("data") for batch in self._read(slices, wanted, 8192, with_id=False)
            )
        return pa.Table.from_batches(self.batches(wanted))

    def take(self, positions: Sequence[int] | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Read the rows at some positions into one table, in the order of `positions`, which may repeat.

        Reads only the row groups that hold one of the rows, so that a few rows cost little. The result is held in
        memory. Raises `StoreError`.
        """
        wanted = np.asarray(positions, np.int64)
        order = np.argsort(wanted, kind="stable")
        found: list[pa.Table] = []
        first = 0
        for slices in self._files("data"):
            stop = first + sum(file.rows for _, file in slices)
            inside = wanted[order[np.searchsorted(wanted[order], first) : np.searchsorted(wanted[order], stop)]]
            if len(inside):
                found.append(self._take(slices, inside - first, columns))
            first = stop
        if not found:
            return pa.table({name: [] for name in columns})
        return pa.concat_tables(found).take(pa.array(np.argsort(order, kind="stable")))

    def _files(self, kind: Literal["data", "rejects"]) -> Iterator[list[tuple[str, RowFile]]]:
        """Yield the files of this kind, each as the shards whose rows it holds, in the order of the file."""
        files = self.ledger.list_files([kind])
        for _, slices in groupby(files, key=lambda pair: pair[1].path):
            yield sorted(slices, key=lambda pair: pair[1].first)

    def _take(self, slices: list[tuple[str, RowFile]], rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Read some rows, given by their index in the slices one after the other, in ascending order."""
        stored = stored_columns(columns, self)
        starts = np.cumsum([0, *(file.rows for _, file in slices)])
        part = np.searchsorted(starts, rows, side="right") - 1
        places = rows - starts[part] + np.asarray([file.first for _, file in slices])[part]
        with self._open(slices) as parquet:
            tables, first = [], 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                inside = (places >= first) & (places < first + count)
                if inside.any():
                    table = parquet.read_row_group(group, columns=stored).take(pa.array(places[inside] - first))
                    shards = pa.array([slices[number][0] for number in part[inside].tolist()])
                    tables.append(add_id(table, shards, columns))
                first += count
            return pa.concat_tables(tables)

    def _open(self, slices: list[tuple[str, RowFile]]) -> AbstractContextManager[pq.ParquetFile]:
        return self.output.open_rows(slices[0][1].path, slices[0][1].bytes)

    def _read(
        self, slices: list[tuple[str, RowFile]], columns: Sequence[str], rows: int, *, with_id: bool = True
    ) -> Iterator[pa.RecordBatch]:
        with self._open(slices) as parquet:
            stored = stored_columns(columns, self) if with_id else list(columns)
            for shard, batch in read_slices(parquet, slices, stored, rows):
                yield add_id(batch, shard, columns) if with_id else batch.select(list(columns))


def stored_columns(columns: Sequence[str], output: TaggedOutput) -> list[str]:
    """Return the columns of `data/` that are needed for `columns`, which may include `id` and `input_id`."""
    own_id = ID in output.columns and INPUT_ID not in output.columns
    stored = [ID if name == INPUT_ID and own_id else name for name in columns if name != ID]
    return [*stored, "row"] if ID in columns and "row" not in stored else stored


def add_id(rows: Any, shard: Any, columns: Sequence[str]) -> Any:
    """Return `columns` of rows that have the `stored_columns` of them, with the column `id` if it is among them.

    `rows` is a table or a record batch. `shard` is the name of the rows' shard, or an array of names.
    """
    if INPUT_ID in columns and INPUT_ID not in rows.schema.names:
        rows = rows.rename_columns([INPUT_ID if name == ID else name for name in rows.schema.names])
    if ID in columns:
        ids = pc.binary_join_element_wise(shard, pc.cast(rows["row"], pa.string()), "/")
        rows = rows.append_column(ID, ids)
    return rows.select(list(columns))


def open_output(uri: str) -> TaggedOutput:
    """Open the finished output at a folder or an s3://, gs:// or az:// prefix.

    Inputs that the last run could not plan do not matter: see `TaggedOutput.describe_waiting`. Raises `ConfigError`
    when there is no output, when planned shards are not committed, and when its metadata files are damaged;
    `storage.store.Unreachable` when the store does not answer.
    """
    root = absolute(uri).rstrip("/")
    try:
        output = Output(root, StoreOptions.from_environment())
        manifest, fingerprint = _read_state(output)
        ledger = Ledger.read(output, manifest["ledgers"])
        table = read_label_table(output)
    except Unreachable:
        raise
    except NotFound as error:
        raise ConfigError(f"{root} is not a finished output of `sightline tag`: {error}") from error
    except StoreError as error:
        raise ConfigError(str(error)) from error
    if table.weights != fingerprint.get("model.weights"):
        raise ConfigError(f"{root}: labels.parquet and fingerprint.json name different models")
    if not manifest["rows_tagged"]:
        raise ConfigError(f"{root} contains no tagged image")
    return TaggedOutput(output, ledger, manifest, fingerprint, table)


def read_embeddings(rows: pa.RecordBatch | pa.Table) -> Floats:
    """Read the `embedding` column of some rows as float32 (N, D) of unit norm."""
    column = rows["embedding"]
    return read_vectors(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


def read_vectors(column: pa.FixedSizeListArray) -> Floats:
    """Read embeddings as an output stores them, as float32 (N, D) of unit norm.

    float32 embeddings are returned bit for bit as stored. float16 embeddings are normalised again, because rounding to
    float16 moves the norm by up to 5e-4, which is 0.06 of a logit at a logit scale of 117.
    """
    stored = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    if stored.dtype == np.float32:
        return np.asarray(stored, np.float32)
    vectors = stored.astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _read_state(output: Output) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = output.read_json(MANIFEST)
    if manifest.get("schema_version") != MANIFEST_VERSION:
        raise ConfigError(
            f"{output.uri} was written by another version of Sightline: if it was an earlier one, run `sightline "
            f"upgrade {output.uri}`, which takes seconds; otherwise install that version"
        )
    fingerprint = output.read_json(FINGERPRINT)
    planned, shards = manifest["planned_shards"], manifest["shards"]
    if planned != shards:
        waits = _count_reasons(manifest["waiting"])
        why = f" ({waits})" if waits else ""
        raise ConfigError(
            f"{output.uri} is not finished: {shards} of {planned} shards are committed{why}: run `sightline tag` again"
        )
    return manifest, fingerprint


def _count_reasons(waiting: Sequence[dict[str, Any]]) -> str:
    counts = Counter(item["reason"] for item in waiting)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
