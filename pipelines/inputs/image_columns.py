"""Choice of a Parquet file's image column and of a list's URI column: by metadata, by whole names, by type.

A name counts as a whole, never in part: `image_thumbnail` and `image_embedding` are not `image`. Upper and lower case,
`_`, `-` and spaces do not count: `Image Path` and `imagePath` are `image_path`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import pyarrow as pa

from storage.settings import ConfigError
from storage.store import show

_THINGS = ("image", "img", "photo", "picture", "jpg", "jpeg", "png")
IMAGE_NAMES = frozenset([*_THINGS, "webp", "gif", "bmp", "tif", "tiff", "encodedimage"]) | {
    thing + form for thing, form in product(_THINGS, ["bytes", "data", "content", "binary", "blob"])
}
"""Names of columns that hold images, or their URIs. Folded: lower-case, without `_`, `-` and spaces."""
CONTENT_NAMES = frozenset(["content", "bytes", "data", "binary", "raw", "blob", "file", "filebytes", "filecontent"])
"""Names of columns that hold the bytes of a file of any kind."""
IMAGE_URI_NAMES = IMAGE_NAMES | {
    thing + form for thing, form in product([*_THINGS, "s3"], ["uri", "url", "path", "filepath", "link", "src"])
}
"""Names of columns that hold the URIs of images."""
URI_NAMES = frozenset(["uri", "url", "path", "filepath", "filename", "file"]) | {
    thing + form for thing, form in product(["image", "img"], ["name", "file", "filename"])
}
"""Names of columns that hold the URI of a file of any kind, or a name that only describes the bytes beside it."""

PIXEL_NAMES = frozenset(["pixel", "pixels", "pixelvalues", "imagearray", "imagepixels", "imagetensor"])
"""Names of columns that hold images as arrays of pixels, which are not read."""

_MAX_DEPTH = 8
"""How deep in structs and lists an image column is looked for."""


class UnreadableFile(Exception):
    """A file contradicts itself, or its columns are such that its images cannot be read. The message says which."""


@dataclass(frozen=True)
class ImageColumn:
    """A column of images: its path from the top level through the fields of structs, and its type.

    `type` is without lists, dictionaries and extension types around it: what one image is. `many` tells whether a row
    is a list of images.
    """

    path: tuple[str, ...]
    type: pa.DataType
    many: bool

    @property
    def name(self) -> str:
        """The path with dots, as `parquet.image_column` takes it."""
        return ".".join(self.path)


def fold(name: str) -> str:
    """Return a column's name as it is compared: without case, `_`, `-` and spaces."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def choose_uri_column(names: Iterable[str], wanted: str | None, uri: str) -> str | None:
    """Return a list's column of URIs: `wanted` if it is not None, else the one with a known name; None without one.

    Raises `ConfigError` if two columns have names of the same rank, or if there is no column `wanted`.
    """
    names = list(names)
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"lists.column: {show(uri)} has no column {wanted!r}; it has {listed(names)}")
        return wanted
    for known in (IMAGE_URI_NAMES, URI_NAMES):
        found = [name for name in names if known & _forms(name)]
        if len(found) > 1:
            raise ConfigError(
                f"input: {show(uri)} has the columns {_quote(found)}: set lists.column to the one that holds the URIs"
            )
        if found:
            return found[0]
    return None


def choose_image_column(schema: pa.Schema, wanted: str | None, uri: str) -> ImageColumn | None:
    """Return the image column of a Parquet file: `wanted`, or the one that the file says or whose name or type fits.

    The order: 1. features of the type Image in the metadata of Hugging Face `datasets`; 2. a name of an image with
    bytes; 3. a name of a file's content with bytes, or a name of an image with strings, which are URIs; 4. the only
    column of bytes, or a name of a URI with strings. A field of a struct ranks one lower than the same column at the
    top level. A column in a form that is not read, such as arrays of pixels, ranks by its name too: what ranks equal or
    lower beside it is not taken for the images. Returns None if there is no candidate.

    Raises `ConfigError` if candidates rank equal or if `wanted` cannot be read, `UnreadableFile` if the file is at
    fault.
    """
    if wanted is not None:
        return _find_wanted(schema, wanted, uri)
    features = _read_features(schema)
    columns = [one for one in _walk(schema, (), False) if _is_image_type(one.type)]
    declared = [one for one in columns if _declared(features, one.path) == "Image"]
    exact = [one for one in declared if fold(one.name) in IMAGE_NAMES]
    unread = {field.name: (rank, field.type) for field in schema if (rank := _rank_of_unread(field))}
    for rank, ranked in ((1, exact if len(exact) == 1 else declared), *_rank(columns, features)):
        for name, (other, type_) in unread.items():
            if ranked and other <= rank:
                raise ConfigError(
                    f"parquet.image_column: {show(uri)} has the column {show(repr(name))} of {show(str(type_))}, which "
                    f"is not read: expected encoded images; set it to {_quote(one.name for one in ranked)} if that "
                    "holds the images"
                )
        if len({one.path for one in ranked}) > 1:
            names = _quote(one.name for one in ranked)
            raise ConfigError(
                f"parquet.image_column: {show(uri)} has the columns {names}, and more than one of them may hold the "
                "images: set it to the right one"
            )
        if ranked:
            return _check_unique(schema, ranked[0], ranked[0].name)
    _refuse_pixels(schema, features)
    return None


