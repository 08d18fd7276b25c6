"""Lists of images: a text file with one URI per line, or a CSV file with a column of URIs.

Only a file that is itself configured as an input is read as a list, not one found in a folder.
"""

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
    """Tell whether an input with this lower-case name is a list."""
    return name.endswith(SUFFIXES)


def resolve(uri: str, listed_in: str) -> str:
    """Resolve a URI of a list or a Parquet column. A relative path is relative to the folder of `listed_in`."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return join(listed_in.rpartition("/")[0] or ".", uri)


def expand(entry: Entry, options: StoreOptions) -> Iterator[Input]:
    """Yield the images that a list names. In a text file, lines that begin with `#` are comments.

    A CSV file needs a header; its other columns become the images' metadata. Raises `ConfigError` if the file is not a
    list, `StoreError` if it cannot be read.
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
