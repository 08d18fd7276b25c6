"""Other columns in a Parquet file: what stays is copied as the bytes it is, and neither decoded nor compressed anew.

pyarrow cannot do that, and writing 768 floats a row anew costs more than all else that their new labels take. A Parquet
file is column chunks, each in one piece, and a footer in Thrift's compact protocol that says where each stands (the
format: parquet-format's README and parquet.thrift, of which the field numbers here are). The footer is read without
its definition, as numbered fields, so that fields which this module does not know stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from thrift.protocol.TCompactProtocol import TCompactProtocol
from thrift.Thrift import TType
from thrift.transport.TTransport import TMemoryBuffer

_MAGIC = b"PAR1"

# Thrift's numbers of the fields: of FileMetaData, SchemaElement, RowGroup, ColumnChunk and ColumnMetaData.
_SCHEMA, _GROUPS, _KEY_VALUES, _ORDERS = 2, 4, 5, 7
_NAME, _CHILDREN = 4, 5
_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _SORTING, _GROUP_OFFSET, _GROUP_COMPRESSED = 1, 2, 3, 4, 5, 6
_CHUNK_OFFSET, _CHUNK_META, _PAGE_INDEXES = 2, 3, (4, 5, 6, 7)
_UNCOMPRESSED, _COMPRESSED, _PAGES, _BLOOM = 6, 7, (9, 10, 11), (14, 15)

Struct = dict[int, tuple[int, Any]]
"""Numbered fields, each with its Thrift type. A list is the type of its items and the items."""

_SCALARS = {
    TType.BOOL: "Bool",
    TType.BYTE: "Byte",
    TType.I16: "I16",
    TType.I32: "I32",
    TType.I64: "I64",
    TType.DOUBLE: "Double",
    TType.STRING: "Binary",
}


def replace_columns(data: bytes, new: pa.Table, schema: pa.Schema, **options: Any) -> bytes:
    """A Parquet file's rows with the columns and metadata of `schema`: those in `new` from there, the rest as they are.

    `new` has the file's rows in their order, or no column; `options` are `pyarrow.parquet.ParquetWriter`'s for its
    columns. Page indexes and bloom filters, which say where something stands, are left out: readers do without.

    Raises `pyarrow.ArrowInvalid` for what is no Parquet file, and when `new` has other rows; `KeyError` for a column
    that neither has. What stays must have the type that `schema` gives it: that is not looked at.
    """
    old = _File(data)
    counts = [group[_GROUP_ROWS][1] for group in old.groups]
    if new.num_columns and sum(counts) != new.num_rows:
        raise pa.ArrowInvalid(f"{new.num_rows} rows in place of {sum(counts)}")
    new = new.select([name for name in schema.names if name in new.column_names])
    made = _File(_write_table(new, counts, options))
    frame = _frame(schema)
    sources = {name: made if name in made.columns else old for name in schema.names}

    body = _Body()
    groups = []
    for number, group in enumerate(old.groups):
        first = body.size
        chunks = [chunk for name, file in sources.items() for chunk in file.copy_column(number, name, body)]
        kept = {key: value for key, value in group.items() if key != _SORTING}  # by places of columns
        groups.append({**kept, **_sum_up(chunks, first)})
    elements = [frame.root, *(element for name, file in sources.items() for element in file.columns[name][0])]
    footer = old.footer | {key: frame.footer[key] for key in (_KEY_VALUES, _ORDERS)}
    footer |= {_SCHEMA: _structs(elements), _GROUPS: _structs(groups)}
    transport = TMemoryBuffer()
    _write(TCompactProtocol(transport), TType.STRUCT, footer)
    end = transport.getvalue()
    return b"".join((*body.pieces, end, len(end).to_bytes(4, "little"), _MAGIC))


class _Body:
    """What a file is joined from, so that bytes are copied once."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = [_MAGIC]
        self.size = len(_MAGIC)

    def add(self, piece: memoryview) -> None:
        self.pieces.append(piece)
        self.size += len(piece)


