"""Parquet files with an image column: bytes, structs {bytes, path} as Hugging Face `datasets` writes, or URIs.

The file of a user may be anything. Whatever pyarrow raises while it reads a file becomes a reject row of that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs.image_columns import (
    ImageColumn,
    UnreadableFile,
    choose_image_column,
    find_column,
    is_string,
    listed,
)
from pipelines.inputs.parquet.footer import Bounds, measure_footer, read_bounds
from pipelines.inputs.parquet.rows import Batch
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped, lost_row
from storage.files import READ_BYTES, StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions, show

KIND: Kind = "parquet"
FILES_OF_URLS = "Parquet files of http(s) URLs, which are fetched only if they are inputs themselves"
"""What `Skipped` counts a file of URLs as that lies in a folder: `img2dataset` writes such files beside its tars."""
SUFFIXES = (".parquet", ".pq")

_FOOTER_BYTES = 1 << 20
"""Bytes that are read from the end of a file in the first request, so that most footers need no second one."""
_LARGE_FOOTER = Lock()
"""Held while a footer of more than `_FOOTER_BYTES` is parsed: sixteen files are inspected at the same time."""
_ROWS, _BATCH_BYTES, _REPEATED_BYTES = 16, 128 << 20, 256 << 20
"""Rows of the file that are in memory at once, their bytes by the footer, and their bytes if all rows hold the same
value, which is as large as the row group: a dictionary has it once. A camera photo has about 5 MB."""
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
    size = planned.size
    with ExitStack() as stack:
        raw = stack.enter_context(StoreFile(open_store(planned.uri, options), planned.entry, _FOOTER_BYTES))
        if measure_footer(raw, size) > _FOOTER_BYTES:
            stack.enter_context(_LARGE_FOOTER)
        file = stack.enter_context(pq.ParquetFile(raw))
        schema = file.schema_arrow
        column = find_columns(planned, schema, config.parquet)
        if column is None:
            return InputStats([], skipped="Parquet files without an image column")
        counts = _count_rows(file.metadata)
        if is_string(column.type) and holds_only_urls(raw, size, file, column.name):
            return InputStats([], skipped=FILES_OF_URLS)
        small = frozenset(
            name
            for name in config.parquet.columns
            if name in schema.names
            and schema.field(name).type in (pa.int64(), pa.uint64())
            and _holds_small_integers(raw, size, file, name)
        )
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

    It is the one that was planned, else the configured one, else the one that fits best. Raises `ConfigError` if a
    configured column is missing or has a wrong type, `UnreadableFile` if a column's name is not unique.
    """
    for name in (config.key_column, *config.columns):
        if name is not None and schema.names.count(name) > 1:
            raise UnreadableFile(f"{schema.names.count(name)} columns have the name {name!r}")
    if (key := config.key_column) is not None:
        if key not in schema.names:
            raise ConfigError(
                f"parquet.key_column: {show(planned.uri)} has no column {key!r}; it has {listed(schema.names)}"
            )
        if pa.types.is_nested(type_ := schema.field(key).type):
            raise ConfigError(
                f"parquet.key_column: {key!r} of {show(planned.uri)} is {show(str(type_))}: expected text or a number"
            )
    if planned.column is not None:
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
        reason = "out_of_memory" if isinstance(error, MemoryError) else "corrupt_archive"
        yield lost_row(planned, reason, text if known else f"{type(error).__name__}: {text}", count)


def _read_rows(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    config = reading.parquet
    with StoreFile(open_store(planned.uri, reading.store), planned.entry) as raw:
        measure_footer(raw, planned.size)
        # Columns are streamed, so that a row group of a gigabyte is never in memory as a whole.
        with pq.ParquetFile(raw, buffer_size=READ_BYTES) as file:
            schema = file.schema_arrow
            column = find_columns(planned, schema, config)
            if column is None:
                raise UnreadableFile(f"no image column among {listed(schema.names)}")
            passed = {source: name for source, name in config.columns.items() if source in schema.names}
            wanted = {column.path[0] if column.many else column.name, *passed}
            wanted |= {config.key_column} if config.key_column else set()
            counts = _count_rows(file.metadata)
            number = sum(counts[: planned.start])
            leaves = _list_leaves(file, column)
            for group in range(planned.start, planned.stop or len(counts)):
                metadata = file.metadata.row_group(group)
                total = max(1, metadata.total_byte_size)
                size = max(1, min(_ROWS, _BATCH_BYTES * counts[group] // total, _REPEATED_BYTES // total))
                read = 0
                for batch in file.iter_batches(size, row_groups=[group], columns=sorted(wanted)):
                    yield from Batch(batch, column, planned, reading).rows(number + read, passed, skipped)
                    read += batch.num_rows
                # pyarrow has read these leaves, so looking at their metadata does not end the process: see `footer.py`.
                values = {metadata.column(leaf).num_values for leaf in leaves}
                if {counts[group], *values} != {read}:
                    found = max([read, *values])
                    raise UnreadableFile(
                        f"row group {group} has {counts[group]} rows by the footer, {found} by its pages"
                    )
                number += read


def _count_rows(metadata: pq.FileMetaData) -> list[int]:
    """Return the number of rows in each row group."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if any(not 0 <= count <= _MAX_ROWS for count in counts):
        raise UnreadableFile(f"the footer says that a row group has {min(counts)} to {max(counts)} rows")
    return counts


def _list_leaves(file: pq.ParquetFile, column: ImageColumn) -> list[int]:
    """Return the numbers of the leaves of the schema that hold the image column, except those in lists.

    Each of them has a value, which may be null, for each row.
    """
    leaves = [file.schema.column(number) for number in range(len(file.schema))]
    return [
        number
        for number, leaf in enumerate(leaves)
        if (leaf.path == column.name or leaf.path.startswith(f"{column.name}.")) and not leaf.max_repetition_level
    ]


def holds_only_urls(raw: StoreFile, size: int, file: pq.ParquetFile, name: str) -> bool:
    """Tell whether the file's statistics prove that all values of a column begin with http:// or https://."""
    bounds = _find_bounds(raw, size, file, name)
    texts = [text for one in bounds or [] for text in (one.low, one.high) if text is not None]
    return bool(texts) and all(text.startswith((b"http://", b"https://")) for text in texts)


def _holds_small_integers(raw: StoreFile, size: int, file: pq.ParquetFile, name: str) -> bool:
    """Tell whether the file's statistics prove that a column's integers are within 2^53, exact as float64."""
    bounds = _find_bounds(raw, size, file, name)
    signed = pa.types.is_signed_integer(file.schema_arrow.field(name).type)
    values = [value for one in bounds or [] for value in (one.low, one.high) if value is not None]
    return bounds is not None and all(abs(int.from_bytes(v, "little", signed=signed)) <= 2**53 for v in values)


def _find_bounds(raw: StoreFile, size: int, file: pq.ParquetFile, name: str) -> list[Bounds] | None:
    leaves = [number for number in range(len(file.schema)) if file.schema.column(number).path == name]
    return read_bounds(raw, size, leaves[0]) if len(leaves) == 1 else None
