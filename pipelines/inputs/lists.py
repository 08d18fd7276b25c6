"""Lists of images: a text file of URIs, or a CSV file with a column of them, named itself as an input."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator

from pipelines.inputs.rows import Input
from storage.files import StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Entry, StoreOptions, join

SUFFIXES = (".txt", ".csv")
COLUMNS = ("uri", "url", "image_uri", "image_url", "path", "image", "file", "file_name")


def recognizes(name: str) -> bool:
    """Whether an object of this lower-case name is a list, if it was named itself."""
    return name.endswith(SUFFIXES)


def resolve(uri: str, beside: str) -> str:
    """A URI as a list or a Parquet column names it: relative ones are beside the file that names them."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return join(beside.rpartition("/")[0] or ".", uri)


def expand(entry: Entry, options: StoreOptions) -> Iterator[Input]:
    """The images that a list names: one a line, `#` starts a comment; or a CSV file with a header.

    Raises `ConfigError` when it is neither, `StoreError` when it cannot be read.
    """
    file = StoreFile(open_store(entry.uri, options), entry)
    with io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8-sig", newline="") as text:
        try:
            if entry.uri.lower().endswith(".csv"):
                yield from _read_csv(text, entry)
            else:
                for line in text:
                    if (uri := line.strip()) and not line.startswith("#"):
                        yield Input("uri", resolve(uri, entry.uri), uri, -1, "")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"input: {entry.uri} is not UTF-8 {entry.uri[-3:]}: {error}") from error


def _read_csv(text: io.TextIOWrapper, entry: Entry) -> Iterator[Input]:
    reader = csv.DictReader(text)
    names = reader.fieldnames or []
    column = next((name for name in names if name and name.strip().lower() in COLUMNS), None)
    if column is None:
        raise ConfigError(f"input: {entry.uri} has no column named {', '.join(COLUMNS[:3])} or such; see its header")
    for record in reader:
        if uri := (record.pop(column) or "").strip():
            rest = {name: value for name, value in record.items() if name}
            metadata = json.dumps(rest, ensure_ascii=False) if rest else None
            yield Input("uri", resolve(uri, entry.uri), uri, -1, "", metadata=metadata)