class _File:
    """A Parquet file. `columns`: for each name its elements in the schema, and where its leaves stand in a group."""

    def __init__(self, data: bytes) -> None:
        if data[:4] != _MAGIC or data[-4:] != _MAGIC:
            raise pa.ArrowInvalid("not a Parquet file")
        size = int.from_bytes(data[-8:-4], "little")
        self.footer: Struct = _read(TCompactProtocol(TMemoryBuffer(data[-8 - size : -8])), TType.STRUCT)
        self.groups: list[Struct] = self.footer[_GROUPS][1][1]
        elements: list[Struct] = self.footer[_SCHEMA][1][1]
        self.root = elements[0]
        self.columns = dict(_split_schema(elements[1:]))
        self._data = memoryview(data)

    def copy_column(self, group: int, name: str, body: _Body) -> Iterator[Struct]:
        """Put the chunks of a column in one row group at the end of `body`. Yields them as they are there."""
        for chunk in self.groups[group][_COLUMNS][1][1][self.columns[name][1]]:
            meta: Struct = chunk[_CHUNK_META][1]
            pages = {page: meta[page][1] for page in _PAGES if page in meta and meta[page][1] > 0}
            start = min(pages.values())
            moved = {page: (TType.I64, place - start + body.size) for page, place in pages.items()}
            body.add(self._data[start : start + meta[_COMPRESSED][1]])
            meta = {key: value for key, value in meta.items() if key not in _BLOOM} | moved
            kept = {key: value for key, value in chunk.items() if key not in _PAGE_INDEXES}
            yield {**kept, _CHUNK_OFFSET: (TType.I64, 0), _CHUNK_META: (TType.STRUCT, meta)}


@lru_cache(maxsize=16)
def _frame(schema: pa.Schema) -> _File:
    """A file without rows: what pyarrow notes of a whole schema."""
    return _File(_write_table(schema.empty_table(), [], {}))


def _sum_up(chunks: list[Struct], first: int) -> Struct:
    """What a row group says of its chunks, which begin at `first`."""
    metas = [chunk[_CHUNK_META][1] for chunk in chunks]
    return {
        _COLUMNS: _structs(chunks),
        _GROUP_BYTES: (TType.I64, sum(meta[_UNCOMPRESSED][1] for meta in metas)),
        _GROUP_OFFSET: (TType.I64, first),
        _GROUP_COMPRESSED: (TType.I64, sum(meta[_COMPRESSED][1] for meta in metas)),
    }


def _split_schema(elements: list[Struct]) -> Iterator[tuple[str, tuple[list[Struct], slice]]]:
    """The columns in a schema's elements, which stand depth first."""
    first = leaf = 0
    while first < len(elements):
        end, leaves, wanted = first, 0, 1
        while wanted:
            children = elements[end].get(_CHILDREN, (TType.I32, 0))[1]
            wanted += children - 1
            leaves += not children
            end += 1
        name = elements[first][_NAME][1].decode()
        yield name, (elements[first:end], slice(leaf, leaf + leaves))
        first, leaf = end, leaf + leaves


def _write_table(table: pa.Table, counts: list[int], options: dict[str, Any]) -> bytes:
    """A Parquet file with row groups of so many rows."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, **options) as writer:
        first = 0
        for count in counts:
            writer.write_table(table.slice(first, count), row_group_size=max(count, 1))
            first += count
    return buffer.getvalue()


def _structs(items: list[Struct]) -> tuple[int, Any]:
    return TType.LIST, (TType.STRUCT, items)


def _read(protocol: TCompactProtocol, kind: int) -> Any:
    if kind == TType.STRUCT:
        fields: Struct = {}
        protocol.readStructBegin()
        while (field := protocol.readFieldBegin())[1] != TType.STOP:
            fields[field[2]] = (field[1], _read(protocol, field[1]))
            protocol.readFieldEnd()
        protocol.readStructEnd()
        return fields
    if kind == TType.LIST:
        inner, size = protocol.readListBegin()
        items = [_read(protocol, inner) for _ in range(size)]
        protocol.readListEnd()
        return inner, items
    return getattr(protocol, f"read{_SCALARS[kind]}")()


def _write(protocol: TCompactProtocol, kind: int, value: Any) -> None:
    if kind == TType.STRUCT:
        protocol.writeStructBegin("")
        for number, (inner, item) in sorted(value.items()):
            protocol.writeFieldBegin("", inner, number)
            _write(protocol, inner, item)
            protocol.writeFieldEnd()
        protocol.writeFieldStop()
        protocol.writeStructEnd()
    elif kind == TType.LIST:
        protocol.writeListBegin(value[0], len(value[1]))
        for item in value[1]:
            _write(protocol, value[0], item)
        protocol.writeListEnd()
    else:
        getattr(protocol, f"write{_SCALARS[kind]}")(value)
