"""Planned inputs to rows: encoded images with their keys and metadata.

Four kinds of input: a tar, row groups of a Parquet file, a loose image, and an image named in a list. Nothing is
decoded here. What cannot be read becomes a row with a reason: a lost image is counted, never passed over.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import ParquetConfig
from siglip.images import ImageRejected
from storage.files import StoreFile
from storage.store import Changed, Entry, NotFound, Store, StoreError, StoreOptions, join, open_store

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"))
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
METADATA_SUFFIXES = frozenset(("json", "txt", "cls"))

Kind = Literal["image", "tar", "parquet", "uri"]

T = TypeVar("T")
R = TypeVar("R")

_FETCHES_AHEAD = 8
_SAMPLE_IMAGES = 32
_SAMPLE_BYTES = 1 << 20
_PARQUET_ROWS = 64
_TAR_END = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Input:
    """One planned input. `start` and `stop` are row groups, of a Parquet file only. `rows` is exact for Parquet files
    and loose images, and an estimate for tars, whose images are counted when they are read.

    `size` is -1 and `etag` empty for an image named in a list: it was not looked at when it was planned.
    """

    kind: Kind
    uri: str
    key: str
    size: int
    etag: str
    start: int = 0
    stop: int = 0
    rows: int = 1
    metadata: str | None = None

    @property
    def entry(self) -> Entry:
        """The object to read."""
        return Entry(self.uri, self.size, self.etag)


@dataclass
class Row:
    """One image on its way: its encoded bytes, or why there are none."""

    key: str
    source: str
    data: bytes | None = None
    rejected: ImageRejected | None = None
    metadata: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How inputs are read; the same for all inputs of a job."""

    store: StoreOptions
    max_bytes: int
    parquet: ParquetConfig
    on_changed: Literal["error", "retag"] = "error"

    def give_up(self, error: StoreError) -> ImageRejected:
        """Why a planned object is lost: it is gone, or it changed and its new version is a row. Else raises `error`."""
        if isinstance(error, NotFound):
            return ImageRejected("missing", str(error))
        if isinstance(error, Changed) and self.on_changed == "retag":
            return ImageRejected("changed", str(error))
        raise error


def read_input(planned: Input, reading: Reading) -> Iterator[Row]:
    """The rows of one planned input, in a fixed order: the same input gives the same rows each time.

    Raises `StoreError` when the store fails, or when the input is no longer what was planned.
    """
    if planned.kind in ("image", "uri"):
        yield from read_images([planned], reading)
        return
    store = open_store(planned.uri, reading.store)
    if planned.kind == "tar":
        yield from _read_tar(store, planned, reading)
    else:
        yield from _read_parquet(store, planned, reading)


def read_images(planned: Iterable[Input], reading: Reading) -> Iterator[Row]:
    """Loose images and images named in lists, fetched a few ahead, in order."""
    with ThreadPoolExecutor(_FETCHES_AHEAD) as pool:
        yield from map_ahead(pool, lambda item: _fetch(item, reading), planned, _FETCHES_AHEAD)


def resolve(uri: str, beside: str) -> str:
    """A URI as a list or a Parquet column names it: relative ones are beside the file that names them."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return join(beside.rpartition("/")[0] or ".", uri)


def image_column(schema: pa.Schema, config: ParquetConfig) -> str | None:
    """The column that holds images: the configured one, or the one that looks like it, or None."""
    if config.image_column:
        return config.image_column if config.image_column in schema.names else None
    for column in schema:
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return str(column.name)
    binary = [c.name for c in schema if pa.types.is_binary(c.type) or pa.types.is_large_binary(c.type)]
    named = [name for name in binary if any(word in name.lower() for word in ("image", "img", "jpg", "jpeg", "png"))]
    if named or len(binary) == 1:
        return str((named or binary)[0])
    strings = {c.name.lower(): c.name for c in schema if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)}
    for word in ("image_uri", "image_url", "image_path", "uri", "url", "image", "path", "file", "file_name"):
        if word in strings:
            return str(strings[word])
    return None


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`pool.map` that reads its input and holds results only a few ahead."""
    source = iter(items)
    pending = [pool.submit(function, item) for item in islice(source, ahead)]
    while pending:
        yield pending.pop(0).result()
        pending.extend(pool.submit(function, item) for item in islice(source, 1))


