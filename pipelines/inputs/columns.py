"""The types of columns passed through from Parquet inputs: one type for all files, which changes no value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from storage.settings import ConfigError


@dataclass
class PassedColumns:
    """The types of the passed-through columns, unified over all files that were added.

    `wanted` maps a column's name in the inputs to its name in the output. `fixed` are the types of an existing output,
    which all files must fit. Only the files' footers are read, and no values.
    """

    wanted: dict[str, str]
    fixed: pa.Schema | None = None
    _types: dict[str, pa.DataType] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    _large: dict[str, str] = field(default_factory=dict)
    """For each column, the first file that may have integers over 2^53, which a float64 cannot hold exactly."""

    def add(self, uri: str, schema: pa.Schema, small_integers: frozenset[str]) -> None:
        """Add a file's columns. Raises `ConfigError` that names the file if a column has no common type with the
        others.

        `small_integers` are the columns whose integers are proven to be within 2^53.
        """
        for source, name in self.wanted.items():
            if source not in schema.names:
                continue
            if len(schema.get_all_field_indices(source)) > 1:
                raise ConfigError(f"parquet.columns: {uri} has more than one column {source!r}")
            stored = schema.field(source).type
            type_ = _plain(stored)
            if pa.types.is_integer(type_) and type_.bit_width == 64 and source not in small_integers:
                self._large.setdefault(source, uri)
            known = self.fixed.field(name).type if self.fixed is not None else self._types.get(source, type_)
            # An output of an earlier version may have dictionaries in lists and structs, which stay as they are.
            stays = self.fixed is not None and (stored == known or _fits(type_, known))
            merged = known if stays else unify(known, type_)
            if merged is None or (self.fixed is not None and merged != known):
                there = "in the output" if self.fixed is not None else f"in {self._first[source]}"
                raise ConfigError(
                    f"parquet.columns: {source!r} is {type_} in {uri} and {known} {there}: no type holds both "
                    "unchanged; tag them into two outputs, or leave the column out"
                )
            self._types[source] = merged
            self._first.setdefault(source, uri)
            self._check_large(source)

    def schema(self) -> pa.Schema:
        """Return the output's passed-through columns. Raises `ConfigError` for a column that no file has."""
        if self.fixed is not None:
            return self.fixed
        for source in self.wanted:
            if source not in self._types:
                raise ConfigError(f"parquet.columns: no Parquet input has a column {source!r}")
        return pa.schema([(name, self._types[source]) for source, name in self.wanted.items()])

    def _check_large(self, source: str) -> None:
        if pa.types.is_floating(self._types[source]) and source in self._large:
            raise ConfigError(
                f"parquet.columns: {source!r} is floating point in some inputs, and its integers in "
                f"{self._large[source]} may be over 2^53 and would change: tag them into two outputs, or leave it out"
            )


