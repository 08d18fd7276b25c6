"""Inputs from an S3 Inventory: the objects of a bucket, from the files that S3 writes about it each day or week.

An inventory is configured by the URI of its `manifest.json`, which names the files of the list. Reading them costs a
few requests, where listing the bucket costs one for each 1,000 objects. An inventory is as old as its files: what was
stored or removed since is not in it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inputs.rows import Skipped
from storage.files import READ_BYTES, SPOOLED_BYTES, StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Changed, Entry, NotFound, StoreOptions, show

_NAME = "manifest.json"
_MANIFEST_BYTES = 64 << 20
_BATCH_ROWS = 1 << 14
_ARN = re.compile(r"arn:[a-z0-9-]+:s3:::")
_PARQUET_COLUMN = re.compile(r"(?:required|optional)\s+\w+\s+(\w+)")

_COLUMNS = {
    "CSV": {"key": "Key", "size": "Size", "etag": "ETag", "latest": "IsLatest", "deleted": "IsDeleteMarker"},
    "Parquet": {"key": "key", "size": "size", "etag": "e_tag", "latest": "is_latest", "deleted": "is_delete_marker"},
}
"""By format, the names of the columns that are read."""
_VERSION_COLUMNS = frozenset(("VersionId", "version_id"))

_OLD = "versions in inventories that are not the latest"
_DELETED = "delete markers in inventories"

_Row = tuple[str, int | str | None, str | None, bool | None, bool | None]
"""Key, size, ETag, whether it is the latest version, whether it is a delete marker."""


@dataclass(frozen=True)
class InventoryFile:
    """A file of an inventory: its URI, and the MD5 of its bytes in hex."""

    uri: str
    md5: str


@dataclass(frozen=True)
class Inventory:
    """What a manifest says: the listed bucket, the format of the files, their columns in order, and the files."""

    bucket: str
    format: str
    columns: list[str]
    files: list[InventoryFile]


def recognizes(uri: str) -> bool:
    """Tell whether a configured input is the manifest of an inventory, by its name."""
    return uri.rpartition("/")[2] == _NAME


def list_inventory(entry: Entry, options: StoreOptions, skipped: Skipped) -> Iterator[Entry]:
    """Yield the objects that a listing of the inventory's bucket would have yielded when it was made, in no order.

    `entry` is the manifest. Older versions of objects and delete markers are counted in `skipped`. One file is on this
    machine at a time, in memory if it is small, else on the disk; its MD5 is checked before its first row is yielded.
    Raises `ConfigError` for what is no inventory with the columns that are needed, `Changed` for a file with another
    MD5, and the store's other errors.
    """
    if entry.size > _MANIFEST_BYTES:
        raise _refuse(entry.uri, f"has {entry.size:,} bytes, so it is no manifest of an S3 Inventory")
    data = open_store(entry.uri, options).read(entry.uri, 0, entry.size, entry.etag or None)
    inventory = parse_manifest(data, entry.uri)
    for file in inventory.files:
        with _download(file, options) as content:
            yield from read_objects(content, inventory, file.uri, skipped)


def parse_manifest(data: bytes, uri: str) -> Inventory:
    """Parse a manifest. Raises `ConfigError` if it is none, or if the inventory's files cannot be used."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise _refuse(uri, "is not JSON, so it is no manifest of an S3 Inventory") from None
    names = ("sourceBucket", "destinationBucket", "fileFormat", "fileSchema")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), str) for name in names):
        raise _refuse(uri, f"is no manifest of an S3 Inventory, which has {', '.join(names)} and files")
    source, destination, kind, schema = (manifest[name] for name in names)
    if kind not in _COLUMNS:
        raise _refuse(uri, f"is an inventory in the format {show(kind)}: configure the inventory with CSV or Parquet")
    columns = [name.strip() for name in schema.split(",")] if kind == "CSV" else _PARQUET_COLUMN.findall(schema)
    _check_columns(kind, columns, uri)
    root = f"s3://{_ARN.sub('', destination, count=1)}"
    files = manifest.get("files")
    if not isinstance(files, list):
        raise _refuse(uri, "is no manifest of an S3 Inventory: it has no list of files")
    return Inventory(source, kind, columns, [_parse_file(one, root, uri) for one in files])


def read_objects(content: IO[bytes], inventory: Inventory, uri: str, skipped: Skipped) -> Iterator[Entry]:
    """Yield the objects of one file of an inventory. Raises `ConfigError` for a file that is not as the manifest says.

    Objects without bytes whose keys end with a slash are left out, as in a listing: consoles show folders by them.
    """
    read = _read_csv if inventory.format == "CSV" else _read_parquet
    root = f"s3://{inventory.bucket}/"
    for key, size, etag, latest, deleted in read(content, inventory.columns, uri):
        if latest is False:
            skipped.add(root + key, _OLD)
        elif deleted:
            skipped.add(root + key, _DELETED)
        else:
            try:
                number = int(size)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                number = -1
            if number < 0 or not etag or not key:
                raise _refuse(uri, f"has no key, size or ETag of {show(root + key)}")
            if number or not key.endswith("/"):
                yield Entry(root + key, number, etag.strip('"'))


