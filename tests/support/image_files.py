"""Image files made of bytes, in variants that no library writes: PNG, BMP, TIFF, JPEG segments."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.integer]

_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 11: "f"}


def pack_rows(samples: Samples, bits: int, order: str = ">") -> list[bytes]:
    """Rows of samples of 1, 2, 4, 8, 12 or 16 bits, each row padded to a byte."""
    flat = samples.reshape(len(samples), -1)
    if bits in (8, 16):
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in flat]
    rows = []
    for row in flat:
        text = "".join(f"{sample:0{bits}b}" for sample in row)
        text += "0" * (-len(text) % 8)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return rows


def make_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def make_png(
    samples: Samples, bits: int, color: int, *before: bytes, after: bytes = b"", height: int | None = None
) -> bytes:
    """A PNG with chunks `before` and `after` its pixels. `height` is what the header says, if not the truth."""
    header = struct.pack(">IIBBBBB", samples.shape[1], height or samples.shape[0], bits, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in pack_rows(samples, bits)))
    chunks = [make_chunk(b"IHDR", header), *before, make_chunk(b"IDAT", pixels), after, make_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_bmp(
    pixels: bytes,
    size: tuple[int, int],
    bits: int,
    *,
    compression: int = 0,
    masks: Sequence[int] = (),
    header: int = 40,
    palette: Sequence[Sequence[int]] = (),
    gap: int = 0,
) -> bytes:
    """A BMP with a header of `header` bytes. `pixels` are its bytes as they are; `gap` are unused bytes before them."""
    width, height = size
    colors = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(pixels), 0, 0, len(palette), 0)
    head += b"".join(struct.pack("<I", mask) for mask in masks)
    head = head.ljust(header, b"\0") + colors + bytes(gap)
    return b"BM" + struct.pack("<III", 14 + len(head) + len(pixels), 0, 14 + len(head)) + head + pixels


def pad_rows(rows: Iterable[bytes]) -> bytes:
    """Rows of a BMP, from the last one to the first, each padded to four bytes."""
    return b"".join(row + bytes(-len(row) % 4) for row in reversed(list(rows)))


def make_tiff(
    pixels: bytes,
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int | None,
    *tags: tuple[int, int, Sequence[float]],
    order: str = "<",
    compression: int = 1,
) -> bytes:
    """A TIFF with one strip. `tags` are (tag, type, values); they replace tags that are set here."""
    width, height = size
    entries: dict[int, tuple[int, Sequence[float]]] = {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, bits),
        259: (3, [compression]),
        273: (4, [0]),
        277: (3, [len(bits)]),
        278: (3, [height]),
        279: (4, [len(pixels)]),
    }
    if photometric is not None:
        entries[262] = (3, [photometric])
    entries |= {tag: (kind, values) for tag, kind, values in tags}
    after = 8 + 2 + 12 * len(entries) + 4
    values = {tag: struct.pack(f"{order}{len(v)}{_TIFF_TYPES[kind]}", *v) for tag, (kind, v) in entries.items()}
    start = after + sum(len(value) for value in values.values() if len(value) > 4)
    if 273 not in {tag for tag, _, _ in tags}:
        values[273] = struct.pack(f"{order}I", start)
    directory, more = b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        value = values[tag]
        if len(value) > 4:
            value, more = struct.pack(f"{order}I", after + len(more)), more + value
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + value.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + more + pixels


def add_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment at its start."""
    return jpeg[:2] + struct.pack(">BBH", 255, marker, len(content) + 2) + content + jpeg[2:]


def change_frame(jpeg: bytes, offset: int, content: bytes) -> bytes:
    """A baseline JPEG with other bytes in its frame header, `offset` bytes behind the marker's first byte."""
    place = jpeg.index(b"\xff\xc0") + offset
    return jpeg[:place] + content + jpeg[place + len(content) :]
