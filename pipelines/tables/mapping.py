"""The names of an Iceberg table's columns in its files, which have no ids of fields.

A table's name mapping says which id a column of a file has. pyiceberg refuses to read a file with a column that is not
in the mapping, also if the table has no such column. So the columns that a table is without are in its mapping too,
with ids that no column of the table has.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.tables.columns import list_fields

if TYPE_CHECKING:
    from pyiceberg.table.name_mapping import MappedField, NameMapping

_FIRST_ID = 1_000_000_000
"""Ids from here on are those of columns that the table is without. Iceberg's own fields have some above 2^31 - 201."""


def map_names(mapping: NameMapping, files: pa.Schema) -> NameMapping:
    """Return a name mapping that also has the columns of the files that it is without."""
    from pyiceberg.table.name_mapping import NameMapping

    known = {name for field in mapping.root for name in field.names}
    most = max((_FIRST_ID - 1, *(id_ for field in mapping.root for id_ in _list_ids(field))))
    ids = itertools.count(most + 1)
    return NameMapping([*mapping.root, *(_map_field(field, ids) for field in files if field.name not in known)])


def find_unreadable(files: pa.Schema, table: pa.Schema) -> list[str]:
    """Return the columns that files have beside those of the table, and that keep pyiceberg from reading such a file.

    It has no type for them, or their names are those of fields of other columns. It does not read the others either.
    """
    from pyiceberg.io.pyarrow import pyarrow_to_schema
    from pyiceberg.table.name_mapping import NameMapping

    found = []
    kept = [field for field in files if field.name in table.names]
    logger = logging.getLogger("pyiceberg.io.pyarrow")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each column in nanoseconds
    try:
        for field in files:
            if field.name not in table.names:
                schema, ids = pa.schema([*kept, field]), itertools.count(1)
                mapping = NameMapping([_map_field(one, ids) for one in schema])
                try:
                    pyarrow_to_schema(schema, mapping, downcast_ns_timestamp_to_us=True)
                except Exception:  # of several kinds
                    found.append(field.name)
    finally:
        logger.setLevel(level)
    return found


def _map_field(field: pa.Field, ids: Iterator[int]) -> MappedField:
    from pyiceberg.table.name_mapping import MappedField

    number = next(ids)
    inner = [_map_field(one, ids) for one in list_fields(field.type)]
    return MappedField(field_id=number, names=[field.name], fields=inner)


def _list_ids(field: MappedField) -> Iterator[int]:
    if field.field_id is not None:
        yield field.field_id
    for inner in field.fields:
        yield from _list_ids(inner)
