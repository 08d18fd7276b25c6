"""Writing an output's row files: parts, data files and reject files."""

from __future__ import annotations

import hashlib
import io
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import Output
from pipelines.output.schema import FILE_BYTES, ROW_GROUP_BYTES, ROW_GROUP_ROWS, OutputFormat, parquet_options
from storage.files import SPOOLED_BYTES
from storage.store import StoreError

FINGERPRINT_KEY = b"sightline.fingerprint"
"""The key of the output's fingerprint in the metadata of a Parquet file."""


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

    def open_files(self, kind: Literal["data", "rejects"], shard: str) -> RowFiles:
        """Return the writer of a shard's data or reject files."""
        return RowFiles(self, kind, shard)


class RowFiles:
    """Writes a shard's rows of one kind to files of bounded size. Use it in a `with` block.

    Memory holds one row group. When the block ends without an exception, `entries` has the files' entries for the
    commit record, in the order of the rows; without rows, no file is written. When it ends with an exception, the files
    that are already written are deleted.
    """

    def __init__(self, writer: OutputWriter, kind: Literal["data", "rejects"], shard: str) -> None:
        self.entries: list[dict[str, Any]] = []
        self._output = writer.output
        self._prefix = f"{kind}/{shard}"
        self.schema = writer.format.data_schema() if kind == "data" else writer.format.rejects_schema()
        """The schema that all tables must have."""
        self._metadata = {FINGERPRINT_KEY: writer.fingerprint.encode()}
        self._waiting: list[pa.Table] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._spool: IO[bytes] | None = None
        self._file: pq.ParquetWriter | None = None
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self._waiting_bytes += table.nbytes
        if self._waiting_rows >= ROW_GROUP_ROWS or self._waiting_bytes >= ROW_GROUP_BYTES:
            self._write_groups(to_the_end=self._waiting_bytes >= ROW_GROUP_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write_groups(to_the_end=True)
                self._close_file()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _write_groups(self, *, to_the_end: bool) -> None:
        """Write the rows that wait: all of them, or only whole row groups."""
        rows = pa.concat_tables(self._waiting or [self.schema.empty_table()])
        stop = rows.num_rows if to_the_end else rows.num_rows - rows.num_rows % ROW_GROUP_ROWS
        for start in range(0, stop, ROW_GROUP_ROWS):
            if self._file is None:
                self._open_file()
            assert self._file is not None
            assert self._spool is not None
            group = rows.slice(start, min(ROW_GROUP_ROWS, stop - start))
            self._file.write_table(group, row_group_size=ROW_GROUP_ROWS)
            self._rows += group.num_rows
            if self._spool.tell() >= FILE_BYTES:
                self._close_file()
        rest = rows.slice(stop)
        self._waiting, self._waiting_rows, self._waiting_bytes = [rest], rest.num_rows, rest.nbytes

    def _open_file(self) -> None:
        self._spool = tempfile.SpooledTemporaryFile(SPOOLED_BYTES)  # noqa: SIM115
        schema = self.schema.with_metadata(self._metadata)
        self._file = pq.ParquetWriter(self._spool, schema, **parquet_options(self.schema))

    def _close_file(self) -> None:
        """Finish the current file, if there is one, and write it to the output."""
        if self._file is None or self._spool is None:
            return
        self._file.close()
        path = f"{self._prefix}-{uuid.uuid4().hex[:12]}.parquet"
        with self._spool as spool:
            entry = self._output.store.put(self._output.uri_of(path), spool)
            spool.seek(0)
            digest = hashlib.file_digest(spool, "sha256").hexdigest()  # type: ignore[arg-type]
        self.entries.append(
            {"path": path, "rows": self._rows, "bytes": entry.size, "etag": entry.etag, "sha256": digest}
        )
        self._file, self._spool, self._rows = None, None, 0

    def _discard(self) -> None:
        """Delete what was written. An exception is on its way, so trouble with the store is ignored."""
        if self._file is not None and self._spool is not None:
            self._file.close()
            self._spool.close()
        for entry in self.entries:
            with suppress(StoreError):
                self._output.delete(entry["path"])
        self.entries.clear()
