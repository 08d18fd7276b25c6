"""A condition in SQL over the rows of an output: `--where` of the commands that search and export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.tagged_output import ID, INPUT_ID, TaggedOutput
from storage.settings import ConfigError

ROWS = "rows"
"""The name of the only table that a condition sees."""


class Where:
    """A condition such as `width >= 1024 and list_contains(labels, 'cat')`, in DuckDB's SQL.

    It may use the columns of the output's `data/` and `id`; an own column `id` of the output is called `input_id`. It
    sees one batch of rows at a time, so it is a condition on a single row: subqueries, aggregates and windows are
    refused. It cannot read files or load extensions.
    """

    def __init__(self, sql: str, output: TaggedOutput) -> None:
        """Check a condition. Raises `ConfigError`, in one line, if it is none, or does not fit the output's columns."""
        self.sql = sql
        if not sql.strip():
            raise self._wrong("it is empty")
        self._connection = duckdb.connect(
            config={"enable_external_access": "false", "threads": "1", "lock_configuration": "true"}
        )
        schema = output.format.data_schema()
        names = schema.names
        if ID in names and INPUT_ID not in names:  # as in the batches of `TaggedOutput`
            schema = pa.schema([field.with_name(INPUT_ID) if field.name == ID else field for field in schema])
        if ID not in schema.names:
            schema = schema.append(pa.field(ID, pa.string()))
        self.columns: list[str] = self._choose(self._find_columns(), schema.names)
        """The columns that the condition uses. Batches that are given to `keep` need these, and may have others."""
        self._query = f"SELECT coalesce(CAST((\n{sql}\n) AS BOOLEAN), false) AS keep FROM {ROWS}"
        self.keep(schema.empty_table())

    def keep(self, rows: pa.Table | pa.RecordBatch) -> NDArray[np.bool_]:
        """Tell for each row whether the condition holds, bool (N,). A condition that is NULL does not hold.

        Raises `ConfigError` if the condition cannot be computed for a row, such as a number that is cast from a text.
        """
        columns = {name: _widen(rows[name]) for name in self.columns}
        # A table needs a column, which a condition such as `random() < 0.1` has not.
        table = pa.table(columns or {"": np.zeros(len(rows), np.bool_)})
        try:
            self._connection.register(ROWS, table)
            kept = self._connection.execute(self._query).fetchnumpy()["keep"]
        except duckdb.Error as error:
            raise self._wrong(str(error)) from error
        finally:
            self._connection.unregister(ROWS)
        if len(kept) != len(table):
            raise self._wrong("an aggregate or unnest is not possible here: a condition sees one row")
        return np.asarray(kept, np.bool_)

    def _choose(self, found: set[str], names: Sequence[str]) -> list[str]:
        """Return the columns that names in the condition stand for. DuckDB does not tell upper from lower case.

        So of columns that differ in nothing else, such as `key` of every output and `Key` of an input, only the one
        whose name is in the condition as it stands is given to DuckDB.
        """
        chosen: dict[str, str] = {}
        for part in sorted(found):
            alike = [name for name in names if name.lower() == part.lower()]
            name = part if part in alike else alike[0] if len(alike) == 1 else None
            if alike and name is None:
                raise self._wrong(
                    f"{part} may be any of the columns {', '.join(alike)}: write one of them as it stands"
                )
            if name is not None and chosen.setdefault(name.lower(), name) != name:
                raise self._wrong(f"columns {chosen[name.lower()]} and {name} cannot be used together")
        return sorted(chosen.values())

    def _find_columns(self) -> set[str]:
        """Return the names of the columns in the condition, also of other things that look like them."""
        try:
            [(text,)] = self._connection.execute(
                "SELECT json_serialize_sql(?)", [f"SELECT 1 FROM {ROWS} WHERE (\n{self.sql}\n)"]
            ).fetchall()
        except duckdb.Error as error:
            raise self._wrong(str(error)) from error
        tree = json.loads(text)
        if tree["error"]:
            raise self._wrong(tree["error_message"])
        [statement] = tree["statements"]
        if statement["node"]["type"] != "SELECT_NODE":
            raise self._wrong("it is more than a condition")
        nodes = [*_walk(statement["node"]["where_clause"])]
        for kind in ("SUBQUERY", "WINDOW"):
            if any(node.get("class") == kind for node in nodes):
                raise self._wrong(f"{kind.lower()} is not possible here: a condition sees one row")
        names = [node["column_names"] for node in nodes if node.get("class") == "COLUMN_REF"]
        # `rows.key` is a column of the table, `struct.field` a field of a column.
        return {part for name in names for part in name}

    def _wrong(self, why: str) -> ConfigError:
        line = " ".join(why.split("LINE ")[0].split())
        return ConfigError(f"--where {self.sql!r}: {line}")


def make_where(sql: str | None, output: TaggedOutput) -> Where | None:
    """Return the condition, or None for none."""
    return None if sql is None else Where(sql, output)


def quote_label(label: str) -> str:
    """Return the condition that an image has a label, for `Where`."""
    return "list_contains(labels, '" + label.replace("'", "''") + "')"


def join_conditions(conditions: Sequence[str]) -> str | None:
    """Return the condition that all of some conditions hold, or None if there are none."""
    if len(conditions) == 1:
        return conditions[0]
    return " and ".join(f"(\n{one}\n)" for one in conditions) or None


def _widen(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Convert float16 embeddings to float32: DuckDB has no float16."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type):
        return column.cast(pa.list_(pa.float32(), kind.list_size))
    return column


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)