def _check_columns(kind: str, columns: list[str], uri: str) -> None:
    needed = ["key", "size", "etag"]
    if not _VERSION_COLUMNS.isdisjoint(columns):
        needed += ["latest", "deleted"]  # without them, every version of an object would be an input
    missing = [_COLUMNS[kind][name] for name in needed if _COLUMNS[kind][name] not in columns]
    if missing:
        raise _refuse(
            uri,
            f"is an inventory without {' and '.join(missing)}: configure the inventory with the optional fields Size "
            "and ETag" + (", and for the current versions only" if len(needed) > 3 else ""),
        )


def _parse_file(one: Any, root: str, uri: str) -> InventoryFile:
    key, md5 = (one.get("key"), one.get("MD5checksum")) if isinstance(one, dict) else (None, None)
    if not isinstance(key, str) or not isinstance(md5, str):
        raise _refuse(uri, "has a file without key or MD5checksum, so it is no manifest of an S3 Inventory")
    return InventoryFile(f"{root}/{key}", md5.lower())


@contextmanager
def _download(file: InventoryFile, options: StoreOptions) -> Iterator[IO[bytes]]:
    """Download a file of an inventory for the length of a `with` block, and check its MD5."""
    store = open_store(file.uri, options)
    entry = store.stat(file.uri)
    if entry is None:
        raise NotFound(f"{show(file.uri)}: no such object: take a newer inventory, whose files are still there")
    digest = hashlib.md5(usedforsecurity=False)
    with tempfile.SpooledTemporaryFile(SPOOLED_BYTES) as spool:
        with StoreFile(store, entry) as content:
            while piece := content.read(READ_BYTES):
                digest.update(piece)
                spool.write(piece)
        if digest.hexdigest() != file.md5:
            raise Changed(f"{show(file.uri)} is not the file that its manifest names: its MD5 is {digest.hexdigest()}")
        spool.seek(0)
        yield spool


def _read_csv(content: IO[bytes], columns: list[str], uri: str) -> Iterator[_Row]:
    """Yield the rows of a CSV file. Its keys are URL-encoded, and it has no header."""
    places = [columns.index(name) if name in columns else None for name in _COLUMNS["CSV"].values()]
    key_at, size_at, etag_at, latest_at, deleted_at = places
    assert key_at is not None
    assert size_at is not None
    assert etag_at is not None
    line = 0
    try:
        with gzip.open(content) as plain, io.TextIOWrapper(plain, encoding="utf-8", newline="") as text:
            for row in (reader := csv.reader(text, strict=True)):
                line = reader.line_num
                if len(row) != len(columns):
                    raise _refuse(uri, f"line {line} has {len(row)} fields, the manifest's fileSchema {len(columns)}")
                key = row[key_at]
                if "%" in key or "+" in key:
                    key = unquote_plus(key, errors="surrogateescape")
                latest = None if latest_at is None else _parse_flag(row[latest_at], uri, line)
                deleted = None if deleted_at is None else _parse_flag(row[deleted_at], uri, line)
                yield key, row[size_at], row[etag_at], latest, deleted
    except (gzip.BadGzipFile, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise _refuse(uri, f"cannot be read as CSV in gzip after line {line}: {show(str(error))}") from error


def _parse_flag(text: str, uri: str, line: int) -> bool | None:
    flag = {"true": True, "false": False, "": None}.get(text.lower(), text)
    if isinstance(flag, str):
        raise _refuse(uri, f"line {line} has {show(text)!r} where the manifest's fileSchema says true or false")
    return flag


def _read_parquet(content: IO[bytes], columns: list[str], uri: str) -> Iterator[_Row]:
    """Yield the rows of a Parquet file. Its keys are literal."""
    names = {name: name in columns for name in _COLUMNS["Parquet"].values()}
    wanted = [name for name, present in names.items() if present]
    types = {"size": pa.int64(), "is_latest": pa.bool_(), "is_delete_marker": pa.bool_()}
    try:
        with pq.ParquetFile(content) as file:
            if missing := [name for name in wanted if name not in file.schema_arrow.names]:
                raise _refuse(uri, f"has no column {missing[0]}, which the manifest's fileSchema has")
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                values = [
                    batch.column(name).cast(types.get(name, pa.string())).to_pylist()
                    if present
                    else [None] * batch.num_rows
                    for name, present in names.items()
                ]
                yield from ((key or "", *rest) for key, *rest in zip(*values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise _refuse(uri, f"cannot be read as Parquet: {show(str(error))}") from error


def _refuse(uri: str, problem: str) -> ConfigError:
    return ConfigError(f"input: {show(uri)} {problem}")
