"""From a batch of a Parquet file to rows: images, keys and passed-through columns, value by value.

A value that cannot be read costs its row, not the file.
"""

from __future__ import annotations

import base64
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inputs.image_columns import ImageColumn, UnreadableFile, field_of, is_binary, is_list, is_string, plain
from pipelines.inputs.images import fetch_images
from pipelines.inputs.lists import resolve
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from siglip.images.decode import ImageRejected

_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
"""Base64 of a JPEG, PNG, GIF, WebP or TIFF, by its first bytes."""
_URI_BYTES = 8192
"""Longer texts are no URIs: a path of Linux has at most 4,096 bytes, a key of S3 1,024."""


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
        images = _Images(leaves, self.column.name, self.reading.max_bytes)
        keys = None if (name := self.reading.parquet.key_column) is None else self._find(name)
        carried = {name: _cast(self._find(source), self.reading.columns.field(name)) for source, name in passed.items()}
        rows = deque[tuple[Row, int | None, str | None]]()
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
                uri = None if position is None or row.rejected else images.uri(position)
                rows.append((row, position, uri))
        base = self.planned.uri
        linked = [Input("uri", resolve(uri, base), row.key, -1, "") for row, _, uri in rows if uri is not None]
        fetched = fetch_images(linked, self.reading) if linked else iter(())
        while rows:  # a row that was read is not held: a list may have thousands of images
            row, position, uri = rows.popleft()
            if uri is not None:
                found = next(fetched)
                row.data, row.rejected = found.data, found.rejected
            elif row.rejected is None:
                row.data, row.rejected = images.read(position)
            yield row

    def _find(self, name: str) -> pa.Array:
        found = self.batch.schema.get_all_field_indices(name)
        if len(found) != 1:  # for example a column named `a.b` beside a field `b` of `a`
            raise UnreadableFile(f"{len(found)} columns are read as {name!r}")
        return self.batch.column(found[0])


class _Images:
    """The images of a batch: bytes, text with an image in base64, or URIs where there are no bytes.

    Dictionaries are not decoded: a value of 60 MB may be in each row.
    """

    def __init__(self, leaves: pa.Array, name: str, max_bytes: int) -> None:
        self._name, self._max_bytes = name, max_bytes
        self._paths: pa.Array | None = None
        type_, data, texts = plain(leaves.type), None, None
        if pa.types.is_struct(type_):
            data = _field(leaves, "bytes", is_binary)
            texts = self._paths = _field(leaves, "path", is_string)
        elif is_string(type_):
            texts = leaves
        elif is_binary(type_) or pa.types.is_fixed_size_binary(type_) or pa.types.is_null(type_):
            data = leaves
        if data is None and texts is None:
            raise UnreadableFile(f"the column {name!r} is {leaves.type}: expected images or their URIs")
        self._data = None if data is None else _Values(data)
        self._texts = None if texts is None else _Values(texts)

    def uri(self, position: int) -> str | None:
        """Return the URI of an image that has no bytes, or None: `read` says why, or gives the image."""
        if self._texts is None or (self._data is not None and self._data.length(position) is not None):
            return None
        size = self._texts.length(position)
        if size is None or size > _URI_BYTES:
            return None
        try:
            text = self._texts.read(position).decode()
            return text if decode_text(text) is None else None
        except ValueError:
            return None

    def read(self, position: int | None) -> tuple[bytes | None, ImageRejected | None]:
        """Return an image's bytes, or why there are none. Only for images without a URI."""
        for values in (self._data, self._texts):
            if values is None or position is None or (size := values.length(position)) is None:
                continue
            size = size if values is self._data else size // 2  # base64 has 4 characters for 3 bytes, and line ends
            if size > self._max_bytes:
                return None, ImageRejected("too_many_bytes", f"{size} bytes, over {self._max_bytes}")
            data = values.read(position)
            return (data, None) if values is self._data else self._decode(data)
        return None, ImageRejected("missing", f"{self._name} is null")

    def _decode(self, text: bytes) -> tuple[bytes | None, ImageRejected | None]:
        try:
            if (data := decode_text(text.decode())) is not None:
                return data, None
            detail = f"a text of {len(text)} bytes is no URI, and no image in base64"
        except ValueError as error:
            detail = str(error)
        return None, ImageRejected("unreadable", f"{self._name}: {detail}")

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
        elif pa.types.is_dictionary(type_) and pa.types.is_nested(plain(type_)):
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
    return found if callable(fits) and fits(plain(found.type)) else None


class _Values:
    """Bytes or texts, null or not. Only `read` copies a value: the length of each is looked up before."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array
        encoded = pa.types.is_dictionary(array.type)
        values = array.dictionary if encoded else array
        if pa.types.is_binary_view(values.type) or pa.types.is_string_view(values.type):
            values = values.cast(pa.large_binary())
        null = pa.types.is_null(values.type)
        lengths = pa.nulls(len(values), pa.int32()) if null else pc.binary_length(values)
        self._lengths: list[int | None] = (lengths.take(array.indices) if encoded else lengths).to_pylist()

    def length(self, position: int) -> int | None:
        """Return a value's length in bytes, or None for null."""
        return self._lengths[position]

    def read(self, position: int) -> bytes:
        """Return the bytes of a value that is not null."""
        value = self._array[position]
        data = (value.value if isinstance(value, pa.DictionaryScalar) else value).as_buffer()
        return bytes(data.to_pybytes())


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
