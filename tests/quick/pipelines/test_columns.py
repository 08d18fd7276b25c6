"""Columns passed through: one type over all inputs, no value changed, and names that are taken."""

from __future__ import annotations

import datetime
import decimal
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs import parquet
from pipelines.inputs.columns import PassedColumns, unify
from pipelines.inputs.rows import Input, Reading, Skipped
from pipelines.output.fingerprint import check_fingerprint, describe_columns, read_columns
from pipelines.output.output import Output
from pipelines.output.schema import OWN_COLUMNS, OutputFormat
from storage.settings import ConfigError
from storage.store import StoreOptions

OPTIONS = StoreOptions()
BIG = 2**53 + 1
VALUES: dict[str, pa.Array] = {
    "int64": pa.array([1, None, BIG]),
    "timestamp[ns]": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
    "list": pa.array([[1], None, []], pa.list_(pa.int16())),
    "struct": pa.array([{"x": 1, "y": "q"}, None, {"x": None, "y": ""}]),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "dictionaries in lists": pa.array([["a"], None, []], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "dictionaries in structs in lists": pa.array(
        [[{"d": "a"}], None, []], pa.large_list(pa.struct([("d", pa.dictionary(pa.int8(), pa.string()))]))
    ),
    "dictionaries in maps": pa.array(
        [[("k", "v")], None, []], pa.map_(pa.string(), pa.dictionary(pa.int8(), pa.string()))
    ),
    "dictionaries in lists of two": pa.array([["a", "b"]] * 3, pa.list_(pa.dictionary(pa.int8(), pa.string()), 2)),
    "views in lists": pa.array([["a"], None, []], pa.list_(pa.string_view())),
    "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-3.00")], pa.decimal128(10, 2)),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "half": pa.array([1.5, None, 2.0], pa.float16()),
    "float32": pa.array([0.1, None, float("nan")], pa.float32()),
    "time": pa.array([datetime.time(1, 2, 3, 4), None, datetime.time()], pa.time64("us")),
    "bytes": pa.array([b"\xff\x00", None, b""], pa.large_binary()),
    "null": pa.nulls(3),
    "bool": pa.array([True, None, False]),
}


def look(path: Path, columns: dict[str, str]) -> tuple[Any, frozenset[str]]:
    config = JobConfig(input=str(path), output="/out", labels=["a"], parquet={"image_column": "i", "columns": columns})
    planned = Input("parquet", str(path), path.name, path.stat().st_size, "")
    found = parquet.inspect(planned, config, OPTIONS)
    return found.schema, found.small_integers


def write(path: Path, column: pa.Array, **options: Any) -> Path:
    pq.write_table(pa.table({"i": [b"x"] * len(column), "c": column}), path, **options)
    return path


def passed(path: Path, schema: pa.Schema) -> pa.Array:
    """What a reader gives of the column `c` of a file."""
    config = ParquetConfig(image_column="i", columns={"c": "c"})
    planned = Input("parquet", str(path), path.name, path.stat().st_size, "")
    rows = list(parquet.read(planned, Reading(OPTIONS, 1 << 20, config, schema), Skipped()))
    assert not any(row.rejected for row in rows)
    return pa.concat_arrays([row.columns["c"] for row in rows])


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_type_arrive_unchanged(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.parquet", VALUES[name])
    columns = PassedColumns({"c": "c"})
    columns.add(str(path), *look(path, {"c": "c"}))
    found = passed(path, columns.schema())
    assert found.equals(VALUES[name].cast(columns.schema().field("c").type)) or name == "float32"
    assert str(found.to_pylist()) == str(VALUES[name].to_pylist())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.array([1, 2]), pa.array([0.5]), pa.float64()),
        (pa.array([0.5]), pa.array([1, 2]), pa.float64()),
        (pa.array([1], pa.int8()), pa.array([300]), pa.int64()),
        (pa.array([1], pa.uint32()), pa.array([1], pa.int32()), pa.int64()),
        (pa.array([1], pa.int16()), pa.array([0.5], pa.float32()), pa.float32()),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"]), pa.string()),
        (pa.array([None]), pa.array(["b"]), pa.string()),
        (pa.array([[1]], pa.list_(pa.int8())), pa.array([[0.5]]), pa.list_(pa.float64())),
        (pa.array([1], pa.timestamp("ms")), pa.array([1], pa.timestamp("us")), pa.timestamp("us")),
    ],
    ids=str,
)
def test_types_are_unified_over_files(tmp_path: Path, first: pa.Array, second: pa.Array, expected: pa.DataType) -> None:
    columns = PassedColumns({"c": "c"})
    paths = [write(tmp_path / f"{n}.parquet", values) for n, values in enumerate((first, second))]
    for path in paths:
        columns.add(str(path), *look(path, {"c": "c"}))
    assert columns.schema().field("c").type == expected
    for path, values in zip(paths, (first, second), strict=True):
        found = passed(path, columns.schema())
        assert (found.type, found.to_pylist()) == (expected, values.to_pylist())


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (pa.array([1]), pa.array(["x"]), {}, r"'c' is string in .*1\.parquet and int64 in .*0\.parquet"),
        (pa.array([True]), pa.array([1]), {}, r"'c' is int64 in .*1\.parquet and bool in .*0\.parquet"),
        (pa.array([BIG]), pa.array([0.5]), {}, r"integers in .*0\.parquet may be over 2\^53"),
        (pa.array([0.5]), pa.array([BIG]), {}, r"integers in .*1\.parquet may be over 2\^53"),
        (pa.array([1]), pa.array([0.5]), {"write_statistics": False}, r"integers in .*0\.parquet may be over 2\^53"),
        (pa.array([1], pa.uint64()), pa.array([1]), {}, "no type holds both"),
    ],
)
def test_types_that_have_none_in_common_name_the_file(
    tmp_path: Path, first: pa.Array, second: pa.Array, options: dict[str, Any], message: str
) -> None:
    columns = PassedColumns({"c": "c"})
    paths = [write(tmp_path / f"{n}.parquet", values, **options) for n, values in enumerate((first, second))]
    looks = [look(path, {"c": "c"}) for path in paths]
    columns.add(str(paths[0]), *looks[0])
    with pytest.raises(ConfigError, match=message):
        columns.add(str(paths[1]), *looks[1])


