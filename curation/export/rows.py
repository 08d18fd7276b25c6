"""Rows of an export as JSON: for targets that are files of JSON, or take it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc


def describe(batch: pa.RecordBatch, *, parse: bool = True) -> list[dict[str, Any]]:
    """Return the rows of a batch as mappings that `dump` can write. They contain all columns of the batch.

    `scores` are NumPy arrays of float32. `metadata` is the JSON value that it contains, or with `parse` false its text.
    Dates and times are texts of ISO 8601. One that is no valid time, or of a year beyond 32767, is its number in the
    column's unit, as a text.
    """
    columns = {name: batch[name] for name in batch.schema.names}
    scores = columns.pop("scores", None)
    columns = {name: _without_times(column) for name, column in columns.items()}
    rows: list[dict[str, Any]] = pa.table(columns).to_pylist()
    if scores is not None:
        values = np.asarray(scores.flatten(), np.float32)
        lengths = pc.fill_null(pc.list_value_length(scores), 0).to_pylist()
        start = 0
        for row, length in zip(rows, lengths, strict=True):
            row["scores"] = values[start : start + length]
            start += length
    for row in rows if parse else ():
        if row.get("metadata") is not None:
            row["metadata"] = orjson.Fragment(row["metadata"])
    return rows


def dump(value: Any) -> bytes:
    """Write JSON in UTF-8. Numbers of float32 are the shortest that read back as the same float32.

    NaN and infinities are null, bytes are base64, decimals and durations are texts: JSON has no values for them.
    """
    return orjson.dumps(value, default=_make_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _make_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def _without_times(column: pa.Array) -> pa.Array:
    """Return times as texts: Python's have no nanoseconds."""
    temporal = pa.types.is_timestamp(column.type) or pa.types.is_time(column.type) or pa.types.is_date(column.type)
    if not temporal:
        return column.cast(pa.int64()).cast(pa.string()) if pa.types.is_duration(column.type) else column
    text = column.cast(pa.string())
    beyond = pc.starts_with(text, "<value out of range")  # Arrow writes this, and no error
    if pc.any(beyond).as_py():
        width = pa.int32() if column.type.bit_width == 32 else pa.int64()
        text = pc.if_else(beyond, column.cast(width).cast(pa.string()), text)
    return pc.replace_substring(text, " ", "T", max_replacements=1) if pa.types.is_timestamp(column.type) else text
