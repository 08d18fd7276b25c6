"""Columns of Parquet files replaced: the rest is the same bytes, and other readers than pyarrow read all of it."""

from __future__ import annotations

import io
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.column_chunks import replace_columns

ROWS = 1000


def make_table() -> pa.Table:
    """Columns of all shapes: nested, with nulls, repeated, empty, large."""
    random = np.random.default_rng(0)
    vectors = pa.array(random.standard_normal(ROWS * 16).astype(np.float32))
    numbers = range(ROWS)
    return pa.table(
        {
            "key": [f"image {n}" for n in numbers],
            "labels": pa.array([["cat"] * (n % 4) for n in numbers], pa.list_(pa.string())),
            "place": [None if n % 3 else {"x": n, "names": [{"one": "é" * n}] * (n % 2)} for n in numbers],
            "embedding": pa.FixedSizeListArray.from_arrays(vectors, 16),
            "half": pa.FixedSizeListArray.from_arrays(vectors.cast(pa.float16()), 16),
            "nothing": pa.nulls(ROWS, pa.string()),
            "thumbnail": pa.array([bytes(random.integers(0, 256, n % 90, np.uint8)) for n in numbers], pa.binary()),
            "when": pa.array(numbers, pa.timestamp("us", tz="UTC")),
            "seen": pa.array([n % 2 == 0 for n in numbers]),
        }
    )


def write(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


NEW = pa.table(
    {"labels": [[f"dog {n}"] * (n % 3) for n in range(ROWS)], "bands": [["accept"] * (n % 3) for n in range(ROWS)]}
)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd", "row_group_size": 300},
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy", "data_page_version": "2.0", "write_page_index": True, "row_group_size": 128},
        {"compression": "lz4", "use_byte_stream_split": ["embedding.list.element"], "use_dictionary": False},
        {"compression": "gzip", "data_page_size": 500, "write_page_checksum": True, "store_schema": False},
        {"bloom_filter_options": {"key": {"ndv": 1000, "fpp": 0.05}}, "compression": "zstd", "row_group_size": 999},
    ],
    ids=lambda options: options["compression"],
)
def test_the_rest_is_as_it_was(options: dict[str, Any], tmp_path: Any) -> None:
    table = make_table()
    data = write(table, **options)
    schema = pa.schema([*table.schema, NEW.schema.field("bands")]).with_metadata({"whose": "ours"})
    made = replace_columns(data, NEW, schema, compression="zstd")

    with pq.ParquetFile(pa.BufferReader(made), page_checksum_verification=True) as file:
        read = file.read()
        assert file.schema_arrow.metadata[b"whose"] == b"ours"
        assert file.metadata.num_rows == ROWS
        before = pq.ParquetFile(pa.BufferReader(data)).metadata
        assert file.metadata.num_row_groups == before.num_row_groups
        for number in range(before.num_row_groups):
            group, old = file.metadata.row_group(number), before.row_group(number)
            assert group.num_rows == old.num_rows
            columns = {group.column(at).path_in_schema: group.column(at) for at in range(group.num_columns)}
            assert sum(column.total_uncompressed_size for column in columns.values()) == group.total_byte_size
            for at in range(old.num_columns):
                kept = old.column(at)
                ours = columns[kept.path_in_schema]
                if kept.path_in_schema.startswith("labels"):
                    assert ours.compression == "ZSTD"
                    continue
                assert (ours.statistics, ours.encodings) == (kept.statistics, kept.encodings)
                pieces = []
                for one, content in ((ours, made), (kept, data)):
                    start = min(page for page in (one.dictionary_page_offset, one.data_page_offset) if page)
                    pieces.append(content[start : start + one.total_compressed_size])
                assert pieces[0] == pieces[1]
    read.validate(full=True)
    expected = table.set_column(1, "labels", NEW["labels"]).append_column("bands", NEW["bands"])
    assert read.cast(expected.schema).equals(expected)

    (tmp_path / "made.parquet").write_bytes(made)
    by_polars = polars.read_parquet(tmp_path / "made.parquet").to_dict(as_series=False)
    assert by_polars["bands"] == NEW["bands"].to_pylist()
    assert by_polars["place"] == table["place"].to_pylist()
    found = duckdb.sql(f"SELECT labels, key, embedding FROM '{tmp_path}/made.parquet'").fetchall()
    wanted = [expected[name].to_pylist() for name in ("labels", "key", "embedding")]
    assert [tuple(map(tuple_of, row)) for row in found] == [
        tuple(map(tuple_of, row)) for row in zip(*wanted, strict=True)
    ]


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_columns_go_and_change_places_and_nothing_need_be_new() -> None:
    table = make_table()
    data = write(table, row_group_size=300)
    schema = table.select(["embedding", "place", "key"]).schema
    made = replace_columns(data, pa.table({}), schema)
    assert pq.read_table(io.BytesIO(made)).equals(table.select(["embedding", "place", "key"]))
    # And again, of what came out.
    again = replace_columns(made, pa.table({"key": ["x"] * ROWS}), schema)
    assert pq.read_table(io.BytesIO(again)).equals(
        table.select(["embedding", "place"]).append_column("key", pa.array(["x"] * ROWS))
    )


def test_what_does_not_fit_is_refused() -> None:
    data = write(make_table())
    with pytest.raises(pa.ArrowInvalid, match="7 rows in place of 1000"):
        replace_columns(data, pa.table({"labels": [["a"]] * 7}), make_table().schema)
    with pytest.raises(KeyError, match="other"):
        replace_columns(data, pa.table({}), pa.schema([("other", pa.string())]))
    with pytest.raises(pa.ArrowInvalid, match="not a Parquet file"):
        replace_columns(b"PAR1 no", pa.table({}), make_table().schema)
