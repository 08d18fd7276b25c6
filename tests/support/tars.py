"""Tars built block by block, odd ones too, and reading one as the batch job does."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs import tar
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from storage.schemes import open_store
from storage.store import StoreOptions

END = bytes(1024)
"""The end of an archive, without padding."""
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)


def pad(data: bytes, size: int = 512) -> bytes:
    """Return the data with zeros up to a multiple of `size`."""
    return data + bytes(-len(data) % size)


def header(name: bytes, size: int | bytes, type: bytes = b"0", magic: bytes = USTAR, **fields: bytes) -> bytes:
    """Return a header block. `fields` are bytes at an offset: `at345=b"..."`."""
    block = bytearray(512)
    octal = size if isinstance(size, bytes) else b"%011o\0" % size
    parts = {0: name, 100: b"0000644\0", 124: octal, 136: b"%011o\0" % 0, 148: b" " * 8, 156: type, 257: magic}
    parts |= {int(key.removeprefix("at")): value for key, value in fields.items()}
    for at, value in parts.items():
        block[at : at + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, type: bytes = b"0", magic: bytes = USTAR, **fields: bytes) -> bytes:
    """Return a header and padded data."""
    return header(name, len(data), type, magic, **fields) + pad(data)


def pax(records: Iterable[tuple[bytes, bytes]], type: bytes = b"x") -> bytes:
    """Return a PAX header with these records."""
    data = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body)
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        data += b"%d" % length + body
    return member(b"PaxHeaders/x", data, type)


def make_tar(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """Return a tar as Python's `tarfile` writes it: padded to records of 10,240 bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_tar(data: bytes) -> bytes:
    """Return the data compressed with gzip."""
    return gzip.compress(data, 1, mtime=0)


def read_tar(path: Path, data: bytes | None = None, **limits: int) -> tuple[list[Row], Skipped]:
    """Inspect and read a tar, after writing `data` to it. Returns its rows, and what was skipped."""
    if data is not None:
        path.write_bytes(data)
    options = StoreOptions()
    entry = open_store(str(path), options).stat(str(path))
    assert entry is not None
    config = JobConfig(input=str(path), output=str(path.parent / "out"), labels=["a"], limits=limits)
    planned = Input("tar", entry.uri, path.name, entry.size, entry.etag)
    [planned] = tar.inspect(planned, config, options).parts
    skipped = Skipped()
    reading = Reading(options, config.limits.max_bytes, ParquetConfig())
    return list(tar.read(planned, reading, skipped)), skipped


def list_outcomes(rows: Iterable[Row]) -> list[tuple[str, Any]]:
    """Return each row's key, with its data or the reason of its rejection."""
    return [(row.key, row.rejected.reason if row.rejected else row.data) for row in rows]
