"""Parquet files with an image column: bytes, structs {bytes, path} as Hugging Face `datasets` writes, or URIs.

The file of a user may be anything. Whatever pyarrow raises while it reads a file becomes a reject row of that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs.image_columns import ImageColumn, UnreadableFile, choose_image_column, find_column, is_string
from pipelines.inputs.parquet.rows import Batch
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped, lost_row
from storage.files import LEAST_BYTES, READ_BYTES, StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions

KIND: Kind = "parquet"
SUFFIXES = (".parquet", ".pq")

_FOOTER_BYTES = 1 << 20
"""Bytes that are read from the end of a file in the first request, so that most footers need no second one."""
_MAX_FOOTER_BYTES = 256 << 20
"""Footers of more bytes are not read. Parsed, a footer takes about ten times its bytes."""
_LARGE_FOOTER = Lock()
"""Held while a footer of more than `_FOOTER_BYTES` is parsed: sixteen files are inspected at the same time."""
_ROWS, _BATCH_BYTES = 16, 128 << 20
"""Rows of the file that are in memory at once, and their bytes by the footer. A camera photo has about 5 MB."""
_REMOTE_ROWS = 100
"""A file with as many URLs or more, and nothing else, is skipped. Fewer are reject rows."""
_REMOTE = ("http://", "https://")
_MAX_ROWS = 1 << 40
"""A row group that claims more rows is broken."""


def recognizes(name: str) -> bool:
    """Tell whether an object is a Parquet file, by its lower-case name."""
    return name.endswith(SUFFIXES)


def inspect(planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
    """Split a file into runs of row groups with about `rows_per_shard` rows. A file without images has no parts.

    A file that cannot be read becomes one part; reading it gives a reject row with the error. Raises `ConfigError` if a
    configured column is missing or of a wrong type, or if two columns are equally likely to hold the images.
    """
    try:
        return _inspect(planned, config, options)
    except (ConfigError, StoreError):
        raise
    except Exception:  # pyarrow raises errors of many kinds for odd files: KeyError, MemoryError, UnicodeDecodeError
        return InputStats([planned])


def _inspect(planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
    with StoreFile(open_store(planned.uri, options), planned.entry, _FOOTER_BYTES) as raw:
        large = _read_footer_length(raw, planned.size) > _FOOTER_BYTES
        if large:
            _LARGE_FOOTER.acquire()
        try:
            with pq.ParquetFile(raw) as file:
                schema, metadata = file.schema_arrow, file.metadata
            column = find_columns(planned, schema, config.parquet)
            if column is None:
                return InputStats([], skipped="Parquet files without an image column")
            counts = _count_rows(metadata)
            if is_string(column.type) and sum(counts) >= _REMOTE_ROWS and _holds_only_urls(metadata, column):
                return InputStats([], skipped="Parquet files of http(s) URLs, which are not fetched")
            small = frozenset(name for name in config.parquet.columns if _holds_small_integers(metadata, name))
        finally:
            if large:
                _LARGE_FOOTER.release()
    planned = replace(planned, column=column.name)
    parts: list[Input] = [] if counts else [replace(planned, rows=0)]
    start, rows = 0, 0
    for group, count in enumerate(counts):
        rows += count
        if rows >= config.rows_per_shard or group == len(counts) - 1:
            parts.append(replace(planned, start=start, stop=group + 1, rows=rows))
            start, rows = group + 1, 0
    return InputStats(parts, schema, small, column.name)


def find_columns(planned: Input, schema: pa.Schema, config: ParquetConfig) -> ImageColumn | None:
    """Return the image column, or None if the file has none.

    It is the configured one, else the one that was planned, else the one that fits best. Raises `ConfigError` if a
    configured column is missing or has a wrong type, `UnreadableFile` if a column's name is not unique.
    """
    for name in (config.key_column, *config.columns):
        if name is not None and schema.names.count(name) > 1:
            raise UnreadableFile(f"{schema.names.count(name)} columns have the name {name!r}")
    if (key := config.key_column) is not None:
        if key not in schema.names:
            raise ConfigError(
                f"parquet.key_column: {planned.uri} has no column {key!r}; it has {', '.join(schema.names) or 'none'}"
            )
        if pa.types.is_nested(type_ := schema.field(key).type):
            raise ConfigError(f"parquet.key_column: {key!r} of {planned.uri} is {type_}: expected text or a number")
    if config.image_column is None and planned.column is not None:
        found = find_column(schema, planned.column)
        if found is None:
            raise UnreadableFile(f"there is no column {planned.column!r}")
        return found
    return choose_image_column(schema, config.image_column, planned.uri)


def read(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    """Yield the rows of the planned row groups, in order. Fetches images that the file names by URI.

    A list of images gives a row for each image. What cannot be read ends the file, with a reject row that says so.
    """
    count = 0
    try:
        for row in _read_rows(planned, reading, skipped):
            yield row
            count += 1
    except StoreError as error:
        yield reading.reject_or_raise(planned, error, count)
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises errors of many kinds for odd files
        text = " ".join(str(error).split())
        known = isinstance(error, (UnreadableFile, pa.ArrowException, OSError, ValueError)) and text
        yield lost_row(planned, "corrupt_archive", text if known else f"{type(error).__name__}: {text}", count)


def _read_rows(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    config = reading.parquet
    with StoreFile(open_store(planned.uri, reading.store), planned.entry) as raw:
        _read_footer_length(raw, planned.size)
        # Columns are streamed, so that a row group of a gigabyte is never in memory as a whole.
        with pq.ParquetFile(raw, buffer_size=READ_BYTES) as file:
            schema = file.schema_arrow
            column = find_columns(planned, schema, config)
            if column is None:
                raise UnreadableFile(f"no image column among {', '.join(schema.names)}")
            passed = {source: name for source, name in config.columns.items() if source in schema.names}
            wanted = {column.path[0] if column.many else column.name, *passed}
            wanted |= {config.key_column} if config.key_column else set()
            counts = _count_rows(file.metadata)
            number = sum(counts[: planned.start])
            for group in range(planned.start, planned.stop or len(counts)):
                size, values = _measure(file, group, column)
                read = 0
                for batch in file.iter_batches(size, row_groups=[group], columns=sorted(wanted)):
                    yield from Batch(batch, column, planned, reading).rows(number + read, passed, skipped)
                    read += batch.num_rows
                if not read == counts[group] == values:
                    raise UnreadableFile(
                        f"row group {group} has {read} rows and {values} images where the footer says {counts[group]}"
                    )
                number += read


def _read_footer_length(raw: StoreFile, size: int) -> int:
    """Return the length of a file's footer in bytes, or 0 if this is no Parquet file."""
    raw.seek(max(0, size - LEAST_BYTES))
    tail = raw.read()
    raw.seek(0)
    if len(tail) < 8 or tail[-4:] not in (b"PAR1", b"PARE"):
        return 0
    length = int.from_bytes(tail[-8:-4], "little")
    if length > _MAX_FOOTER_BYTES:
        raise UnreadableFile(f"its footer has {length} bytes; at most {_MAX_FOOTER_BYTES} are read")
    return length


