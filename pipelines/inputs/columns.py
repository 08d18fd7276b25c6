"""Columns passed through from Parquet inputs: one type for all files, and no value ever changed to fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from storage.settings import ConfigError


@dataclass
class PassedColumns:
    """The types of the passed columns, unified over the files as they are looked at.

    `wanted` is source name to output name. `fixed` are the types of an output that exists: files must fit them. Knows
    only the files that it was shown, and of a file only what its footer says.
    """

    wanted: dict[str, str]
    fixed: pa.Schema | None = None
    _types: dict[str, pa.DataType] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    _large: dict[str, str] = field(default_factory=dict)
    """By column the first file with integers that may be beyond what a float64 counts in ones."""

    def add(self, uri: str, schema: pa.Schema, small_integers: frozenset[str]) -> None:
        """Take a file in. Raises `ConfigError`, naming it, when a column of it has no type in common with the rest."""
        for source, name in self.wanted.items():
            if source not in schema.names:
                continue
            if len(schema.get_all_field_indices(source)) > 1:
                raise ConfigError(f"parquet.columns: {uri} has more than one column {source!r}")
            type_ = _plain(schema.field(source).type)
            if pa.types.is_integer(type_) and type_.bit_width == 64 and source not in small_integers:
                self._large.setdefault(source, uri)
            known = self.fixed.field(name).type if self.fixed is not None else self._types.get(source, type_)
            merged = known if self.fixed is not None and _fits(type_, known) else unify(known, type_)
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
        """The output's passed columns. Raises `ConfigError` for one that no file has."""
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
    """The smallest common type in which every value of both types stands unchanged, or None.

    64-bit integers and floats unify to float64: whether their values allow it is the caller's to check.
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
    """A dictionary's values, and views as what they are views of: encodings are the file's own business."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(type_) else type_


def _fits(type_: pa.DataType, target: pa.DataType) -> bool:
    """Whether a cast keeps every value; a float64 is taken to hold a 64-bit integer."""
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
    extra = int(pa.types.is_signed_integer(target))  # one bit is the sign's
    return bool(type_.bit_width + extra <= target.bit_width)


def _mantissa(type_: pa.DataType) -> int:
    """Bits in which a float counts integers in ones, IEEE 754."""
    return {16: 11, 32: 24, 64: 53}[type_.bit_width]


def _is_double(type_: pa.DataType) -> bool:
    return bool(pa.types.is_float64(type_))


def _holds_decimals(type_: pa.DataType, target: pa.DataType) -> bool:
    whole = target.precision - target.scale >= type_.precision - type_.scale
    return bool(whole and target.scale >= type_.scale)


def _is_finer(type_: pa.DataType, target: pa.DataType) -> bool:
    """Whether a unit is as fine or finer. A time too far off for it makes the cast fail, not change."""
    units = ["s", "ms", "us", "ns"]
    return units.index(type_.unit) <= units.index(target.unit)


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _same_length(type_: pa.DataType, target: pa.DataType) -> bool:
    """Lists of a fixed length become lists of any, not the other way; short lists' offsets fit into long ones'."""
    if pa.types.is_fixed_size_list(target):
        return pa.types.is_fixed_size_list(type_) and bool(type_.list_size == target.list_size)
    return not (pa.types.is_large_list(type_) and pa.types.is_list(target))


def _holds_fields(type_: pa.DataType, target: pa.DataType) -> bool:
    return all(
        target.get_field_index(item.name) >= 0 and _fits(item.type, target.field(item.name).type) for item in type_
    )
