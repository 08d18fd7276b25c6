"""Tars in WebDataset's layout: consecutive members with the same name up to the first dot are one sample."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.config import JobConfig
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped, lost_row
from siglip.images.decode import ImageRejected, readable_suffixes
from storage.files import StoreFile
from storage.schemes import open_store
from storage.store import Store, StoreError, StoreOptions

KIND: Kind = "tar"
SUFFIXES = (".tar", ".tar.gz", ".tgz")
METADATA_SUFFIXES = frozenset(("json", "txt", "cls"))
"""Suffixes of members that become the metadata of their sample's images."""

_SAMPLE_IMAGES = 32
_SAMPLE_BYTES = 1 << 20
"""The images and bytes at a tar's beginning from which its number of images is estimated."""
_END = bytes(tarfile.BLOCKSIZE)


def recognizes(name: str) -> bool:
    """Tell whether an object is a tar, by its lower-case name."""
    return name.endswith(SUFFIXES)


def inspect(planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
    """Return the tar as one part. The number of its images is estimated from its first megabyte."""
    return InputStats([replace(planned, rows=_estimate_rows(open_store(planned.uri, options), planned))])


def read(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    """Yield the images of a tar, in its order. Counts other members in `skipped`.

    Python's `tarfile` reads a truncated tar without an error if it ends between two members. Here a tar is complete
    only if it ends with a block of zeros. For an incomplete tar the last row is a reject row.
    """
    count = 0
    broken: tuple[str, str] | None = None
    sample = _Sample(reading, planned.uri)
    try:
        raw: Any = io.BufferedReader(StoreFile(open_store(planned.uri, reading.store), planned.entry), 1 << 20)
        stream = _Recorder(_decompress(raw), 1 << 20)
        with stream, tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                # macOS writes such a file with metadata before each file, also inside of a sample.
                if name.rpartition("/")[2].startswith("._"):
                    skipped.add(_text(name), "hidden files")
                    continue
                stem, _, extension = _split_name(name)
                if stem != sample.stem:
                    for row in sample.finish():
                        yield row
                        count += 1
                    sample = _Sample(reading, planned.uri, stem)
                sample.add(tar, member, extension, skipped)
            if stream.last != _END:
                short = len(stream.last) < tarfile.BLOCKSIZE
                broken = "truncated_archive" if short else "corrupt_archive", f"no end of archive at byte {tar.offset}"
    except tarfile.ReadError as error:
        ends_early = any(word in str(error) for word in ("unexpected end", "empty", "truncated"))
        broken = "truncated_archive" if ends_early else "corrupt_archive", str(error)
    except EOFError as error:
        broken = "truncated_archive", str(error)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        broken = "corrupt_archive", str(error)
    except StoreError as error:
        lost = reading.reject_or_raise(planned, error, count)
        yield from sample.finish()
        yield lost
        return
    for row in sample.finish():
        yield row
        count += 1
    if broken:
        yield lost_row(planned, *broken, count)


class _Sample:
    """The members with one name: images, and members that hold the images' metadata."""

    def __init__(self, reading: Reading, source: str, stem: str = "") -> None:
        self.stem = stem
        self._reading = reading
        self._source = source
        self._rows: list[Row] = []
        self._metadata: dict[str, Any] = {}

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, skipped: Skipped) -> None:
        """Add a member. Raises `tarfile.ReadError` if the tar ends within it."""
        name = _text(member.name.removeprefix("./"))
        suffix = extension.rpartition(".")[2]
        most = self._reading.max_bytes
        if not member.isreg():
            skipped.add(name, "links and devices in tars")
        elif suffix in readable_suffixes():
            row = Row(name, self._source)
            if member.size > most:
                row.rejected = ImageRejected("too_many_bytes", f"{member.size} bytes, over {most}")
            else:
                row.data = _member_bytes(tar, member)
            self._rows.append(row)
        elif suffix in METADATA_SUFFIXES and member.size <= most:
            self._metadata[extension] = _parse_metadata(suffix, _member_bytes(tar, member))
        else:
            skipped.add_suffix(name)

    def finish(self) -> Iterator[Row]:
        """Yield the sample's images. A single image has the sample's name as key, several have their members'."""
        text = None
        if self._metadata:  # JSON may escape half of a surrogate pair, which UTF-8 cannot hold
            text = json.dumps(self._metadata, ensure_ascii=False).encode("utf-8", "replace").decode()
        for row in self._rows:
            row.metadata = text
            if len(self._rows) == 1:
                row.key = _text(self.stem)
            yield row


class _Recorder(io.BufferedReader):
    """A reader that keeps the last block read, with which a complete tar is told from a truncated one."""

    last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        self.last = super().read(size)
        return self.last


class _Gunzip(gzip.GzipFile):
    """A `GzipFile` whose `readinto` returns the bytes before a truncated end. The original raises, and loses them."""

    def readinto(self, buffer: Any, /) -> int:
        data = self.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _estimate_rows(store: Store, planned: Input) -> int:
    """Estimate the number of images in a tar from its first megabyte, for packing shards.

    A tar that is broken after that counts as if it were complete: the estimate is also the number of lost images.
    """
    raw: Any = io.BufferedReader(StoreFile(store, planned.entry, _SAMPLE_BYTES), 1 << 16)
    images, reached = 0, 0
    try:
        stream = _decompress(raw)
        with raw, tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                images += member.isreg() and member.name.lower().rpartition(".")[2] in readable_suffixes()
                reached = member.offset_data + member.size if stream is raw else raw.tell()
                if images == _SAMPLE_IMAGES or reached >= _SAMPLE_BYTES:
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError):
        pass  # reading the tar gives a reject row with the error
    # After the last member come two blocks of zeros, and zeros up to a full record.
    if 0 < reached < planned.size - 2 * tarfile.RECORDSIZE:
        return max(1, images * planned.size // reached)
    return max(1, images)


def _decompress(raw: io.BufferedReader) -> Any:
    """Return the uncompressed stream. The first two bytes decide whether the tar is compressed, not its name."""
    return _Gunzip(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) < member.size:
        raise tarfile.ReadError(f"unexpected end of data in {member.name}")
    return data


def _split_name(name: str) -> tuple[str, str, str]:
    """Split by WebDataset's rule: the key is the path up to the file name's first dot, the rest is the extension."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.lstrip(".").partition(".")
    stem = file[: len(file) - len(file.lstrip("."))] + stem
    return folder + slash + stem, dot, extension.lower()


def _parse_metadata(suffix: str, data: bytes) -> Any:
    text = data.decode("utf-8", errors="replace")
    if suffix == "json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    if suffix == "cls":
        try:
            return int(text)
        except ValueError:
            return text.strip()
    return text


def _text(name: str) -> str:
    """Return a name as valid UTF-8. Names in tars may be any bytes, strings in Parquet may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
