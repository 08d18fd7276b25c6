"""Mutations of image files: by structure (segments, chunks, directory entries) and by bytes."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.support.images import encode, make_rgb

INTERESTING = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    12,
    16,
    127,
    128,
    255,
    256,
    4095,
    4096,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**32 - 1,
)
"""Values for a field of a header: the edges of sizes, depths and counts."""


def make_seeds() -> dict[str, bytes]:
    """Valid files of each format and of many variants, small enough to be mutated and decoded in a millisecond."""
    rgb, grey = make_rgb(96, 72), make_rgb(96, 72).convert("L")
    rgba = rgb.copy()
    rgba.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = {
        "JPEG": encode(rgb, "JPEG", exif=exif, comment=b"text", icc_profile=bytes(200)),
        "JPEG grey": encode(grey, "JPEG"),
        "JPEG progressive": encode(rgb, "JPEG", progressive=True),
        "JPEG restarts": encode(rgb, "JPEG", restart_marker_blocks=3),
        "JPEG CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "JPEG large": encode(make_rgb(320, 272), "JPEG", quality=40),
        "JPEG lossless": make_lossless_jpeg(160, 140),
        "PNG": encode(rgb, exif=exif, icc_profile=bytes(200)),
        "PNG RGBA": encode(rgba),
        "PNG palette": encode(rgb.quantize(16)),
        "PNG grey 16": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "WEBP": encode(rgb, "WEBP", exif=exif),
        "WEBP lossless": encode(rgba, "WEBP", lossless=True),
        "WEBP animated": encode(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)], duration=9),
        "GIF": encode(rgb.quantize(32), "GIF", save_all=True, append_images=[rgb.rotate(90).quantize(32)]),
        "BMP": encode(rgb, "BMP"),
        "BMP palette": encode(rgb.quantize(16), "BMP"),
        "BMP RGBA": encode(rgba, "BMP"),
        "AVIF": encode(rgb, "AVIF", exif=exif),
    }
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        seeds[f"TIFF {compression}"] = encode(rgb, "TIFF", compression=compression)
    seeds["TIFF RGBA"] = encode(rgba, "TIFF")
    seeds["TIFF grey"] = encode(grey, "TIFF", tiffinfo={0x0112: 6})
    seeds["TIFF group4"] = encode(grey.convert("1"), "TIFF", compression="group4")
    return seeds


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one to four places, half of the time by its structure."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        pieces, join = split(data)
        by_structure = rng.random() < 0.5 and len(pieces) > 1
        data = join(_mutate_pieces(pieces, rng)) if by_structure else _mutate_bytes(data, rng)
    return data


def _mutate_pieces(pieces: list[bytes], rng: random.Random) -> list[bytes]:
    pieces = list(pieces)
    index = rng.randrange(len(pieces))
    operation = rng.randrange(7)
    if operation == 0:
        del pieces[index]
    elif operation == 1:
        pieces.insert(index, pieces[index])
    elif operation == 2:
        pieces.insert(rng.randrange(len(pieces)), pieces.pop(index))
    elif operation == 3:
        pieces[index] = pieces[index][: rng.randrange(len(pieces[index]) + 1)]
    elif operation == 4:
        pieces[index] += rng.randbytes(rng.choice((1, 2, 12, 300)))
    else:
        pieces[index] = _mutate_bytes(pieces[index], rng)
    return pieces


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    # Headers are short and matter most: half of the places are near the start.
    place = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
    operation = rng.randrange(7)
    if operation == 0:
        return data[:place]
    if operation == 1:
        return data[:place] + rng.randbytes(rng.choice((1, 4, 64))) + data[place:]
    if operation == 2:
        return data[:place] + data[place + rng.choice((1, 2, 4, 64)) :]
    if operation == 3:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if operation == 4:
        return data[:place] + bytes(rng.choice((1, 8, 600))) + data[place + 1 :]
    form = rng.choice(("<H", ">H", "<I", ">I", "B"))
    size = struct.calcsize(form)
    return data[:place] + struct.pack(form, rng.choice(INTERESTING) % 256**size) + data[place + size :]


def split(data: bytes) -> tuple[list[bytes], Callable[[list[bytes]], bytes]]:
    """The pieces of a file (segments, chunks, directory entries), and the function that makes a file of such pieces.

    Lengths, checksums and counts are made anew, so that a file with other pieces is not rejected for those.
    """
    if data.startswith(b"\x89PNG"):
        return list(_split_png(data)), lambda pieces: data[:8] + b"".join(map(_join_chunk, pieces))
    if data.startswith(b"\xff\xd8"):
        return list(_split_jpeg(data)), lambda pieces: b"\xff\xd8" + b"".join(map(_join_segment, pieces))
    if data.startswith(b"RIFF"):
        return list(_split_riff(data)), _join_riff
    if data.startswith(b"II*\0") and len(data) > 16:
        return _split_tiff(data)
    return [data], b"".join


def _split_png(data: bytes) -> Iterator[bytes]:
    position = 8
    while position + 8 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : end]
        position = end + 4


def _join_chunk(piece: bytes) -> bytes:
    return struct.pack(">I", max(len(piece) - 4, 0)) + piece + struct.pack(">I", zlib.crc32(piece))


def _split_jpeg(data: bytes) -> Iterator[bytes]:
    """Segments without their length; a scan's data are part of its segment."""
    position = 2
    while position + 4 <= len(data):
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        rest = end
        while data[position + 1] == 0xDA and rest < len(data):
            rest = data.find(b"\xff", rest)
            if rest < 0 or data[rest + 1 : rest + 2] not in (b"\0", *(bytes([0xD0 + n]) for n in range(8))):
                break
            rest += 2
        rest = len(data) if rest < 0 else rest
        yield data[position : position + 2] + data[position + 4 : end] + b"\xff\xff\xff" + data[end:rest]
        position = max(rest, position + 2)
    yield b"\xff\xd9\xff\xff\xff"