def test_the_types_of_an_output_stay(tmp_path: Path) -> None:
    fixed = pa.schema([("c", pa.int64())])
    small, other = (
        write(tmp_path / f"{n}.parquet", v) for n, v in enumerate((pa.array([1], pa.int8()), pa.array([0.5])))
    )
    columns = PassedColumns({"c": "c"}, fixed)
    columns.add(str(small), *look(small, {"c": "c"}))
    assert passed(small, columns.schema()).type == pa.int64()
    with pytest.raises(ConfigError, match=r"'c' is double in .*1\.parquet and int64 in the output"):
        columns.add(str(other), *look(other, {"c": "c"}))


def test_dictionaries_are_decoded_at_every_depth(tmp_path: Path) -> None:
    """Their indices may be too small for the values of all files. An output that has them already stays as it is."""
    type_ = pa.list_(pa.struct([("d", pa.dictionary(pa.int8(), pa.string()))]))
    path = write(tmp_path / "0.parquet", pa.array([[{"d": "a"}]], type_))
    columns = PassedColumns({"c": "c"})
    columns.add(str(path), *look(path, {"c": "c"}))
    assert columns.schema().field("c").type == pa.list_(pa.struct([("d", pa.string())]))
    fixed = pa.schema([("c", type_)])
    columns = PassedColumns({"c": "c"}, fixed)
    columns.add(str(path), *look(path, {"c": "c"}))
    assert passed(path, columns.schema()).type == type_


@pytest.mark.parametrize(
    "type_",
    [
        pa.map_(pa.string(), pa.int64()),
        pa.map_(pa.field("k", pa.string(), nullable=False), pa.field("v", pa.int64())),
        pa.list_(pa.struct([("m", pa.map_(pa.field("k", pa.int8(), nullable=False), pa.field("v", pa.string())))])),
    ],
)
def test_the_types_of_an_output_are_compared_as_types(tmp_path: Path, type_: pa.DataType) -> None:
    """Their text differs after a round trip through a file, and between versions of Arrow."""
    path = write(tmp_path / "0.parquet", pa.array([None], type_))
    columns = PassedColumns({"c": "c"})
    columns.add(str(path), *look(path, {"c": "c"}))
    texts = {str(columns.schema().field("c").type), str(type_), "of another version"}
    first = describe_columns(columns.schema())
    again = describe_columns(read_columns(first))
    assert first == again
    for text in texts:
        check_fingerprint({**first, "parquet.columns": {"c": text}}, again, Output("out"))
    other = describe_columns(pa.schema([("c", pa.list_(type_))]))
    with pytest.raises(ConfigError, match=r"parquet\.columns") as refused:
        check_fingerprint(other, again, Output("out"))
    assert "parquet.schema" not in str(refused.value)


def test_a_column_named_like_one_of_ours_can_be_renamed(tmp_path: Path) -> None:
    for name in OWN_COLUMNS:
        with pytest.raises(ValidationError, match=f"{name}: original_{name}"):
            ParquetConfig(columns=[name])
    with pytest.raises(ValidationError, match="used for two columns"):
        ParquetConfig(columns={"a": "x", "b": "x"})
    assert ParquetConfig(columns={"width": "original_width"}).columns == {"width": "original_width"}
    # Users may use the names of the stages' internal columns.
    assert ParquetConfig(columns=["stage", "reason", "pixels", "shard", "actor"])
    format_ = OutputFormat(4, "float32", True, pa.schema([]), bands=True)
    assert set(format_.data_schema().names) == OWN_COLUMNS


TYPES = st.sampled_from(
    [
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float16(), pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.bool_(), pa.date32()),
        *(pa.list_(pa.int8()), pa.list_(pa.float32()), pa.timestamp("s"), pa.timestamp("ns"), pa.null()),
    ]
)


@settings(max_examples=300, deadline=None)
@given(TYPES, TYPES, st.data())
def test_a_common_type_changes_no_value(one: pa.DataType, other: pa.DataType, data: st.DataObject) -> None:
    merged = unify(one, other)
    assert merged == unify(other, one)
    if merged is None or not pa.types.is_integer(one):
        return
    bits = one.bit_width - int(pa.types.is_signed_integer(one))
    value = data.draw(st.integers(-(2**bits) if pa.types.is_signed_integer(one) else 0, 2**bits - 1))
    if pa.types.is_floating(merged) and abs(value) > 2**53:
        return  # what statistics are asked about
    buffer = io.BytesIO()
    pq.write_table(pa.table({"c": pa.array([value], one)}), buffer)
    assert pa.array([value], one).cast(merged)[0].as_py() == value