def _fetch(planned: Input, reading: Reading) -> Row:
    row = Row(planned.key, planned.uri, metadata=planned.metadata)
    if planned.size > reading.max_bytes:
        row.rejected = ImageRejected("too_many_bytes", f"{planned.size} bytes, over {reading.max_bytes}")
        return row
    try:
        store = open_store(planned.uri, reading.store)
        size, etag = planned.size, planned.etag
        if planned.kind == "uri":
            entry = store.stat(planned.uri)
            if entry is None:
                raise NotFound(f"{planned.uri}: no such object")
            if entry.size > reading.max_bytes:
                row.rejected = ImageRejected("too_many_bytes", f"{entry.size} bytes, over {reading.max_bytes}")
                return row
            size, etag = entry.size, entry.etag
        row.data = store.read(planned.uri, 0, size, etag) if size else b""
    except (NotFound, Changed) as error:
        row.rejected = reading.give_up(error)
    except StoreError as error:
        # A name in somebody's list may be anything. A planned object was listed with these very credentials: when
        # it cannot be read, the store is in trouble, and the run must say so instead of rejecting everything.
        if planned.kind != "uri":
            raise
        row.rejected = ImageRejected("unreadable", str(error))
    return row


class _Recorder(io.BufferedReader):
    """Remembers the last block read, which tells a finished tar from one that just stops."""

    last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        self.last = super().read(size)
        return self.last


def estimate_tar_rows(store: Store, entry: Entry) -> int:
    """About how many images a tar holds, from its first megabyte: what packing shards needs to know."""
    raw: Any = io.BufferedReader(StoreFile(store, entry, _SAMPLE_BYTES), 1 << 16)
    images, stop = 0, 0
    try:
        stream = _decompress(raw)
        with raw, tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                if member.isreg() and member.name.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
                    images += 1
                    stop = member.offset_data + member.size if stream is raw else raw.tell()
                if images == _SAMPLE_IMAGES or stop >= _SAMPLE_BYTES:
                    return max(1, images * entry.size // stop)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError):
        pass  # reading it will say what is wrong with it
    return max(1, images)


def _read_tar(store: Store, planned: Input, reading: Reading) -> Iterator[Row]:
    """Samples of a WebDataset tar: neighbouring members with the same name up to the first dot.

    Python's tarfile takes a missing end for the end. Here a tar is whole only if it ends with a block of zeros.
    """
    max_bytes = reading.max_bytes
    sample: list[tuple[str, Row]] = []
    metadata: dict[str, Any] = {}
    lost: ImageRejected | None = None
    current = ""
    try:
        raw: Any = io.BufferedReader(StoreFile(store, planned.entry), 1 << 20)
        stream = _Recorder(_decompress(raw), 1 << 20)
        with stream, tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them
                if not member.isreg():
                    continue
                name = member.name.removeprefix("./")
                stem, _, extension = _split_name(name)
                if stem != current:
                    yield from _finish_sample(sample, metadata, current)
                    sample, metadata, current = [], {}, stem
                suffix = extension.rpartition(".")[2]
                hidden = name.rpartition("/")[2].startswith("._")  # macOS's shadow of the real file
                if suffix in IMAGE_SUFFIXES and not hidden:
                    row = Row(_text(name), planned.uri)
                    if member.size > max_bytes:
                        row.rejected = ImageRejected("too_many_bytes", f"{member.size} bytes, over {max_bytes}")
                    else:
                        row.data = _member_bytes(tar, member)
                    sample.append((extension, row))
                elif suffix in METADATA_SUFFIXES and member.size <= max_bytes:
                    metadata[extension] = _parse_metadata(suffix, _member_bytes(tar, member))
            if stream.last != _TAR_END:
                short = len(stream.last) < tarfile.BLOCKSIZE
                reason = "truncated_archive" if short else "corrupt_archive"
                lost = ImageRejected(reason, f"no end of archive after byte {tar.offset}")
    except tarfile.ReadError as error:
        ends_early = "unexpected end" in str(error) or "empty" in str(error) or "truncated" in str(error)
        lost = ImageRejected("truncated_archive" if ends_early else "corrupt_archive", str(error))
    except EOFError as error:
        lost = ImageRejected("truncated_archive", str(error))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        lost = ImageRejected("corrupt_archive", str(error))
    except StoreError as error:
        lost = reading.give_up(error)
    yield from _finish_sample(sample, metadata, current)
    if lost is not None:
        yield Row(planned.key, planned.uri, rejected=lost)


def _decompress(raw: io.BufferedReader) -> Any:
    """The tar's own bytes. Whether they are compressed is said by the first two, not by the name."""
    return gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) < member.size:
        raise tarfile.ReadError(f"unexpected end of data in {member.name}")
    return data