def find_column(schema: pa.Schema, name: str) -> ImageColumn | None:
    """Return the column with this name or dotted path, or None. A column at the top level comes first.

    Raises `UnreadableFile` if there are several.
    """
    found = [one for one in _walk(schema, (), False, into_images=True) if one.name == name]
    top = [one for one in found if len(one.path) == 1]
    return _check_unique(schema, (top or found)[0]) if found else None


def is_binary(type_: pa.DataType) -> bool:
    """Tell whether values are bytes of any length."""
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def is_string(type_: pa.DataType) -> bool:
    """Tell whether values are text."""
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def is_list(type_: pa.DataType) -> bool:
    """Tell whether values are lists of any kind."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(type_) for test in tests)


def listed(names: Iterable[str]) -> str:
    """Return names as one line of bounded length, for a message."""
    return show(", ".join(names) or "none")


def field_of(type_: pa.DataType, name: str) -> int:
    """Return the index of a struct's field, or -1 if there is none or more than one."""
    found = type_.get_all_field_indices(name) if pa.types.is_struct(type_) else []
    return int(found[0]) if len(found) == 1 else -1


def plain(type_: pa.DataType) -> pa.DataType:
    """Return a type without extension type and dictionary around it."""
    while True:
        if isinstance(type_, pa.BaseExtensionType):
            type_ = type_.storage_type
        elif pa.types.is_dictionary(type_):
            type_ = type_.value_type
        else:
            return type_


def _find_wanted(schema: pa.Schema, wanted: str, uri: str) -> ImageColumn:
    found = find_column(schema, wanted)
    if found is None:
        raise ConfigError(f"parquet.image_column: {show(uri)} has no column {wanted!r}; it has {listed(schema.names)}")
    has_path = is_string(_type_of_field(found.type, "path"))
    if not (_is_image_type(found.type) or has_path):
        type_ = show(str(found.type))
        raise ConfigError(
            f"parquet.image_column: {wanted!r} of {show(uri)} is {type_}: expected binary, {{bytes, path}} or a string "
            "with a URI"
        )
    return found


def _walk(
    fields: Iterable[pa.Field], above: tuple[str, ...], many: bool, *, into_images: bool = False
) -> Iterator[ImageColumn]:
    """Yield columns and the fields of structs. The fields of an image's struct are only yielded with `into_images`."""
    for field in fields:
        type_, lists = plain(field.type), many
        while is_list(type_) and not isinstance(field.type, pa.FixedShapeTensorType):
            type_, lists = plain(type_.value_type), True
        one = ImageColumn((*above, field.name), type_, lists)
        yield one
        if pa.types.is_struct(type_) and len(one.path) < _MAX_DEPTH and (into_images or not _is_image_type(type_)):
            yield from _walk(iter(type_), one.path, lists, into_images=into_images)


def _type_of_field(type_: pa.DataType, name: str) -> pa.DataType:
    index = field_of(type_, name)
    return plain(type_.field(index).type) if index >= 0 else pa.null()


def _holds_bytes(type_: pa.DataType) -> bool:
    """Tell whether values are bytes, or structs {bytes, path} as Hugging Face `datasets` writes them.

    The type of `bytes` is null in a file in which each image has only a path.
    """
    found, path = _type_of_field(type_, "bytes"), _type_of_field(type_, "path")
    all_null = field_of(type_, "bytes") >= 0 and pa.types.is_null(found) and is_string(path)
    return is_binary(type_) or is_binary(found) or all_null


def _holds_paths(type_: pa.DataType) -> bool:
    """Tell whether values are structs with a path and nothing that may be the image itself."""
    if not is_string(_type_of_field(type_, "path")) or field_of(type_, "bytes") >= 0:
        return False
    others = [plain(field.type) for field in type_]
    return not any(pa.types.is_nested(other) or is_binary(other) for other in others)


