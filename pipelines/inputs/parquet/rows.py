"""From a batch of a Parquet file to rows: images, keys and passed-through columns, value by value.

A value that cannot be read costs its row, not the file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inputs.image_columns import ImageColumn, UnreadableFile, field_of, is_binary, is_list, is_string
from pipelines.inputs.images import fetch_images
from pipelines.inputs.lists import resolve
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from siglip.images.decode import ImageRejected

_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
"""Base64 of a JPEG, PNG, GIF, WebP or TIFF, by its first bytes."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a file: the columns that are read, and how to read them."""

    batch: pa.RecordBatch
    column: ImageColumn
    planned: Input
    reading: Reading

    def rows(self, first: int, passed: dict[str, str], skipped: Skipped) -> Iterator[Row]:
        """Yield a row for each image. `first` is the number of the first row in the file.

        `passed` are the passed-through columns with their names in the output. Rows with an empty list of images have
        none; they are counted in `skipped`. Raises `UnreadableFile`, and whatever pyarrow raises.
        """
        array = self._find(self.column.path[0])
        leaves, parents = _flatten(array, self.column.path[1:])
        images = _Images(leaves, self.column.name)
        keys = None if (name := self.reading.parquet.key_column) is None else self._find(name)
        carried = {name: _cast(self._find(source), self.reading.columns.field(name)) for source, name in passed.items()}
        rows: list[Row] = []
        linked: list[Input] = []
        for number, positions in enumerate(_group(parents, len(array))):
            if not positions and array[number].is_valid:
                skipped.add(f"row {first + number} of {self.planned.uri}", "Parquet rows with an empty list of images")
                continue
            for order, position in enumerate(positions or [None]):
                key = None if keys is None else _to_text(keys[number])
                path = None if position is None else images.path(position)
                if key is None and path:
                    key = path
                elif self.column.many and position is not None:
                    key = f"{first + number if key is None else key}.{order}"
                row = Row(str(first + number) if key is None else key, self.planned.uri)
                for name, values in carried.items():
                    value = values[number]
                    if isinstance(value, ImageRejected):
                        row.rejected = value
                    else:
                        row.columns[name] = value
                if row.rejected is None:
                    self._fill(row, None if position is None else images, position or 0, linked)
                rows.append(row)
        fetched = fetch_images(linked, self.reading) if linked else iter(())
        for row in rows:
            if row.data is None and row.rejected is None:
                found = next(fetched)
                row.data, row.rejected = found.data, found.rejected
            yield row

    def _find(self, name: str) -> pa.Array:
        found = self.batch.schema.get_all_field_indices(name)
        if len(found) != 1:  # for example a column named `a.b` beside a field `b` of `a`
            raise UnreadableFile(f"{len(found)} columns are read as {name!r}")
        return self.batch.column(found[0])

    def _fill(self, row: Row, images: _Images | None, position: int, linked: list[Input]) -> None:
        """Set a row's bytes or rejection, or append its URI to `linked`."""
        try:
            value = None if images is None else images.value(position)
            if isinstance(value, str) and (decoded := decode_text(value)) is not None:
                value = decoded
        except ValueError as error:
            row.rejected = ImageRejected("unreadable", f"{self.column.name}: {error}")
            return
        if value is None:
            row.rejected = ImageRejected("missing", f"{self.column.name} is null")
        elif isinstance(value, str):
            linked.append(Input("uri", resolve(value, self.planned.uri), row.key, -1, ""))
        else:
            row.data = value


