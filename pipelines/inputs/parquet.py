"""Parquet files with an image column: bytes, structs {bytes, path} as Hugging Face `datasets` writes, or URIs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs.images import fetch_images
from pipelines.inputs.lists import resolve
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped, lost_row
from siglip.images.decode import ImageRejected
from storage.files import READ_BYTES, StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions

KIND: Kind = "parquet"
SUFFIXES = (".parquet", ".pq")

_FOOTER_BYTES = 1 << 20
"""Bytes that are read from the end of a file in the first request, so that most footers need no second one."""
_ROWS = 16
"""Rows of the file that are in memory at once. A camera photo has about 5 MB."""
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png")
_URI_NAMES = ("image_uri", "image_url", "image_path", "uri", "url", "image", "path", "file", "file_name")


def recognizes(name: str) -> bool:
    """Tell whether an object is a Parquet file, by its lower-case name."""
    return name.endswith(SUFFIXES)


def inspect(planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
    """Split a file into runs of row groups with about `rows_per_shard` rows. A file without images has no parts.

    A file that is not valid Parquet becomes one part; reading it gives a reject row with the error.
    """
    try:
        raw = StoreFile(open_store(planned.uri, options), planned.entry, _FOOTER_BYTES)
        with raw, pq.ParquetFile(raw) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError, ValueError):
        return InputStats([planned])
    if not check_columns(planned, schema, config.parquet):
        return InputStats([])
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    parts: list[Input] = [] if counts else [replace(planned, rows=0)]
    start, rows = 0, 0
    for group, count in enumerate(counts):
        rows += count
        if rows >= config.rows_per_shard or group == len(counts) - 1:
            parts.append(replace(planned, start=start, stop=group + 1, rows=rows))
            start, rows = group + 1, 0
    small = frozenset(name for name in config.parquet.columns if _holds_small_integers(metadata, name))
    return InputStats(parts, schema, small)


def check_columns(planned: Input, schema: pa.Schema, config: ParquetConfig) -> bool:
    """Tell whether the file has images. Raises `ConfigError` if a configured column is missing or has a wrong type."""
    for key, name in (("image_column", config.image_column), ("key_column", config.key_column)):
        if name is not None and name not in schema.names:
            raise ConfigError(
                f"parquet.{key}: {planned.uri} has no column {name!r}; it has {', '.join(schema.names) or 'none'}"
            )
    if config.image_column is not None and not _holds_images(type_ := schema.field(config.image_column).type):
        raise ConfigError(
            f"parquet.image_column: {config.image_column!r} of {planned.uri} is {type_}: expected binary, "
            "{bytes, path} or a string with a URI"
        )
    return image_column(schema, config) is not None


def image_column(schema: pa.Schema, config: ParquetConfig) -> str | None:
    """Return the name of the image column: the configured one, else one detected by type and name, else None."""
    if config.image_column:
        return config.image_column
    for column in schema:
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return str(column.name)
    binary = [c.name for c in schema if _is_binary(c.type)]
    named = [name for name in binary if any(word in name.lower() for word in _IMAGE_NAMES)]
    if named or len(binary) == 1:
        return str((named or binary)[0])
    strings = {c.name.lower(): c.name for c in schema if _is_string(c.type)}
    return next((str(strings[word]) for word in _URI_NAMES if word in strings), None)


def read(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    """Yield the rows of the planned row groups, in order. Fetches images that the file names by URI."""
    config, count = reading.parquet, 0
    try:
        raw = StoreFile(open_store(planned.uri, reading.store), planned.entry)
        # Columns are streamed, so that a row group of a gigabyte is never in memory as a whole.
        with raw, pq.ParquetFile(raw, buffer_size=READ_BYTES) as file:
            schema = file.schema_arrow
            column = image_column(schema, config)
            if column is None:
                raise pa.ArrowInvalid(f"no image column among {schema.names}")
            passed = {source: name for source, name in config.columns.items() if source in schema.names}
            wanted = {column, *passed} | ({config.key_column} if config.key_column else set())
            stop = planned.stop or file.num_row_groups
            first = sum(file.metadata.row_group(group).num_rows for group in range(planned.start))
            for group in range(planned.start, stop):
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=sorted(wanted)):
                    for row in _batch_rows(batch, column, passed, first + count, planned, reading):
                        yield row
                        count += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield lost_row(planned, "corrupt_archive", " ".join(str(error).split()), count)
    except StoreError as error:
        yield reading.reject_or_raise(planned, error, count)


def _batch_rows(
    batch: pa.RecordBatch, column: str, passed: dict[str, str], first: int, planned: Input, reading: Reading
) -> Iterator[Row]:
    carried = {name: _cast(batch[source], reading.columns.field(name), planned) for source, name in passed.items()}
    keys = batch[reading.parquet.key_column].to_pylist() if reading.parquet.key_column else None
    linked: list[Input] = []
    rows: list[Row] = []
    for number, value in enumerate(batch[column].to_pylist()):
        path = None
        if isinstance(value, dict):
            path = value.get("path")
            value = path if value.get("bytes") is None else value["bytes"]
        key = keys[number] if keys else path
        row = Row(str(first + number) if key is None else str(key), planned.uri)
        row.columns = {name: values.slice(number, 1) for name, values in carried.items()}
        if value is None:
            row.rejected = ImageRejected("missing", f"{column} is null")
        elif isinstance(value, str):
            linked.append(Input("uri", resolve(value, planned.uri), row.key, -1, ""))
        else:
            row.data = bytes(value)
        rows.append(row)
    fetched = fetch_images(linked, reading) if linked else iter(())
    for row in rows:
        if row.data is None and row.rejected is None:
            found = next(fetched)
            row.data, row.rejected = found.data, found.rejected
        yield row


def _cast(values: pa.Array, target: pa.Field, planned: Input) -> pa.Array:
    """Cast a passed-through column to the output's type. Raises `ConfigError` if that would change a value."""
    try:
        return values.cast(target.type)
    except pa.ArrowException as error:
        raise ConfigError(
            f"parquet.columns: {target.name!r} of {planned.uri} does not fit the output's {target.type}: {error}"
        ) from error


def _holds_small_integers(metadata: pq.FileMetaData, name: str) -> bool:
    """Tell whether the file's statistics prove that a column's integers are within 2^53, exact as float64."""
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
        found = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == name), None)
        if found is None:
            return False
        bounds = [found.min, found.max] if found.has_min_max else []
        empty = found.has_null_count and found.null_count == metadata.row_group(group).num_rows
        if not empty and not (bounds and all(isinstance(n, int) and abs(n) <= 2**53 for n in bounds)):
            return False
    return True


def _is_binary(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_binary_view(type_)
        or pa.types.is_fixed_size_binary(type_)
    )


def _is_string(type_: pa.DataType) -> bool:
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(
            index >= 0 and test(type_.field(index).type)
            for index, test in (
                (type_.get_field_index("bytes"), _is_binary),
                (type_.get_field_index("path"), _is_string),
            )
        )
    return _is_binary(type_) or _is_string(type_)
