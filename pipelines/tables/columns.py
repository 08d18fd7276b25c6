"""Which columns of an output a table has, and with which types, given the Arrow types of the files.

A column is left out of a table, and stays in the files, if a reader could get other values than were written, or none:

* `float16`: neither format has it, and readers cast it, refuse it or read bytes.
* Unsigned integers: neither format has them, and a library that takes 8 bits for 8 bits makes -56 of 200.
* Times of day, durations, nanoseconds, time zones other than UTC, `null`: no type in one of the formats, or one that
  older readers do not know. A timestamp without a zone is such a type in Delta.
* Names that differ only in case from those before, or have characters that Spark refuses: ` ,;{}()=` and controls. The
  same holds for the fields of a struct.
* Names with a dot that are also the path to a field of another column: Iceberg looks columns up by such paths.

A list of fixed size becomes a list: neither format has the size.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.types as types

_REFUSED = frozenset(" ,;{}()=")
_SAME = (
    types.is_boolean,
    types.is_signed_integer,
    types.is_float32,
    types.is_float64,
    types.is_date32,
    types.is_decimal128,
)


def choose_columns(schema: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """Return the columns that a table has, with its types, and why the others are left out, a phrase for each."""
    fields: list[pa.Field] = []
    left_out: list[str] = []
    known: set[str] = set()
    for field in schema:
        type_ = convert_type(field.type)
        paths = [".".join(path).lower() for path in _list_paths(field)]
        if why := _find_fault(field) or _find_conflict(field.name.lower(), paths, known):
            left_out.append(f"{field.name!r}: {why}")
        elif type_ is None:
            left_out.append(f"{field.name!r}: no table has the type {field.type}")
        else:
            known.update(paths)
            fields.append(pa.field(field.name, type_, field.nullable))
    return pa.schema(fields), left_out


def _find_conflict(name: str, paths: list[str], known: set[str]) -> str:
    """Say why a table cannot have a column beside those whose `paths`, in lower case, are `known`, or return ""."""
    if name in known:
        dotted = "as a field" if "." in name else "in other letters"
        return f"another column has this name {dotted}"
    if not known.isdisjoint(paths):
        return "one of its fields has the name of another column"
    if len(set(paths)) < len(paths):
        return "two of its fields have one name, or differ only in case"
    return ""


def _find_fault(field: pa.Field) -> str:
    """Say what no table may have in the name of a column or of its fields, or return ""."""
    for path in _list_paths(field):
        if not path[-1]:
            return "no table may have an empty name"
        if bad := sorted(char for char in set(path[-1]) if char in _REFUSED or not char.isprintable()):
            return f"no table may have {bad[0]!r} in a name"
    return ""


def _list_paths(field: pa.Field, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of a column and of all its fields, as Iceberg names them."""
    path = (*before, field.name)
    yield path
    for inner in list_fields(field.type):
        yield from _list_paths(inner, path)


def list_fields(type_: pa.DataType) -> list[pa.Field]:
    """Return the fields of a type, with Iceberg's names for those of lists and maps. Empty for a type without any."""
    if types.is_struct(type_):
        return list(type_)
    if types.is_map(type_):
        return [type_.key_field.with_name("key"), type_.item_field.with_name("value")]
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return [type_.value_field.with_name("element")]
    return []


def convert_type(type_: pa.DataType) -> pa.DataType | None:
    """Return the type of a table's column for a type of Arrow, or None if tables have none for it."""
    if any(fits(type_) for fits in _SAME):
        return type_
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return pa.string()
    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_):
        return pa.binary()
    if types.is_timestamp(type_) and type_.unit == "us" and type_.tz == "UTC":
        return type_
    if types.is_dictionary(type_):
        return convert_type(type_.value_type)
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        element = convert_type(type_.value_type)
        return None if element is None else pa.list_(pa.field("element", element, type_.value_field.nullable))
    if types.is_struct(type_) and type_.num_fields:
        pairs = [(field, convert_type(field.type)) for field in type_]
        if all(inner is not None for _, inner in pairs):
            return pa.struct([pa.field(field.name, inner, field.nullable) for field, inner in pairs])
    return None