class _Images:
    """The images of a batch: bytes, or URIs where there are no bytes."""

    def __init__(self, leaves: pa.Array, name: str) -> None:
        self._data = self._uris = None
        self._paths: pa.Array | None = None
        if pa.types.is_struct(leaves.type):
            self._data = _field(leaves, "bytes", is_binary)
            self._uris = self._paths = _field(leaves, "path", is_string)
        elif is_string(leaves.type):
            self._uris = leaves
        elif is_binary(leaves.type) or pa.types.is_fixed_size_binary(leaves.type) or pa.types.is_null(leaves.type):
            self._data = leaves
        if self._data is None and self._uris is None:
            raise UnreadableFile(f"the column {name!r} is {leaves.type}: expected images or their URIs")

    def value(self, position: int) -> bytes | str | None:
        """Return an image's bytes or its URI, or None if both are null. Raises `ValueError` for a URI not in UTF-8."""
        data = None if self._data is None else self._data[position].as_py()
        if data is not None or self._uris is None:
            return data
        uri = self._uris[position].as_py()
        return None if uri is None else str(uri)

    def path(self, position: int) -> str | None:
        """Return the path that a struct names beside the bytes."""
        return None if self._paths is None else _to_text(self._paths[position])


def decode_text(text: str) -> bytes | None:
    """Return the image in a data: URI or in base64, or None for any other text. Raises `ValueError` if it is broken."""
    if (found := _DATA_URI.match(text)) is not None:
        text = text[found.end() :]
    elif text[:5].lower() == "data:":
        raise ValueError("a data: URI that is not base64")
    elif _BASE64.fullmatch(text) is None:
        return None
    return base64.b64decode("".join(text.split()), validate=True)


def _flatten(array: pa.Array, path: tuple[str, ...]) -> tuple[pa.Array, list[int] | None]:
    """Return the values at a path of fields, through lists, and for each its row; None if each row has one value."""
    parents: pa.Array | None = None
    while True:
        type_ = array.type
        if isinstance(type_, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_dictionary(type_):
            array = array.dictionary_decode()
        elif is_list(type_):
            above = pc.list_parent_indices(array)
            array, parents = pc.list_flatten(array), above if parents is None else parents.take(above)
        elif path:
            if (index := field_of(type_, path[0])) < 0:
                raise UnreadableFile(f"{type_} has no single field {path[0]!r}")
            array, path = pc.struct_field(array, [index]), path[1:]
        else:
            return array, None if parents is None else parents.to_pylist()


def _group(parents: list[int] | None, rows: int) -> Iterator[list[int]]:
    """Yield for each row the positions of its values."""
    if parents is None:
        yield from ([number] for number in range(rows))
        return
    groups: list[list[int]] = [[] for _ in range(rows)]
    for position, number in enumerate(parents):
        groups[number].append(position)
    yield from groups


def _field(array: pa.Array, name: str, fits: object) -> pa.Array | None:
    index = field_of(array.type, name)
    if index < 0:
        return None
    found, _ = _flatten(pc.struct_field(array, [index]), ())
    return found if callable(fits) and fits(found.type) else None


def _to_text(value: pa.Scalar) -> str | None:
    """Return a key as text, or None for null. Bytes are UTF-8, else hexadecimal digits."""
    try:
        found = value.as_py()
    except (ValueError, OverflowError):  # not UTF-8, or a time that Python's types do not hold
        if is_string(value.type):
            return str(value.cast(pa.binary()).as_py().decode("utf-8", "replace"))
        found = value.cast(pa.string()).as_py()
    if isinstance(found, bytes):
        try:
            return found.decode()
        except UnicodeDecodeError:
            return found.hex()
    return None if found is None else str(found)


def _cast(values: pa.Array, target: pa.Field) -> list[pa.Array | ImageRejected]:
    """Cast a passed-through column to the output's type. A value that would change rejects its row."""
    try:
        found = values.cast(target.type)
        found.validate(full=True)
        return [found.slice(number, 1) for number in range(len(values))]
    except pa.ArrowException as error:
        if len(values) > 1:
            return [value for number in range(len(values)) for value in _cast(values.slice(number, 1), target)]
        detail = f"parquet.columns: {target.name!r} does not fit the output's {target.type}: {error}"
        return [ImageRejected("unreadable", " ".join(detail.split()))]
