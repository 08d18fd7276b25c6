"""Writing an output's row files: parts, data files and reject files."""

from __future__ import annotations

import hashlib
import io
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import Output
from pipelines.output.schema import ROW_GROUP_ROWS, OutputFormat, parquet_options

FINGERPRINT_KEY = b"sightline.fingerprint"
"""The key of the output's fingerprint in the metadata of a Parquet file."""

_SPOOLED_BYTES = 64 * 2**20
"""Files up to this size are encoded in memory, larger ones on the local disk."""


@dataclass(frozen=True)
class OutputWriter:
    """Writes row files to an output, in its format. Small and picklable, because it is sent to every sink and commit.

    `fingerprint` is the text of the output's `fingerprint.json`, which each data and reject file carries.
    """

    output: Output
    format: OutputFormat
    fingerprint: str

    def write_part(self, shard: str, rows: pa.Table) -> str:
        """Write rows of a shard to a new part, and return the part's URI.

        `shard` is a name as `pipelines.output.output.shard_name` returns it. `rows` needs the columns of
        `OutputFormat.part_schema`; other columns are dropped.
        """
        schema = self.format.part_schema()
        table = pa.table({name: rows[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, schema) as writer:
            writer.write_table(table)
        uri = self.output.uri_of(f"parts/{shard}/{uuid.uuid4().hex}.arrow")
        self.output.store.put(uri, buffer.getvalue())
        return uri

    def write_file(
        self, kind: Literal["data", "rejects"], shard: str, tables: Iterable[pa.Table]
    ) -> list[dict[str, Any]]:
        """Write a data or reject file of a shard, holding one row group at a time in memory.

        `tables` must have the file's schema. Returns a list with the file's entry for the commit record; if there are
        no rows, no file is written and the list is empty. The file is written only when `tables` has ended without an
        exception.
        """
        rows = 0
        schema = self.format.data_schema() if kind == "data" else self.format.rejects_schema()
        metadata = {FINGERPRINT_KEY: self.fingerprint.encode()}
        with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spool:
            with pq.ParquetWriter(spool, schema.with_metadata(metadata), **parquet_options(schema)) as file:
                for table in _group_rows(tables):
                    file.write_table(table, row_group_size=ROW_GROUP_ROWS)
                    rows += table.num_rows
            if not rows:
                return []
            path = f"{kind}/{shard}-{uuid.uuid4().hex[:12]}.parquet"
            entry = self.output.store.put(self.output.uri_of(path), spool)
            spool.seek(0)
            digest = hashlib.file_digest(spool, "sha256")
            return [{"path": path, "rows": rows, "bytes": entry.size, "etag": entry.etag, "sha256": digest.hexdigest()}]


def _group_rows(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Regroup tables, so that each holds whole row groups and only the last one holds the rest."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        rows = sum(each.num_rows for each in waiting)
        if rows >= ROW_GROUP_ROWS:
            whole = pa.concat_tables(waiting)
            full = rows - rows % ROW_GROUP_ROWS
            yield whole.slice(0, full)
            waiting = [whole.slice(full)]
    if any(each.num_rows for each in waiting):
        yield pa.concat_tables(waiting)
