"""Tars in WebDataset's layout, uncompressed or compressed with gzip: estimating their images, and reading them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.config import JobConfig
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped, lost_row
from pipelines.inputs.samples import Samples
from pipelines.inputs.tar_stream import TarReader
from siglip.images.decode import readable_suffixes
from storage.files import StoreFile
from storage.schemes import open_store
from storage.store import Store, StoreError, StoreOptions

KIND: Kind = "tar"
SUFFIXES = (".tar", ".tar.gz", ".tgz")

_SAMPLE_IMAGES = 32
_SAMPLE_BYTES = 1 << 20
"""The images and bytes at a tar's beginning from which its number of images is estimated."""
_INSPECTED_BYTES = 16 * _SAMPLE_BYTES
"""The most uncompressed bytes that an inspection reads. One megabyte of gzip may hold a gigabyte."""
_MOST_PADDING = 1 << 20
_BUFFER = 1 << 20


def recognizes(name: str) -> bool:
    """Tell whether an object is a tar, by its lower-case name."""
    return name.endswith(SUFFIXES)


def inspect(planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
    """Return the tar as one part. The number of its images is estimated from its first megabyte."""
    return InputStats([replace(planned, rows=_estimate_rows(open_store(planned.uri, options), planned))])


def read(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
    """Yield the images of a tar, in its order. Counts other members in `skipped`.

    The tar is read to its last byte, past ends of archive and damaged places. If a part of it is damaged or missing, or
    it is no tar, the last row is a reject row that says where. Ends of archive before other members are counted in
    `skipped`, and a tar without a file, or with long padding. Of two members with one name, both are rows.
    """
    count, files = 0, 0
    broken: tuple[str, str] | None = None
    samples = Samples(planned.uri, reading.max_bytes, skipped)
    tar: TarReader | None = None
    with io.BufferedReader(StoreFile(open_store(planned.uri, reading.store), planned.entry), _BUFFER) as raw:
        try:
            tar = _open_tar(raw)
            for member in tar.members():
                files += member.kind != "folder"
                for row in samples.add(member, tar):
                    yield row
                    count += 1
        except EOFError as error:
            broken = "truncated_archive", str(error)
        except (gzip.BadGzipFile, zlib.error, ValueError) as error:
            broken = "corrupt_archive", str(error)
        except StoreError as error:
            lost = reading.reject_or_raise(planned, error, count)
            yield from samples.finish()
            yield lost
            return
    for row in samples.finish():
        yield row
        count += 1
    for _ in range(tar.ends if tar else 0):
        skipped.add(planned.uri, "ends of archive inside tars (read on after them)")
    damages = (tar.damages if tar else 0) + (broken is not None)
    broken = (tar.problem if tar else None) or broken
    if tar and tar.padded:
        skipped.add(planned.uri, "tars with over 10 KiB of zeros at their end (taken for padding)")
    if broken:
        reason, detail = broken
        yield lost_row(planned, reason, f"{detail}, and {damages - 1} more places" if damages > 1 else detail, count)
    elif not files:
        skipped.add(planned.uri, "tars without a file in them")


class _Gunzip(gzip.GzipFile):
    """A `GzipFile` whose `readinto` returns the bytes before a truncated end. The original raises, and loses them."""

    def readinto(self, buffer: Any, /) -> int:
        data = self.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Source:
    """The compressed bytes. `gzip` passes over any number of zeros after the end, byte by byte; here it may be 1 MiB.

    Raises `EOFError` if there are more.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._zeros = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._raw.read(size)
        zeros = len(data) - len(data.rstrip(b"\0"))
        self._zeros = zeros + (self._zeros if zeros == len(data) else 0)
        if size == 1 and self._zeros > _MOST_PADDING:
            raise EOFError(f"zeros from byte {self._raw.tell() - self._zeros}, too many to be padding after gzip")
        return data


class _Head(io.RawIOBase):
    """The first bytes of a stream, up to a number of them."""

    def __init__(self, stream: io.BufferedIOBase, size: int) -> None:
        super().__init__()
        self._stream = stream
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _open_tar(raw: Any, most: int | None = None) -> TarReader:
    """Return a reader of the tar, or of its first `most` bytes. Its first two bytes tell whether it is compressed."""
    compressed = raw.peek(2)[:2] == b"\x1f\x8b"
    source: Any = _Source(raw)
    stream: Any = io.BufferedReader(_Gunzip(fileobj=source), _BUFFER) if compressed else raw
    if most is not None:
        stream = io.BufferedReader(_Head(stream, most), 1 << 16)
    return TarReader(stream, seekable=stream is raw)


def _estimate_rows(store: Store, planned: Input) -> int:
    """Estimate the number of images in a tar from its first megabyte, for packing shards.

    A tar that is broken after that counts as if it were complete: the estimate is also the number of lost images. In a
    whole tar that ends before that, whatever its padding, the images are counted.
    """
    images, reached = 0, 0
    with io.BufferedReader(StoreFile(store, planned.entry, _SAMPLE_BYTES), 1 << 16) as raw:
        try:
            compressed = raw.peek(2)[:2] == b"\x1f\x8b"
            tar = _open_tar(raw, _INSPECTED_BYTES)
            for member in tar.members():
                images += member.kind == "file" and member.name.lower().rpartition(".")[2] in readable_suffixes()
                reached = raw.tell() if compressed else tar.position + member.stored
                if images == _SAMPLE_IMAGES or reached >= _SAMPLE_BYTES:
                    break
            else:
                if tar.padded or tar.problem is None:
                    return max(1, images)
        except (EOFError, OSError, zlib.error, ValueError):
            pass  # reading the tar gives a reject row with the error
    # After the last member come two blocks of zeros, and zeros up to a full record.
    if 0 < reached < planned.size - 20 * 1024:
        return max(1, images * planned.size // reached)
    return max(1, images)
