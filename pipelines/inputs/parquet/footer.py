"""The footer of a Parquet file: its length, and the statistics of one column, read without pyarrow.

pyarrow's `ColumnChunkMetaData` ends the process, by an exception of C++ that is not caught, if the footer contradicts
itself there. Opening a file and reading its rows do not. The structures are those of `parquet.thrift`, in the compact
protocol of Apache Thrift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.inputs.image_columns import UnreadableFile
from storage.files import LEAST_BYTES, StoreFile

MAX_BYTES = 256 << 20
"""Footers of more bytes are not read. Parsed by pyarrow, a footer takes about ten times its bytes."""
_MAX_SCANNED = 8 << 20
"""Statistics are not looked for in footers of more bytes. A scan takes about a second for each MiB."""
_ROW_GROUPS, _COLUMNS, _ROWS, _META_DATA, _STATISTICS, _NULLS = 4, 1, 3, 3, 12, 3
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


@dataclass(frozen=True)
class Bounds:
    """The statistics of a column in one row group with rows. `low` and `high` are None if all values are null."""

    low: bytes | None
    high: bytes | None


def measure_footer(file: StoreFile, size: int) -> int:
    """Return the length of a file's footer in bytes, or 0 if this is no Parquet file. Raises `UnreadableFile`."""
    file.seek(max(0, size - LEAST_BYTES))
    tail = file.read()
    file.seek(0)
    if len(tail) < 8 or tail[-4:] not in (b"PAR1", b"PARE"):
        return 0
    length = int.from_bytes(tail[-8:-4], "little")
    if length > MAX_BYTES:
        raise UnreadableFile(f"its footer has {length} bytes; at most {MAX_BYTES} are read")
    return length


def read_bounds(file: StoreFile, size: int, column: int) -> list[Bounds] | None:
    """Return the statistics of a column in each row group with rows, or None if one of them has none.

    `column` is the number of a leaf of the schema. A footer that is not what `parquet.thrift` says has no statistics.
    """
    length = measure_footer(file, size)
    if not 0 < length <= min(_MAX_SCANNED, size - 8):
        return None
    file.seek(size - 8 - length)
    try:
        return _list_bounds(_Compact(file.read(length)), column)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _list_bounds(footer: _Compact, column: int) -> list[Bounds] | None:
    found: list[Bounds] = []
    for field, type_ in footer.fields():
        if field != _ROW_GROUPS:
            footer.skip(type_)
            continue
        for _ in footer.elements():
            group: dict[int, Any] = {}
            for part, kind in footer.fields():
                if part == _COLUMNS:
                    for number, item in enumerate(footer.elements()):
                        if number == column:
                            group[part] = footer.value(item)
                        else:
                            footer.skip(item)
                else:
                    group[part] = footer.value(kind)
            if not group[_ROWS]:
                continue
            statistics = group[_COLUMNS][_META_DATA].get(_STATISTICS, {})
            # Fields 5 and 6 are the bounds, 1 and 2 are those of old writers, in the order of signed bytes.
            high, low = statistics.get(5, statistics.get(1)), statistics.get(6, statistics.get(2))
            if statistics.get(_NULLS) == group[_ROWS]:
                low = high = None
            elif not (isinstance(low, bytes) and isinstance(high, bytes)):
                return None
            found.append(Bounds(low, high))
    return found


class _Compact:
    """A reader of Thrift's compact protocol. Raises `IndexError`, `ValueError` or `RecursionError` for other data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield the number and the type of each field of a struct. The caller reads or skips each value."""
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._integer()
            yield field, head & 15

    def elements(self) -> Iterator[int]:
        """Yield the type of each element of a list. The caller reads or skips each element."""
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        for _ in range(size):
            yield head & 15

    def value(self, type_: int) -> Any:
        """Read a value: a struct is a dictionary by field numbers."""
        if type_ == _STRUCT:
            return {field: self._boolean_or_value(kind) for field, kind in self.fields()}
        if type_ in (_LIST, _SET):
            return [self.value(kind) for kind in self.elements()]
        if type_ == _BINARY:
            return self._take(self._varint())
        if type_ in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if type_ == _DOUBLE:
            return self._take(8)
        if type_ in (4, 5, 6):
            return self._integer()
        raise ValueError(f"type {type_} is not in Parquet's footers")

    def skip(self, type_: int) -> None:
        """Read a field's value and forget it. A boolean field has no value beside its type."""
        self._position = _skip(self._data, self._position, type_)

    def _boolean_or_value(self, type_: int) -> Any:
        return type_ == _TRUE if type_ in (_TRUE, _FALSE) else self.value(type_)

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _varint(self) -> int:
        value, self._position = _read_varint(self._data, self._position)
        return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _take(self, size: int) -> bytes:
        self._position += size
        if self._position > len(self._data):
            raise IndexError("a text beyond the end of the footer")
        return self._data[self._position - size : self._position]


def _skip(data: bytes, position: int, type_: int) -> int:
    """Return the position after a field's value. It is one function with few calls, since footers have many values."""
    if type_ == _STRUCT:
        while head := data[position]:
            position += 1
            if head < 16:  # the field's number follows
                while data[position] > 127:
                    position += 1
                position += 1
            kind = head & 15
            if 4 <= kind <= 6:
                while data[position] > 127:
                    position += 1
                position += 1
            elif kind > 2:
                position = _skip(data, position, kind)
        return position + 1
    if type_ in (_LIST, _SET):
        head = data[position]
        size, kind = head >> 4, head & 15
        position += 1
        if size == 15:
            size, position = _read_varint(data, position)
        for _ in range(size):
            position = _skip(data, position, _BYTE if kind in (_TRUE, _FALSE) else kind)
        return position
    if type_ == _BINARY:
        size, position = _read_varint(data, position)
        return position + size
    if type_ in (4, 5, 6):
        return _read_varint(data, position)[1]
    if type_ in (_BYTE, _DOUBLE):
        return position + (1 if type_ == _BYTE else 8)
    if type_ in (_TRUE, _FALSE):
        return position
    raise ValueError(f"type {type_} is not in Parquet's footers")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[position]) > 127:
        value |= (byte & 127) << shift
        shift += 7
        position += 1
        if shift > 70:
            raise ValueError("an integer of more than 64 bits")
    return value | byte << shift, position + 1