def unify(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the smallest type that holds every value of both types unchanged, or None.

    64-bit integers and floats unify to float64. The caller must check that the integers are within 2^53.
    """
    one, other = _plain(one), _plain(other)
    if _fits(one, other):
        return other
    if _fits(other, one):
        return one
    try:
        fields = [pa.schema([pa.field("x", type_)]) for type_ in (one, other)]
        merged = pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return None
    return merged if _fits(one, merged) and _fits(other, merged) else None


def _plain(type_: pa.DataType) -> pa.DataType:
    """Return the type without its encoding: the value type of a dictionary, the plain type of a view. Also inside.

    The files of an output could not be read together if they had dictionaries: more values than the indices can count.
    """
    types = pa.types
    if types.is_dictionary(type_):
        return _plain(type_.value_type)
    if types.is_string_view(type_) or types.is_binary_view(type_):
        return pa.string() if types.is_string_view(type_) else pa.binary()
    if types.is_struct(type_):
        return pa.struct([_plain_field(item) for item in type_])
    if types.is_map(type_):
        return pa.map_(_plain_field(type_.key_field), _plain_field(type_.item_field), type_.keys_sorted)
    if types.is_fixed_size_list(type_):
        return pa.list_(_plain_field(type_.value_field), type_.list_size)
    makers: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.Field], pa.DataType]]] = [
        (types.is_list, pa.list_),
        (types.is_large_list, pa.large_list),
        (types.is_list_view, pa.list_view),
        (types.is_large_list_view, pa.large_list_view),
    ]
    return next((make(_plain_field(type_.value_field)) for is_one, make in makers if is_one(type_)), type_)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain(field.type))


def _fits(type_: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether a cast keeps every value. Assumes that 64-bit integers are within 2^53."""
    if type_ == target or pa.types.is_null(type_):
        return True
    tests: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], bool], Callable[[], bool]]] = [
        (pa.types.is_integer, pa.types.is_integer, lambda: _holds_integers(type_, target)),
        (pa.types.is_integer, pa.types.is_floating, lambda: type_.bit_width < _mantissa(target) or _is_double(target)),
        (pa.types.is_floating, pa.types.is_floating, lambda: type_.bit_width <= target.bit_width),
        (pa.types.is_string, pa.types.is_large_string, lambda: True),
        (pa.types.is_binary, pa.types.is_large_binary, lambda: True),
        (pa.types.is_date32, pa.types.is_date64, lambda: True),
        (pa.types.is_decimal, pa.types.is_decimal, lambda: _holds_decimals(type_, target)),
        (pa.types.is_timestamp, pa.types.is_timestamp, lambda: _is_finer(type_, target) and type_.tz == target.tz),
        (pa.types.is_time, pa.types.is_time, lambda: _is_finer(type_, target)),
        (pa.types.is_duration, pa.types.is_duration, lambda: _is_finer(type_, target)),
        (_is_list, _is_list, lambda: _fits(type_.value_type, target.value_type) and _same_length(type_, target)),
        (pa.types.is_struct, pa.types.is_struct, lambda: _holds_fields(type_, target)),
    ]
    return next((holds() for is_one, is_other, holds in tests if is_one(type_) and is_other(target)), False)


def _holds_integers(type_: pa.DataType, target: pa.DataType) -> bool:
    if pa.types.is_signed_integer(type_):
        return pa.types.is_signed_integer(target) and bool(type_.bit_width <= target.bit_width)
    extra = int(pa.types.is_signed_integer(target))  # the sign needs one bit
    return bool(type_.bit_width + extra <= target.bit_width)


def _mantissa(type_: pa.DataType) -> int:
    """Return the bits of the integers that a float holds exactly (IEEE 754)."""
    return {16: 11, 32: 24, 64: 53}[type_.bit_width]


def _is_double(type_: pa.DataType) -> bool:
    return bool(pa.types.is_float64(type_))


def _holds_decimals(type_: pa.DataType, target: pa.DataType) -> bool:
    whole = target.precision - target.scale >= type_.precision - type_.scale
    return bool(whole and target.scale >= type_.scale)


def _is_finer(type_: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether the target's unit is as fine or finer. For times out of its range, the cast fails."""
    units = ["s", "ms", "us", "ns"]
    return units.index(type_.unit) <= units.index(target.unit)


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _same_length(type_: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether the target can hold lists of this length: fixed-size lists fit lists of any length, not the reverse.

    Lists with 32-bit offsets fit lists with 64-bit offsets, not the reverse.
    """
    if pa.types.is_fixed_size_list(target):
        return pa.types.is_fixed_size_list(type_) and bool(type_.list_size == target.list_size)
    return not (pa.types.is_large_list(type_) and pa.types.is_list(target))


def _holds_fields(type_: pa.DataType, target: pa.DataType) -> bool:
    return all(
        target.get_field_index(item.name) >= 0 and _fits(item.type, target.field(item.name).type) for item in type_
    )
