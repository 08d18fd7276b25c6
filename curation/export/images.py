"""The image files of an export: from a folder that holds them by key, from where they were tagged, or thumbnails."""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from curation.export.names import IMAGE_SUFFIXES
from pipelines.inputs.formats import archive_of
from storage.schemes import is_remote, open_store
from storage.settings import ConfigError
from storage.store import Entry, StoreError, StoreOptions, Unreachable, join, show

ROWS = 32
"""Images that are read at the same time and held in memory together."""
MAX_BYTES = 256 * 2**20
"""Files over this size are not taken for an image."""
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),
    (b"MM\0+", "tif"),
)
_TRIED = ("jpg", "jpeg", "png", "webp", "JPG", "JPEG", "PNG", "gif", "bmp", "tif", "tiff", "avif", "heic")
"""Suffixes that are tried for a key without one: members of a tar have such keys."""


@dataclass(frozen=True)
class Picture:
    """An image file: its bytes, and its extension by its content, such as `jpg`.

    `original` says whether it is the file that was tagged.
    """

    data: bytes
    extension: str
    original: bool


class NoFile(Exception):
    """There is no file of an image. The message says why, for people."""


class Images:
    """Reads the image files of rows.

    A row's file is that in `folder` (a local folder or an s3:// prefix) whose path is the row's key, or for a key
    without a suffix the key with one. If there is none, it is the object at the row's `source` if this is a single
    image: not an archive, and the same bytes as were tagged. With `thumbnails`, sources are not read, and it is the
    row's thumbnail instead: so it never depends on a store whether an export has originals or thumbnails.

    Files in `folder` are taken as they are, and counted if they are not the ones that were tagged. Memory holds `ROWS`
    images. Raises `ConfigError` if there is no such folder, and `Unreachable` if a store does not answer.
    """

    def __init__(self, folder: str | None, thumbnails: bool, options: StoreOptions) -> None:
        self._folder = folder.rstrip("/") or "/" if folder is not None else None
        self._thumbnails, self._options = thumbnails, options
        self._pool = ThreadPoolExecutor(ROWS, "images")
        self.columns = ["id", "key", "source", "sha256", *(["thumbnail"] if thumbnails else [])]
        """The columns that `read` needs."""
        self._origins: Counter[str] = Counter()
        if self._folder is not None:
            try:
                store = open_store(self._folder, options)
                if next(iter(store.list(self._folder)), None) is None:
                    raise ConfigError(f"--images {show(self._folder)}: there is no such folder, or it has no files")
            except Unreachable:
                raise
            except StoreError as error:
                raise ConfigError(f"--images: {error}") from error

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def describe(self) -> list[str]:
        """Return what a user should know about the files that were read, a sentence each."""
        notices = []
        if other := self._origins["other"]:
            notices.append(f"{other:,} files in {self._folder} are not the files that were tagged, and were taken")
        if thumbnails := self._origins["thumbnail"]:
            notices.append(f"{thumbnails:,} images are thumbnails")
        return notices

    def read(self, batch: pa.RecordBatch) -> list[Picture | NoFile]:
        """Read the files of at most `ROWS` rows, in parallel. For a row without a file the reason stands in its place.

        `batch` has the columns of `columns`.
        """
        thumbnails = batch["thumbnail"].to_pylist() if self._thumbnails else [None] * len(batch)
        values = (batch[name].to_pylist() for name in ("key", "source", "sha256"))
        found = list(self._pool.map(self._read_one, *values, thumbnails))
        pictures: list[Picture | NoFile] = []
        for picture, origin in found:
            self._origins[origin] += 1
            pictures.append(picture)
        return pictures

    def _read_one(self, key: str, source: str, digest: str, thumbnail: bytes | None) -> tuple[Picture | NoFile, str]:
        """Return a row's picture, and where it is from; or why there is none."""
        try:
            data = self._read_folder(key, digest) if self._folder is not None else None
            if data is not None:
                original = _digest(data) == digest
                return _make_picture(data, key, original), "folder" if original else "other"
            if self._thumbnails:
                if thumbnail is None:
                    raise NoFile("it has no thumbnail")
                return _make_picture(thumbnail, key, False), "thumbnail"
            return _make_picture(self._read_source(source, digest), key, True), "source"
        except NoFile as why:
            return why, ""

    def _read_folder(self, key: str, digest: str) -> bytes | None:
        """Return the file of a key in the folder, or None. Of several that differ in their suffix, the tagged one."""
        assert self._folder is not None
        if key.startswith("/") or ".." in key.split("/"):  # it would lead out of the folder
            return None
        names = [key]
        if posixpath.splitext(key)[1][1:].lower() not in IMAGE_SUFFIXES and not is_remote(self._folder):
            names += [f"{key}.{suffix}" for suffix in _TRIED]
        first: bytes | None = None
        for name in names:
            uri = join(self._folder, name)
            store = open_store(uri, self._options)
            try:
                entry = store.stat(uri)
                data = None if entry is None or entry.size < 0 else store.read(uri, 0, _check(entry), entry.etag)
            except Unreachable:
                raise
            except StoreError:
                continue
            if data is not None:
                if _digest(data) == digest:
                    return data
                first = first if first is not None else data
        return first

    def _read_source(self, source: str, digest: str) -> bytes:
        if archive_of(source.lower()) is not None:
            raise NoFile(f"it is in the archive {show(source)}")
        try:
            store = open_store(source, self._options)
            entry = store.stat(source)
            if entry is None:
                raise NoFile(f"{show(source)} is not there")
            data = store.read(source, 0, _check(entry), entry.etag)
        except Unreachable:
            raise
        except StoreError as error:
            raise NoFile(str(error)) from error
        if _digest(data) != digest:
            raise NoFile(f"{show(source)} is not the file that was tagged")
        return data


def find_extension(data: bytes) -> str | None:
    """Return the usual extension of an image's format by its first bytes, or None if they are of no known format."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif" if data[8:12] in (b"avif", b"avis") else "heic"
    return next((extension for start, extension in _SIGNATURES if data.startswith(start)), None)


def _make_picture(data: bytes, key: str, original: bool) -> Picture:
    suffix = posixpath.splitext(key)[1][1:].lower()
    return Picture(data, find_extension(data) or (suffix if suffix in IMAGE_SUFFIXES else "img"), original)


def _check(entry: Entry) -> int:
    if entry.size > MAX_BYTES:
        raise NoFile(f"{show(entry.uri)} has {entry.size:,} bytes, over {MAX_BYTES:,}")
    return entry.size


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
