"""Parquet files of http(s) URLs, which are lists: each row is an input, and its other columns are its metadata.

Only a file that is itself configured as an input is read so, and only if the statistics in its footer prove that its
image column holds nothing but URLs. Other files of URLs, such as those that `img2dataset` writes beside its tars, are
skipped: their images would be tagged twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import JobConfig
from pipelines.inputs.image_columns import is_string
from pipelines.inputs.lists import resolve
from pipelines.inputs.parquet.file import find_columns, holds_only_urls, recognizes
from pipelines.inputs.parquet.footer import measure_footer
from pipelines.inputs.rows import Input, ReadColumns, Skipped
from storage.files import StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Entry, StoreError, StoreOptions, show

_BATCH_ROWS = 4096


def open_list(
    entry: Entry, config: JobConfig, options: StoreOptions, skipped: Skipped, columns: ReadColumns
) -> Iterator[Input] | None:
    """Return the rows of a configured Parquet file of http(s) URLs, or None for any other object.

    The key of a row is its URL, or the value of `parquet.key_column`. Columns with bytes are left out of the metadata,
    and counted in `skipped`. Raises `ConfigError` if fetching is not enabled, or if `parquet.columns` is set.
    """
    if not recognizes(entry.uri.lower()):
        return None
    try:
        name = _find_column(entry, config, options)
    except (ConfigError, StoreError):
        raise
    except Exception:  # as in `file.inspect`: a file that cannot be read becomes one reject row
        return None
    if name is None:
        return None
    if not config.fetch.enabled:
        raise ConfigError(
            f"input: {show(entry.uri)} is a Parquet file of http(s) URLs, and fetching from the web is off: set "
            "fetch.enabled: true, or leave the file out"
        )
    if config.parquet.columns:
        raise ConfigError(
            f"parquet.columns: {show(entry.uri)} is a list of http(s) URLs, whose other columns are in the column "
            "metadata: leave parquet.columns out, or tag the list into an output of its own"
        )
    columns.add("Parquet file", name, entry.uri)
    return _expand(entry, name, config, options, skipped)


def _find_column(entry: Entry, config: JobConfig, options: StoreOptions) -> str | None:
    with ExitStack() as stack:
        raw = stack.enter_context(StoreFile(open_store(entry.uri, options), entry))
        measure_footer(raw, entry.size)
        file = stack.enter_context(pq.ParquetFile(raw))
        planned = Input("parquet", entry.uri, "", entry.size, entry.etag)
        column = find_columns(planned, file.schema_arrow, config.parquet)
        if column is None or column.many or len(column.path) > 1 or not is_string(column.type):
            return None
        return column.name if holds_only_urls(raw, entry.size, file, column.name) else None


def _expand(entry: Entry, name: str, config: JobConfig, options: StoreOptions, skipped: Skipped) -> Iterator[Input]:
    number = 0
    try:
        with StoreFile(open_store(entry.uri, options), entry) as raw, pq.ParquetFile(raw) as file:
            left_out = [field.name for field in file.schema_arrow if "binary" in str(field.type)]
            for one in left_out:
                skipped.add(f"{one} of {entry.uri}", "columns with bytes of Parquet files of URLs")
            wanted = [one for one in file.schema_arrow.names if one not in left_out]
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    yield _plan(record, entry, number, name, config.parquet.key_column)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        # Rows that are guessed or dropped would be missing from the output without a word.
        problem = f"cannot be read after row {number}: {show(str(error))}"
        raise ConfigError(f"input: {show(entry.uri)} {problem}: write the file again, or leave it out") from error


def _plan(record: dict[str, Any], entry: Entry, number: int, name: str, key_column: str | None) -> Input:
    url = record.pop(name) or ""
    uri = resolve(url, entry.uri) if url.strip() else ""
    key = uri if key_column is None else record.get(key_column)
    metadata = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) if record else None
    return Input("uri", uri, str(key or f"{entry.uri} row {number}"), -1, "", metadata=metadata)


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it. Numbers that JSON does not have, dates and decimals become their texts."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
