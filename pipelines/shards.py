"""A shard's files: parts while it is in work, then one data file, one rejects file and one commit record.

Parts are what makes the model's work safe before a shard is complete. They lie beside `data/`, never in it. Committing
reads a shard's parts, keeps each row once (a replayed task may have written it twice), writes the final files, and
only then puts the commit record, which is the moment that counts: a shard without one is not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.store import Store, StoreOptions, join, open_store

FINGERPRINT_KEY = b"sightline.fingerprint"
_ROW_GROUP_ROWS = 4096


@dataclass(frozen=True)
class OutputFormat:
    """The schema of the output: what the configuration can change about it."""

    width: int
    embedding_dtype: Literal["float32", "float16"]
    thumbnails: bool
    columns: pa.Schema

    def data_schema(self) -> pa.Schema:
        """`data/`: one row for each tagged image."""
        dtype = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        fields = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("labels", pa.list_(pa.string())),
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(dtype, self.width)),
            pa.field("metadata", pa.string()),
        ]
        if self.thumbnails:
            fields.append(pa.field("thumbnail", pa.binary()))
        return pa.schema([*fields, *self.columns])

    def rejects_schema(self) -> pa.Schema:
        """`rejects/`: one row for each image that could not be tagged."""
        names = ("key", "source", "row", "stage", "reason", "detail")
        return pa.schema([pa.field(name, pa.int64() if name == "row" else pa.string()) for name in names])


@dataclass(frozen=True)
class PartWriter:
    """Where and in what format a job writes. Travels to the sink and to the commit tasks."""

    output: str
    options: StoreOptions
    format: OutputFormat
    fingerprint: str

    def write(self, shard: str, rows: pa.Table) -> str:
        """Write rows of a shard as a part. Returns its URI."""
        wanted = {field.name: field for field in [*self.format.data_schema(), *self.format.rejects_schema()]}
        # Both kinds of row share a part, and a rejected one has no size, labels or embedding.
        schema = pa.schema([field.with_nullable(True) for field in wanted.values()])
        table = pa.table({name: rows[name].cast(field.type) for name, field in wanted.items()}, schema=schema)
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, schema) as writer:
            writer.write_table(table)
        uri = join(self.output, "parts", shard, f"{uuid.uuid4().hex}.arrow")
        open_store(self.output, self.options).put(uri, buffer.getvalue())
        return uri

    def commit(self, shard: str, parts: Sequence[str], rows_in: int) -> dict[str, Any]:
        """Turn the parts into the shard's files and put its commit record. Returns the record that is in place.

        When another run committed the shard first, its record stands and the files written here are removed. Raises
        `RuntimeError` when the parts do not hold every row.
        """
        store = open_store(self.output, self.options)
        table = _read_parts(store, parts)
        if table is None:
            table = pa.table({"row": pa.array([], pa.int64())})
            data = rejects = None
        else:
            data = table.filter(pc.is_null(table["reason"]))
            rejects = table.filter(pc.is_valid(table["reason"]))
        if not np.array_equal(table["row"].to_numpy(), np.arange(rows_in)):
            raise RuntimeError(f"shard {shard} has {table.num_rows} rows where {rows_in} were read")
        files = []
        for kind, rows, schema in (
            ("data", data, self.format.data_schema()),
            ("rejects", rejects, self.format.rejects_schema()),
        ):
            if rows is not None and rows.num_rows:
                files.append(self._write_file(store, kind, shard, rows.select(schema.names).cast(schema)))
        record = {
            "shard": shard,
            "rows_in": rows_in,
            "rows_tagged": data.num_rows if data is not None else 0,
            "rows_rejected": rejects.num_rows if rejects is not None else 0,
            "reasons": _count(rejects, "reason"),
            "labels": _count_labels(data),
            "files": files,
            "fingerprint": hashlib.sha256(self.fingerprint.encode()).hexdigest(),
        }
        uri = commit_uri(self.output, shard)
        content = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        if not store.put_if_absent(uri, content):
            for file in files:
                store.delete(join(self.output, file["path"]))
            record = json.loads(store.read(uri))
        for part in parts:
            store.delete(part)
        return record

    def _write_file(self, store: Store, kind: str, shard: str, rows: pa.Table) -> dict[str, Any]:
        # Scores and vectors are close to random bits: dictionaries of them cost time and save nothing.
        repeated = ["source", "labels.list.element", "stage", "reason"]
        buffer = io.BytesIO()
        pq.write_table(
            rows.replace_schema_metadata({FINGERPRINT_KEY: self.fingerprint.encode()}),
            buffer,
            compression="zstd",
            use_dictionary=repeated,
            row_group_size=_ROW_GROUP_ROWS,
        )
        data = buffer.getvalue()
        path = f"{kind}/{shard}-{uuid.uuid4().hex[:12]}.parquet"
        entry = store.put(join(self.output, path), data)
        return {
            "path": path,
            "rows": rows.num_rows,
            "bytes": len(data),
            "etag": entry.etag,
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def commit_uri(output: str, shard: str) -> str:
    """Where a shard's commit record stands."""
    return join(output, "commits", f"{shard}.json")


def encode_rows(rows: NDArray[np.int64]) -> list[int]:
    """Row numbers as flat [start, stop, start, stop, ...] runs: a block's rows are one run, or a few."""
    if not len(rows):
        return []
    ordered = np.unique(rows)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.r_[0, breaks + 1]]
    stops = ordered[np.r_[breaks, len(ordered) - 1]] + 1
    return [int(n) for pair in zip(starts, stops, strict=True) for n in pair]


def covers(runs: Sequence[Sequence[int]], rows_in: int) -> bool:
    """Whether runs, from several receipts and perhaps overlapping, hold every row of [0, rows_in)."""
    pairs = sorted((run[i], run[i + 1]) for run in runs for i in range(0, len(run), 2))
    reached = 0
    for start, stop in pairs:
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= rows_in


def _read_parts(store: Store, parts: Sequence[str]) -> pa.Table | None:
    tables = [pa.ipc.open_file(pa.py_buffer(store.read(part))).read_all() for part in parts]
    if not tables:
        return None
    table = pa.concat_tables(tables)
    _, first = np.unique(table["row"].to_numpy(), return_index=True)
    return table.take(pa.array(first))


def _count(table: pa.Table | None, column: str) -> dict[str, int]:
    if table is None:
        return {}
    return {item["values"]: item["counts"] for item in pc.value_counts(table[column]).to_pylist()}


def _count_labels(table: pa.Table | None) -> dict[str, int]:
    """How many images carry each label, the best label of each image only: tags by label add up to the images."""
    if table is None:
        return {}
    best = [labels[0] for labels in table["labels"].to_pylist() if labels]
    return {item["values"]: item["counts"] for item in pc.value_counts(pa.array(best, pa.string())).to_pylist()}
