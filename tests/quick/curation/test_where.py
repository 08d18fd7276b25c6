"""Conditions in SQL: what they keep, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.tagged_output import TaggedOutput, open_output
from curation.where import Where, join_conditions, quote_label
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

NAMES = ["cat", "dog's bone", "bird"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("where") / "made")
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.001})
    write_output(root, SyntheticOutput(labels, draw_vectors(3, 16, 1), 1, lambda shard: draw_vectors(40, 16, shard)))
    return open_output(root)


def keep(output: TaggedOutput, sql: str) -> list[bool]:
    where = Where(sql, output)
    return [bool(one) for batch in output.batches(where.columns or ["key"], rows=7) for one in where.keep(batch)]


@pytest.mark.parametrize("name", NAMES)
def test_a_label_is_a_condition(output: TaggedOutput, name: str) -> None:
    wanted = [name in labels for labels in output.to_arrow(["labels"])["labels"].to_pylist()]
    assert keep(output, quote_label(name)) == wanted
    assert any(wanted)
    both = join_conditions([quote_label(name), "true -- a comment", "width is not null"])
    assert both is not None
    assert keep(output, both) == wanted


def test_conditions_use_lists_texts_and_the_id(output: TaggedOutput) -> None:
    rows = output.to_arrow(["id", "key", "scores", "labels"]).to_pylist()
    third = rows[3]["id"]
    for sql, wanted in (
        (f"id = '{third}'", [row["id"] == third for row in rows]),
        ("KEY like '%1'", [row["key"].endswith("1") for row in rows]),
        ("rows.\"key\" like '%1'", [row["key"].endswith("1") for row in rows]),
        ("scores[1] > 0.5", [bool(row["scores"]) and row["scores"][0] > 0.5 for row in rows]),
        ("len(list_filter(labels, lambda one: one = 'cat')) = 1", ["cat" in row["labels"] for row in rows]),
        ("metadata ->> '$.a' = 'b'", [False] * len(rows)),
        ("NULL", [False] * len(rows)),
        ("1 = 1", [True] * len(rows)),
    ):
        assert keep(output, sql) == wanted, sql


def test_only_the_columns_of_a_condition_are_read(output: TaggedOutput) -> None:
    assert Where("width > 1 and (height > 2 or labels[1] = 'embedding')", output).columns == [
        "height",
        "labels",
        "width",
    ]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("nothing > 1", "nothing"),
        ("width >", "syntax error"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("width = 1) or (true", ""),  # a condition all the same
        ("true) union select (true", "more than a condition"),
        ("true) from rows; drop table rows; select (true", ""),
        ("width in (select 1)", "subquery is not possible"),
        ("row_number() over () < 3", "window is not possible"),
        ("count(*) > 1", "aggregate"),
        ("read_text('README.md') is not null", ""),
        ("exists (from read_parquet('x.parquet'))", "subquery"),
        ("labels = 'cat' and width", ""),
        ("key", "key"),
        ("'\ud800' = key", ""),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(output: TaggedOutput, sql: str, says: str) -> None:
    if sql == "width = 1) or (true":
        assert all(keep(output, sql))
        return
    with pytest.raises(ConfigError) as error:
        list(keep(output, sql))
    assert "\n" not in str(error.value)
    assert says in str(error.value).lower()


def test_null_and_batches_of_any_length(output: TaggedOutput) -> None:
    where = Where("width > 10", output)
    rows = pa.table({"width": pa.array([5, None, 20], pa.int32())})
    assert np.array_equal(where.keep(rows), [False, False, True])
    assert np.array_equal(where.keep(rows.slice(1)), [False, True])
    assert where.keep(rows.slice(0, 0)).shape == (0,)


def test_a_condition_cannot_read_a_file(output: TaggedOutput, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(ConfigError):
        Where(f"getenv('HOME') = '' or list_contains(glob('{secret}'), 'x')", output)


def test_of_columns_whose_names_differ_in_case_the_one_that_stands_there_is_meant(tmp_path: Path) -> None:
    """DuckDB takes them for one: a column `Key` of the input must not be compared where `key` is written."""
    made = SyntheticOutput(
        LabelSet.model_validate({"names": NAMES, "threshold": 0.001}), draw_vectors(3, 16, 1), 1,
        lambda shard: draw_vectors(40, 16, shard), passed=pa.schema([("Key", pa.int64()), ("KEY", pa.int64())]),
        values=lambda rows: {"Key": [row % 4 for row in rows], "KEY": list(rows)},
    )  # fmt: skip
    write_output(str(tmp_path / "made"), made)
    output = open_output(str(tmp_path / "made"))
    assert keep(output, "key like '%7'") == [row % 10 == 7 for row in range(40)]
    assert keep(output, "Key = 3 and width > 1") == [row % 4 == 3 for row in range(40)]
    assert keep(output, "KEY = 30") == [row == 30 for row in range(40)]
    with pytest.raises(ConfigError, match="any of the columns key, Key, KEY"):
        keep(output, "kEy = 3")
    with pytest.raises(ConfigError, match="cannot be used together"):
        keep(output, "Key = 3 and key like '%3'")


def test_a_message_shows_the_condition_as_it_was_written(output: TaggedOutput) -> None:
    for sql in ("labels", "unnest(labels) = 'cat'"):
        with pytest.raises(ConfigError) as refused:
            keep(output, join_conditions([sql]) or "")
        assert str(refused.value).startswith(f"--where {sql!r}: ")