def _join_segment(piece: bytes) -> bytes:
    content, _, scan = piece[2:].partition(b"\xff\xff\xff")
    length = struct.pack(">H", (len(content) + 2) % 65536) if piece[1:2] != b"\xd9" else b""
    return piece[:2] + length + content + scan


def _split_riff(data: bytes) -> Iterator[bytes]:
    position = 12
    while position + 8 <= len(data):
        end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4] + data[position + 8 : end]
        position = end + end % 2


def _join_riff(pieces: list[bytes]) -> bytes:
    chunks = [
        piece[:4] + struct.pack("<I", max(len(piece) - 4, 0)) + piece[4:] + b"\0" * (len(piece) % 2) for piece in pieces
    ]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _split_tiff(data: bytes) -> tuple[list[bytes], Callable[[list[bytes]], bytes]]:
    """The entries of the first directory. The new directory is at the end of the file, so that no offset changes."""
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    entries = [data[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(min(count, 100))]

    def join(pieces: list[bytes]) -> bytes:
        directory = (
            struct.pack("<H", len(pieces)) + b"".join(piece[:12].ljust(12, b"\0") for piece in pieces) + bytes(4)
        )
        return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory

    return entries, join


def make_lossless_jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """A lossless JPEG (SOF3) in RGB: predictor 1, every difference category with a code of five bits."""
    pixels = np.asarray(make_rgb(width, height, seed)).astype(int)
    before = np.full_like(pixels, 128)
    before[:, 1:] = pixels[:, :-1]
    before[1:, 0] = pixels[:-1, 0]
    bits: list[str] = []
    for difference in (pixels - before).ravel().tolist():
        category = abs(difference).bit_length()
        value = difference if difference > 0 else difference + 2**category - 1
        bits.append(f"{category:05b}" + (f"{value:0{category}b}" if category else ""))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    parts = [(0xC3, frame), (0xC4, table), (0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 1, 0, 0]))]
    segments = b"".join(struct.pack(">BBH", 255, marker, len(content) + 2) + content for marker, content in parts)
    return b"\xff\xd8" + segments + scan + b"\xff\xd9"
