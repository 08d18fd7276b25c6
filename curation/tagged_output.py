"""Finished outputs of `sightline tag`, read in one pass: their rows, their embeddings, the head that scored them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import absolute
from pipelines.output.fingerprint import read_columns
from pipelines.output.labels import LabelTable, read_label_table
from pipelines.output.layout import OutputFormat, list_commits, read_json
from siglip.heads import Head
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.files import StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Entry, NotFound, Store, StoreError, StoreOptions, Unreachable, join

ID = "id"
"""The column that `TaggedOutput.batches` adds: `<shard>/<row>`, which no other image of the output has."""


@dataclass(frozen=True)
class TaggedOutput:
    """A finished output: what the manifest of its last run names, and nothing that came after.

    `rows` images are tagged and `rejected` are not, `width` is the embeddings' D.
    """

    uri: str
    store: Store
    manifest: dict[str, Any]
    fingerprint: dict[str, Any]
    table: LabelTable

    @property
    def format(self) -> OutputFormat:
        """The schema of its files."""
        made = self.fingerprint
        return OutputFormat(
            self.width,
            made["embedding_dtype"],
            bool(made["thumbnails"]),
            read_columns(made),
            bands=self.labels.has_bands(),
        )

    @property
    def columns(self) -> list[str]:
        """The columns of `data/`."""
        return list(self.format.data_schema().names)

    @property
    def labels(self) -> LabelSet:
        """The label set that its images were asked."""
        return self.table.labels

    @property
    def head(self) -> Head:
        """What scored its embeddings: `head.scores(read_embeddings(batch))` gives every label's score."""
        return self.table.head

    @property
    def model(self) -> str:
        """The model's source, as the run was configured. It may since be gone."""
        return self.table.model.source

    @property
    def weights(self) -> str:
        """The model's digest."""
        return self.table.weights

    @property
    def width(self) -> int:
        """The embeddings' dimensions."""
        return int(self.head.vectors.shape[1])

    @property
    def rows(self) -> int:
        """The images that were tagged."""
        return int(self.manifest["rows_tagged"])

    @property
    def rejected(self) -> int:
        """The images that were not."""
        return int(self.manifest["rows_rejected"])

    def batches(self, columns: Sequence[str], rows: int = 8192) -> Iterator[pa.RecordBatch]:
        """The tagged rows' `columns`, `id` among them if asked, always in the same order, at most `rows` at a time.

        No more than a row group's wanted columns are in memory. Raises `StoreError`.
        """
        for file in self._files("data"):
            yield from self._read(file, columns, rows)

    def scores(self, head: Head | None = None) -> Iterator[Floats]:
        """All labels' scores of all images, float32 (N, L) at a time, by the output's head or another. One pass."""
        for batch in self.batches(["embedding"]):
            yield (head or self.head).scores(read_embeddings(batch))

    def rejects(self, columns: Sequence[str], rows: int = 8192) -> Iterator[pa.RecordBatch]:
        """The rejected rows' `columns` (key, source, row, stage, reason, detail, id), likewise."""
        for file in self._files("rejects"):
            yield from self._read(file, columns, rows)

    def take(self, places: Sequence[int] | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """The `columns` of the rows at these places in the order of `batches`, as the places stand.

        Only the row groups that hold one are read: cheap for few rows, and all of it is held in memory.
        """
        wanted = np.asarray(places, np.int64)
        order = np.argsort(wanted, kind="stable")
        found: list[pa.Table] = []
        first = 0
        for file in self._files("data"):
            inside = wanted[
                order[np.searchsorted(wanted[order], first) : np.searchsorted(wanted[order], first + file["rows"])]
            ]
            if len(inside):
                found.append(self._take(file, inside - first, columns))
            first += file["rows"]
        if not found:
            return pa.table({name: [] for name in columns})
        return pa.concat_tables(found).take(pa.array(np.argsort(order, kind="stable")))

    def _files(self, kind: Literal["data", "rejects"]) -> Iterator[dict[str, Any]]:
        return (file for file in self.manifest["files"] if file["path"].startswith(f"{kind}/"))

    def _take(self, file: dict[str, Any], rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        stored = _stored(columns)
        with self._open(file) as parquet:
            tables, first = [], 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                inside = rows[(rows >= first) & (rows < first + count)]
                if len(inside):
                    tables.append(parquet.read_row_group(group, columns=stored).take(pa.array(inside - first)))
                first += count
            return _with_id(pa.concat_tables(tables), file, columns)

    @contextmanager
    def _open(self, file: dict[str, Any]) -> Iterator[pq.ParquetFile]:
        # By its size alone: a file's name is its own for ever, and a copy of the output has other ETags.
        entry = Entry(join(self.uri, file["path"]), file["bytes"], "")
        try:
            with StoreFile(self.store, entry) as raw, pq.ParquetFile(raw) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{entry.uri} cannot be read: {error}") from error

    def _read(self, file: dict[str, Any], columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        with self._open(file) as parquet:
            for batch in parquet.iter_batches(rows, columns=_stored(columns)):
                yield _with_id(batch, file, columns)


def _stored(columns: Sequence[str]) -> list[str]:
    stored = [name for name in columns if name != ID]
    return [*stored, "row"] if ID in columns and "row" not in stored else stored


def _with_id(rows: Any, file: dict[str, Any], columns: Sequence[str]) -> Any:
    if ID in columns:
        ids = pc.binary_join_element_wise(shard_of(file["path"]), pc.cast(rows["row"], pa.string()), "/")
        rows = rows.append_column(ID, ids)
    return rows.select(list(columns))


def open_output(uri: str) -> TaggedOutput:
    """A finished output at a folder or s3:// prefix.

    Raises `ConfigError` where there is none, where a run is not finished, and for files that are damaged;
    `storage.store.Unreachable` where the store does not answer.
    """
    root = absolute(uri).rstrip("/")
    try:
        store = open_store(root, StoreOptions.from_environment())
        manifest, fingerprint = _read_state(store, root)
        table = read_label_table(store, root)
    except Unreachable:
        raise
    except NotFound as error:
        raise ConfigError(f"{root} is no finished output of `sightline tag`: {error}") from error
    except StoreError as error:
        raise ConfigError(str(error)) from error
    if table.weights != fingerprint.get("model.weights"):
        raise ConfigError(f"{root}: its labels.parquet is of another model than its fingerprint.json")
    if not any(file["path"].startswith("data/") for file in manifest["files"]):
        raise ConfigError(f"{root} has no tagged image in it")
    return TaggedOutput(root, store, manifest, fingerprint, table)


def read_embeddings(batch: pa.RecordBatch) -> Floats:
    """A batch's `embedding` column as float32 (N, D) of unit norm.

    float32 is taken as it is stored, bit for bit. float16 is normalised again: its rounding moves the norm by up to
    5e-4, which at a scale of 117 would be 0.06 of a logit.
    """
    column = batch["embedding"]
    stored = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    if stored.dtype == np.float32:
        return np.asarray(stored, np.float32)
    vectors = stored.astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def shard_of(path: str) -> str:
    """The shard that a data or reject file is of, by its path in the output."""
    return path.rpartition("/")[2].rpartition("-")[0].partition(".")[0]


def _read_state(store: Store, root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = read_json(store, join(root, "manifest.json"))
    fingerprint = read_json(store, join(root, "fingerprint.json"))
    commits = list_commits(store, root)
    told = manifest["shards"], manifest["generations"]
    whole = manifest["planned_shards"] == manifest["shards"] and (len(commits), sum(commits.values())) == told
    if manifest["waiting"] or not whole:
        raise ConfigError(f"{root} is not finished: run `sightline tag` again, which does what is left")
    return manifest, fingerprint