def _is_image_type(type_: pa.DataType) -> bool:
    if _holds_bytes(type_) or _holds_paths(type_) or is_string(type_):
        return True
    return bool(pa.types.is_fixed_size_binary(type_) or pa.types.is_null(type_))


def _read_features(schema: pa.Schema) -> Mapping[str, object]:
    """Return the features in the metadata of Hugging Face `datasets`, or none if they are not as `datasets` writes."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _declared(feature: object, names: tuple[str, ...], depth: int = 0) -> str:
    """Return the `_type` of a feature's field, or "" if it has none. Lists around it are looked through."""
    while depth < 4 * _MAX_DEPTH:
        depth += 1
        if isinstance(feature, list) and len(feature) == 1:  # an old form of Sequence
            feature = feature[0]
        elif isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        elif names and isinstance(feature, dict):
            feature, names = feature.get(names[0]), names[1:]
        else:
            break
    found = feature.get("_type") if isinstance(feature, dict) else None
    return found if isinstance(found, str) and not names else ""


def _rank(columns: list[ImageColumn], features: Mapping[str, object]) -> Iterator[tuple[int, list[ImageColumn]]]:
    """Yield the ranks and their candidates."""
    ranks: dict[int, list[ImageColumn]] = {}
    for one in columns:
        # What `datasets` declares as audio, video, a PDF or a class label is not an image, whatever its type.
        rank = None if _declared(features, one.path) not in ("", "Value") else _rank_of(one)
        if rank is not None:
            ranks.setdefault(rank, []).append(one)
    for rank in sorted(ranks):
        yield rank, ranks[rank]


def _rank_of(one: ImageColumn) -> int | None:
    nested = len(one.path) > 1
    names = _forms(one.path[-1]) if one.many else {fold(one.path[-1])}
    if pa.types.is_null(one.type):  # pandas writes this type where every image is missing
        return 4 if names & IMAGE_NAMES and not nested else None
    fixed = bool(pa.types.is_fixed_size_binary(one.type))
    if _holds_bytes(one.type) or fixed:
        if names & IMAGE_NAMES:
            return 2 + nested
        if names & CONTENT_NAMES:
            return 3 + nested
        # Bytes of a fixed length are hashes and ids.
        return None if fixed or (nested and is_binary(one.type)) else 4
    if names & IMAGE_URI_NAMES:
        return 3 + nested
    return 4 if names & URI_NAMES and not nested else None


def _rank_of_unread(field: pa.Field) -> int | None:
    """Return the rank of a column that may hold the images in a form that is not read, or None for all others."""
    type_, lists = plain(field.type), 0
    while is_list(type_):
        type_, lists = plain(type_.value_type), lists + 1
    if pa.types.is_map(type_):
        holds_bytes = _holds_bytes(plain(type_.item_type))
        return 2 if IMAGE_NAMES & _forms(field.name) else 4 if holds_bytes else None
    numbers = pa.types.is_integer(type_) or pa.types.is_floating(type_)
    if not ((numbers and lists) or is_list(_type_of_field(type_, "bytes"))):
        return None
    return 2 if IMAGE_NAMES & _forms(field.name) else 3 if PIXEL_NAMES & _forms(field.name) else None


def _check_unique(schema: pa.Schema, one: ImageColumn, name: str | None = None) -> ImageColumn:
    """Raise `UnreadableFile` if another column has the same path, or, with `name`, is found by the same name."""
    columns = list(_walk(schema, (), False, into_images=True))
    same = [other for other in columns if other.path == one.path or other.name == name]
    if len(same) > 1:
        raise UnreadableFile(f"{len(same)} columns have the name {one.name!r}")
    return one


def _refuse_pixels(schema: pa.Schema, features: Mapping[str, object]) -> None:
    """Raise `UnreadableFile` for a column that says to hold images, in a form that is not read: arrays of pixels."""
    for field in schema:
        type_ = plain(field.type)
        holds = is_list(type_) or field_of(type_, "bytes") >= 0 or field_of(type_, "path") >= 0
        if _declared(features, (field.name,)) == "Image" or (IMAGE_NAMES & _forms(field.name) and holds):
            expected = "expected encoded images, such as binary or {bytes, path}"
            raise UnreadableFile(f"the column {show(field.name)} is {show(str(field.type))}: {expected}")


def _forms(name: str) -> set[str]:
    """Return a folded name, and its singular."""
    return {fold(name), fold(name).removesuffix("s")}


def _quote(names: Iterable[str]) -> str:
    *others, last = sorted({repr(name) for name in names})
    return show(f"{', '.join(others)} and {last}" if others else last)
