"""The image files of an export: from a folder that holds them by key, from where they were tagged, or thumbnails."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from curation.export.names import IMAGE_SUFFIXES
from pipelines.inputs.formats import archive_of
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Entry, StoreError, StoreOptions, Unreachable, join, show

ROWS, HELD_BYTES = 32, 128 * 2**20
"""The most images, and bytes of them, that are read at the same time and held in memory together."""
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

    A row's file is the one that was tagged, byte for byte, so it is never another image with the same name. It is
    looked for in `folder` (a local folder or an s3://, gs:// or az:// prefix) under the row's key, or for a key without
    a suffix under the key with one; then at the row's `source`, if this is a single image and not an archive. With
    `thumbnails`, sources are not read, and the row's thumbnail is taken instead: so it never depends on a store whether
    an export has originals or thumbnails.

    Raises `ConfigError` if there is no such folder, and `Unreachable` if a store does not answer.
    """

    def __init__(self, folder: str | None, thumbnails: bool, options: StoreOptions) -> None:
        self._folder = folder.rstrip("/") or "/" if folder is not None else None
        self._thumbnails, self._options = thumbnails, options
        self._pool = ThreadPoolExecutor(ROWS, "images")
        self.columns = ["id", "key", "source", "sha256", *(["thumbnail"] if thumbnails else [])]
        """The columns that `read` needs."""
        self._others = self._used_thumbnails = 0
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
        if self._others:
            notices.append(f"{self._others:,} files in {self._folder} are not the files that were tagged: not taken")
        if self._used_thumbnails:
            notices.append(f"{self._used_thumbnails:,} images are thumbnails")
        return notices

    def read(self, batch: pa.RecordBatch) -> Iterator[list[Picture | NoFile]]:
        """Yield the files of the rows, a list for some rows at a time. Where a row has no file, the reason stands.

        `batch` has the columns of `columns`. At most `ROWS` files of together `HELD_BYTES` are read at the same time
        and held in memory, or one larger file.
        """
        keys, sources, digests = (batch[name].to_pylist() for name in ("key", "source", "sha256"))
        thumbnails = batch["thumbnail"].to_pylist() if self._thumbnails else [None] * len(batch)
        for start in range(0, len(batch), ROWS):
            part = slice(start, start + ROWS)
            places = list(self._pool.map(self._find, keys[part], sources[part]))
            rows = list(zip(keys[part], digests[part], thumbnails[part], places, strict=True))
            for group in _group(rows):
                found = list(self._pool.map(self._read_one, *zip(*group, strict=True)))
                self._others += sum(others for _, others in found)
                self._used_thumbnails += sum(isinstance(one, Picture) and not one.original for one, _ in found)
                yield [one for one, _ in found]

    def _find(self, key: str, source: str) -> _Places:
        """Return the objects that may be a row's file, and why the last place that was looked at has none."""
        found: list[Entry] = []
        uris = []
        if self._folder is not None and not key.startswith("/") and ".." not in key.split("/"):  # else it leads out
            uris.append(join(self._folder, key))
            if posixpath.splitext(key)[1][1:].lower() not in IMAGE_SUFFIXES:
                uris += [join(self._folder, f"{key}.{suffix}") for suffix in _TRIED]
        why = "it has no thumbnail"
        in_folder = len(uris)
        if not self._thumbnails:
            uris += [source] if archive_of(source.lower()) is None else []
            why = f"{show(source)} is not there" if len(uris) > in_folder else f"it is in the archive {show(source)}"
        inside = 0
        for number, uri in enumerate(uris):
            try:
                entry = open_store(uri, self._options).stat(uri)
            except Unreachable:
                raise
            except StoreError as error:
                why = str(error) if number >= in_folder else why
                continue
            if entry is not None and entry.size > MAX_BYTES:
                why = f"{show(uri)} has {entry.size:,} bytes, over {MAX_BYTES:,}"
            elif entry is not None and entry.size >= 0:
                found.append(entry)
                inside += number < in_folder
        return _Places(found, inside, why)

    def _read_one(
        self, key: str, digest: str, thumbnail: bytes | None, places: _Places
    ) -> tuple[Picture | NoFile, bool]:
        """Return a row's picture or why there is none, and whether the folder has another image in its place."""
        others = False
        why = places.why
        for number, entry in enumerate(places.entries):
            try:
                data = open_store(entry.uri, self._options).read(entry.uri, 0, entry.size, entry.etag)
            except Unreachable:
                raise
            except StoreError as error:
                why = str(error)
                continue
            if hashlib.sha256(data).hexdigest() == digest:
                return _make_picture(data, key, True), others if number >= places.in_folder else False
            others = others or number < places.in_folder
            why = f"{show(entry.uri)} is not the file that was tagged"
        if self._thumbnails and thumbnail is not None:
            return _make_picture(thumbnail, key, False), others
        return NoFile(why), others


@dataclass(frozen=True)
class _Places:
    """The objects that may be a row's file, of which the first `in_folder` are in the folder; why there is no other."""

    entries: list[Entry]
    in_folder: int
    why: str


_Row = tuple[str, str, "bytes | None", _Places]


def _group(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield the rows in groups whose files fit in `HELD_BYTES` together. A file that does not fit is a group."""
    group: list[_Row] = []
    held = 0
    for row in rows:
        size = max((entry.size for entry in row[3].entries), default=0)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(row)
        held += size
    if group:
        yield group


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