def _count_rows(metadata: pq.FileMetaData) -> list[int]:
    """Return the number of rows in each row group."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if any(not 0 <= count <= _MAX_ROWS for count in counts):
        raise UnreadableFile(f"the footer says that a row group has {min(counts)} to {max(counts)} rows")
    return counts


def _measure(file: pq.ParquetFile, group: int, column: ImageColumn) -> tuple[int, int]:
    """Return how many rows of a row group to read at once, and its number of images by the image column's chunks.

    The number of lists in a column is not in the footer: for a column of lists it is the number of rows.
    """
    metadata = file.metadata.row_group(group)
    images, total = metadata.num_rows, 0
    for number in range(metadata.num_columns):
        chunk = metadata.column(number)
        if chunk.path_in_schema != column.name and not chunk.path_in_schema.startswith(f"{column.name}."):
            continue
        total += max(0, chunk.total_uncompressed_size)
        if file.schema.column(number).max_repetition_level == 0 and chunk.num_values != metadata.num_rows:
            images = chunk.num_values
    return max(1, min(_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, total))), images


def _holds_only_urls(metadata: pq.FileMetaData, column: ImageColumn) -> bool:
    """Tell whether the file's statistics prove that all values of a column begin with http:// or https://."""
    bounds: list[object] = []
    for group in range(metadata.num_row_groups):
        if not metadata.row_group(group).num_rows:
            continue
        found = _find_statistics(metadata.row_group(group), column.name)
        if found is None or not found.has_min_max:
            return False
        bounds += [found.min, found.max]
    return bool(bounds) and all(isinstance(text, str) and text.startswith(_REMOTE) for text in bounds)


def _holds_small_integers(metadata: pq.FileMetaData, name: str) -> bool:
    """Tell whether the file's statistics prove that a column's integers are within 2^53, exact as float64."""
    for group in range(metadata.num_row_groups):
        found = _find_statistics(metadata.row_group(group), name)
        if found is None:
            return False
        bounds = [found.min, found.max] if found.has_min_max else []
        empty = found.has_null_count and found.null_count == metadata.row_group(group).num_rows
        if not empty and not (bounds and all(isinstance(n, int) and abs(n) <= 2**53 for n in bounds)):
            return False
    return True


def _find_statistics(group: pq.RowGroupMetaData, name: str) -> pq.Statistics | None:
    chunks = (group.column(number) for number in range(group.num_columns))
    return next((chunk.statistics for chunk in chunks if chunk.path_in_schema == name), None)