def _finish_sample(sample: list[tuple[str, Row]], metadata: dict[str, Any], stem: str) -> Iterator[Row]:
    """The images of a sample, keyed by the sample's name, or by the member's where a sample has several images."""
    text = json.dumps(metadata, ensure_ascii=False) if metadata else None
    for _, row in sample:
        row.metadata = text
        if len(sample) == 1:
            row.key = _text(stem)
        yield row


def _split_name(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file name, the rest is the extension."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.lstrip(".").partition(".")
    stem = file[: len(file) - len(file.lstrip("."))] + stem
    return folder + slash + stem, dot, extension.lower()


def _parse_metadata(suffix: str, data: bytes) -> Any:
    text = data.decode("utf-8", errors="replace")
    if suffix == "json":
        try:
            return json.loads(text)
        except ValueError:
            return text
    if suffix == "cls":
        return int(text) if text.strip().lstrip("-").isdigit() else text.strip()
    return text


def _text(name: str) -> str:
    """A name as valid UTF-8: tars may hold any bytes, Parquet strings may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_parquet(store: Store, planned: Input, reading: Reading) -> Iterator[Row]:
    config = reading.parquet
    try:
        with StoreFile(store, planned.entry) as raw, pq.ParquetFile(raw) as file:
            schema = file.schema_arrow
            column = image_column(schema, config)
            if column is None:
                raise pa.ArrowInvalid(f"no image column among {schema.names}")
            passed = [name for name in config.columns if name in schema.names]
            wanted = {column, *passed} | ({config.key_column} if config.key_column else set())
            stop = planned.stop or file.num_row_groups
            number = sum(file.metadata.row_group(i).num_rows for i in range(planned.start))
            for group in range(planned.start, stop):
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=sorted(wanted)):
                    yield from _parquet_rows(batch, column, passed, number, planned, reading)
                    number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        detail = " ".join(str(error).split())
        yield Row(planned.key, planned.uri, rejected=ImageRejected("corrupt_archive", detail))
    except StoreError as error:
        yield Row(planned.key, planned.uri, rejected=reading.give_up(error))


def _parquet_rows(
    batch: pa.RecordBatch, column: str, passed: list[str], number: int, planned: Input, reading: Reading
) -> Iterator[Row]:
    records = batch.to_pylist()
    linked: list[Input] = []
    rows: list[Row] = []
    for offset, record in enumerate(records):
        value = record[column]
        path = None
        if isinstance(value, dict):
            path = value.get("path")
            value = value["bytes"] if value.get("bytes") is not None else path
        key = record.get(reading.parquet.key_column) if reading.parquet.key_column else path
        row = Row(str(number + offset) if key is None else str(key), planned.uri)
        row.columns = {name: record[name] for name in passed}
        if value is None:
            row.rejected = ImageRejected("missing", f"{column} is null")
        elif isinstance(value, str):
            row.data = None
            linked.append(Input("uri", resolve(value, planned.uri), row.key, -1, ""))
        else:
            row.data = bytes(value)
        rows.append(row)
    fetched = read_images(linked, reading) if linked else iter(())
    for row in rows:
        if row.data is None and row.rejected is None:
            found = next(fetched)
            row.data, row.rejected = found.data, found.rejected
        yield row
