"""Lists of images: text files with a URI per line, CSV and TSV files with a column of URIs, JSON Lines.

Only a file that is itself configured as an input is read as a list, not one found in a folder. Every row of a list is
an input, also if rows name the same image. A list that is not what its suffix says is refused by file and line, because
a row that is guessed or dropped would be missing from the output without a word.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from pipelines.inputs import images
from pipelines.inputs.image_columns import choose_uri_column
from pipelines.inputs.rows import Input, ReadColumns, Skipped
from storage.files import StoreFile
from storage.schemes import is_remote, is_web, lower_scheme, open_store, scheme_of
from storage.settings import ConfigError, refuse_double_keys
from storage.store import Entry, StoreOptions, join, show

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
"""The separators that a header may have, by suffix. The first that gives a column of URIs counts."""
SUFFIXES = (".txt", *SEPARATORS, ".jsonl", ".ndjson")

_LINE_CHARS = 16 << 20
"""The most characters in a line or in a field. An unclosed quote would make the rest of a file one field."""
_KEY_SETS = 100
"""Objects of a list with as many different sets of keys are compared by a look-up; others are looked at one by one."""
_encode = json.JSONEncoder(ensure_ascii=False).encode
_NOT_UTF_8 = re.compile("[\udc80-\udcff]")
"""What is not UTF-8, as Python's error handler `surrogateescape` decodes it. The line is then known."""
_USER = re.compile(r"(?<=://)[^/?#]*@")
"""A user name, and perhaps a password, before the host of a URL."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def recognizes(name: str) -> bool:
    """Tell whether an input with this lower-case name is a list."""
    return name.endswith(SUFFIXES)


def resolve(uri: str, listed_in: str) -> str:
    """Resolve a URI of a list or a Parquet column. A relative path is relative to the folder of `listed_in`.

    Where `listed_in` is a file of a dataset on the hub, local paths are paths in that dataset: see
    `storage.hub.names.resolve_path`. Blanks around an http(s) URL are no part of it. A user name and a password in
    it are replaced by `***`: such a URL is rejected, and they are not to be in any output.
    """
    if is_web(url := uri.strip()):
        return _USER.sub("***@", lower_scheme(url))
    if scheme_of(listed_in) == "hf" and not is_remote(lower_scheme(uri)):
        from storage.hub.names import resolve_path  # huggingface_hub takes 0.1 s to import

        return resolve_path(lower_scheme(uri), listed_in)
    if "://" in uri or uri.startswith("/"):
        return lower_scheme(uri)
    return join(listed_in.rpartition("/")[0] or ".", uri)


@dataclass(frozen=True)
class _Row:
    """A row of a list: the line where it begins, its URI as it stands there, and its other columns."""

    line: int
    uri: str
    columns: dict[str, Any]


def expand(
    entry: Entry, column: str | None, options: StoreOptions, skipped: Skipped, columns: ReadColumns, fetch: bool = False
) -> Iterator[Input]:
    """Yield an input for each row of a list. `column` is the configured column of URIs, or None.

    With `fetch`, rows may be http(s) URLs. Otherwise a list with such a row is refused.

    The other columns of a row become its metadata, a JSON text: the values of a CSV file are strings as they stand. A
    row without a URI is an input too, which is rejected when it is read. Comments that look like images are counted in
    `skipped`, the column is added to `columns`. Raises `ConfigError` for a list that cannot be read as it stands,
    `StoreError` if the store fails.
    """
    for row in _read_rows(entry, column, options, skipped, columns):
        if not fetch and is_web(row.uri.strip()):
            raise ConfigError(
                f"input: {show(entry.uri)} line {row.line} is an http(s) URL, and fetching from the web is off: set "
                "fetch.enabled: true, or leave such lines out"
            )
        yield _plan(row, entry)


def _plan(row: _Row, entry: Entry) -> Input:
    try:
        metadata = _dump(row.columns) if row.columns else None
    except RecursionError as error:
        raise ConfigError(f"input: {show(entry.uri)} line {row.line} is nested too deeply") from error
    if not row.uri.strip(" \t\r\n"):
        return Input("uri", "", f"{entry.uri} line {row.line}", -1, "", metadata=metadata)
    uri = resolve(row.uri, entry.uri)
    return Input("uri", uri, uri if is_web(uri) else row.uri, -1, "", metadata=metadata)


def _dump(columns: dict[str, Any]) -> str:
    text = _encode(columns)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return json.dumps(columns)
    return text


class _Lines:
    """The lines of a text file with their ends. `number` is that of the latest line, from 1.

    Raises `ConfigError` for what is not text in UTF-8.
    """

    def __init__(self, text: io.TextIOWrapper, uri: str) -> None:
        self._text = text
        self.uri = uri
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_LINE_CHARS + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if _NOT_UTF_8.search(line):
            raise self.refuse("is not UTF-8: save the list as UTF-8, or leave the line out")
        if "\0" in line:
            raise self.refuse("has a NUL character: save the list as UTF-8 text")
        if len(line) > _LINE_CHARS:
            raise self.refuse(f"has over {_LINE_CHARS:,} characters: this is no list of images")
        return line

    def refuse(self, problem: str, line: int | None = None) -> ConfigError:
        return ConfigError(f"input: {show(self.uri)} line {line or self.number} {problem}")


def _read_rows(
    entry: Entry, column: str | None, options: StoreOptions, skipped: Skipped, columns: ReadColumns
) -> Iterator[_Row]:
    name = entry.uri.lower()
    file = io.BufferedReader(StoreFile(open_store(entry.uri, options), entry))
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if file.peek(2)[:2] in _UTF_16:
            raise ConfigError(f"input: {show(entry.uri)} is UTF-16: save it as UTF-8 (in Excel: CSV UTF-8)")
        lines = _Lines(text, entry.uri)
        if name.endswith(".txt"):
            yield from _read_text(lines, skipped)
        elif name.endswith((".jsonl", ".ndjson")):
            yield from _read_objects(lines, column, columns)
        else:
            yield from _read_table(lines, column, skipped, columns)


def _read_text(lines: _Lines, skipped: Skipped) -> Iterator[_Row]:
    """Yield the URIs of a text file. Lines that begin with `#` are comments. Blanks around a URI belong to it."""
    for line in lines:
        uri = line.rstrip("\r\n")
        if not uri.strip(" \t"):
            continue
        if (text := uri.strip(" \t")).startswith("#"):
            if images.recognizes(text.lower()):
                skipped.add(f"{lines.uri} line {lines.number}", "comments in lists that end like an image's name")
        elif "\t" in uri:
            raise lines.refuse("has a tab: a text list has one URI per line; use .tsv with a header for columns")
        else:
            _check_uri(uri, lines)
            yield _Row(lines.number, uri, {})


def _read_table(lines: _Lines, wanted: str | None, skipped: Skipped, columns: ReadColumns) -> Iterator[_Row]:
    """Yield the rows of a CSV or TSV file. Its first line is the header."""
    header = next((line for line in lines if line.strip("\r\n")), None)
    if header is None:
        raise ConfigError(f"input: {show(lines.uri)} is empty: add a header line with a column such as path")
    suffix = lines.uri.lower()[-4:]
    column, names, separator = _read_header(header, suffix, wanted, lines)
    columns.add("list", column, lines.uri)
    csv.field_size_limit(max(csv.field_size_limit(), _LINE_CHARS))  # the default is 128 KiB, for the whole process
    reader = csv.reader(lines, delimiter=separator, strict=True)
    position = names.index(column)
    while True:
        start = lines.number + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise lines.refuse(
                f"is no valid row: {error}; the row may have a quote that is not closed", start
            ) from error
        if values is None:
            return
        if len(values) > 1 and not any(values):
            skipped.add(f"{lines.uri} line {start}", "empty rows of lists")
        elif values:
            if len(values) != len(names):
                raise lines.refuse(
                    f"has {len(values)} fields, the header has {len(names)}: quote fields that contain {separator!r}",
                    start,
                )
            if suffix == ".tsv" and lines.number > start:
                raise lines.refuse("has a quote that is not closed in the same line", start)
            uri = values[position]
            _check_uri(uri, lines)
            for number, (name, value) in enumerate(zip(names, values, strict=True), 1):
                if number > 1 and not name and value.strip():
                    raise lines.refuse(
                        f"has {show(value)!r} in column {number}, which has no name in the header", start
                    )
            # The first column may have no name: pandas writes its index so.
            rest = {name: value for name, value in zip(names, values, strict=True) if name and name != column}
            yield _Row(start, uri, rest if names[0] else {"": values[0], **rest})


def _read_header(header: str, suffix: str, wanted: str | None, lines: _Lines) -> tuple[str, list[str], str]:
    """Return the column of URIs, all columns, and the separator."""
    names: list[str] = []
    for separator in SEPARATORS[suffix]:
        try:
            names = next(csv.reader([header], delimiter=separator, strict=True), [])
        except csv.Error as error:
            raise lines.refuse(f"is no valid header: {error}") from error
        names = [name.strip() for name in names]
        if wanted is not None and wanted.strip() not in names:
            continue
        column = choose_uri_column(names, None if wanted is None else wanted.strip(), lines.uri)
        if column is not None:
            double = next((name for name in names if name and names.count(name) > 1), None)
            if double is not None:
                raise lines.refuse(f"is a header with two columns {double!r}")
            return column, names, separator
    what = "an image's URI (such as path, url or image)" if wanted is None else repr(wanted)
    raise lines.refuse(
        f"is no header with a column for {what}: add a header line, or set lists.column; it is {show(header.strip())}"
    )


def _read_objects(lines: _Lines, wanted: str | None, columns: ReadColumns) -> Iterator[_Row]:
    """Yield the rows of a JSON Lines file. By its keys, each object must have the same key with the URI.

    If the first object decided, a list would name other images on the night when another object comes first.
    """
    column: str | None = None
    checked: set[frozenset[str]] = set()
    for line in lines:
        if not line.strip(" \t\r\n"):
            continue
        try:
            found = json.loads(
                line, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_parse_float
            )
        except (ValueError, RecursionError) as error:
            raise lines.refuse(f"is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise lines.refuse('is not a JSON object, such as {"path": "a.jpg"}')
        if column is None:
            column = choose_uri_column(found, wanted, lines.uri)
            if column is None:
                raise lines.refuse("has no key for an image's URI (such as path, url or image): set lists.column")
            columns.add("list", column, lines.uri)
        elif wanted is None and (keys := frozenset(found)) not in checked:
            other = choose_uri_column(found, None, f"{lines.uri} line {lines.number}")
            if other not in (None, column):
                raise lines.refuse(f"has the URI as {other!r}, earlier lines as {column!r}: set lists.column to one")
            checked = {*checked, keys} if len(checked) < _KEY_SETS else {keys}
        if column not in found or not isinstance(uri := found.pop(column), str | None):
            raise lines.refuse(f"has no string as {column!r}, the key that holds the URI: set lists.column to another")
        uri = uri or ""
        _check_uri(uri, lines)
        yield _Row(lines.number, uri, found)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return refuse_double_keys(pairs)
    except ValueError:
        raise ValueError("a key occurs twice in an object") from None  # without the key, which may be of any length


def _parse_float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON, or too large for a float64")


def _check_uri(uri: str, lines: _Lines) -> None:
    if uri.lstrip()[:5].lower() == "data:":
        raise lines.refuse("has the image itself as a data: URI: a list holds URIs; put images into a Parquet file")
    if "\0" in uri:
        raise lines.refuse("has a NUL character in a URI")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise lines.refuse("has half of a surrogate pair in a URI") from None
