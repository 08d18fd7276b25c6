"""PNG: the chunks that matter to pixels, and transparency by a key colour at the file's own depth.

Pillow reads every chunk of a file, and rejects the image for a text that is too long, a wrong checksum or a broken
compression in a chunk that has no pixels. Here it gets the other chunks only. Chunks are those of the PNG
specification, third edition.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip.images.pillow_internals import read_low_bytes
from siglip.images.rejection import ImageRejected

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CRITICAL = (b"IHDR", b"PLTE", b"tRNS")
"""Chunks that change pixels. tRNS is ancillary by its name only."""
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED = (b"exif\0", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts in which Pillow looks for the orientation."""
_MAX_TEXT = 2**20
"""Longest such text, in bytes, as Pillow has it for compressed ones. Of a longer one the start is read."""
_NAME = re.compile(rb"[A-Za-z]{4}")
_GREY, _RGB, _PALETTE = 0, 2, 3


@dataclass(frozen=True)
class Png:
    """A PNG with the chunks that matter. `key` is the transparent colour, samples of `depth` bits, or None.

    A palette's transparency stays in `data`.
    """

    data: bytes
    depth: int
    color: int
    interlaced: bool
    key: tuple[int, ...] | None


def read_png(data: bytes) -> Png:
    """Read a PNG's chunks, and leave out those that do not matter to pixels or to the orientation.

    Raises `ImageRejected`: `corrupt` for a chunk that matters and is broken, `unsupported` for a file that decoders
    read in different ways, `truncated` when the file ends before its pixels.
    """
    position = len(SIGNATURE)
    parts: list[bytes] = [SIGNATURE]
    start = 0  # of the consecutive chunks of pixels before `position`, 0 behind any other chunk
    found: dict[bytes, bytes] = {}
    pixels = False
    while position + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if not _NAME.fullmatch(name) or name == b"IEND":
            break
        if name == b"CgBI":
            raise ImageRejected("unsupported", "PNG in Apple's own variant (CgBI)")
        if len(parts) == 1 and name != b"IHDR":
            raise ImageRejected("unsupported", f"PNG whose first chunk is {name.decode()}")
        if name == b"IDAT":
            if end <= len(data):
                _check_pixels(data, position, end)
            pixels, start, position = True, start or position, end
            continue
        if start:
            parts.append(data[start:position])
            start = 0
        if name in _CRITICAL:
            if name in found:
                raise ImageRejected("unsupported", f"PNG with two {name.decode()} chunks")
            if not pixels:
                found[name] = _check(data, name, position, end)
                parts += [data[position:end]] if name != b"tRNS" or found[b"IHDR"][9:10] == b"\x03" else []
        elif end <= len(data) and (kept := _keep_orientation(data, name, position, end)):
            parts.append(kept)
        position = end
    if start:
        parts.append(data[start:position])
    if not pixels or b"IHDR" not in found:
        raise ImageRejected("truncated" if position >= len(data) else "corrupt", "the PNG ends before its pixels")
    header = found[b"IHDR"]
    if len(header) < 13:
        raise ImageRejected("corrupt", "the PNG's header is too short")
    depth, color, _, _, interlace = header[8:13]
    if color == _PALETTE and not found.get(b"PLTE"):
        raise ImageRejected("unsupported", "PNG with a palette's indices and no palette")
    key = _read_key(found[b"tRNS"], color, depth) if b"tRNS" in found else None
    if position <= len(data):  # else the last chunk is cut, and what follows would be taken for its content
        parts.append(_chunk(b"IEND", b""))
    return Png(b"".join(parts), depth, color, bool(interlace), key)


def find_transparent(png: Png, image: Image.Image) -> NDArray[np.bool_] | None:
    """Where the image has the transparent key colour: bool (H, W), or None. `image` is the file as Pillow decoded it.

    The comparison is at the file's depth: another colour may be the same at 8 bits.
    """
    if png.key is None:
        return None
    if png.color == _GREY and png.depth == 16:
        return np.asarray(np.asarray(image) == png.key[0])
    if png.color == _GREY:
        return np.asarray(np.asarray(image.convert("L")) == png.key[0] * 255 // (2**png.depth - 1))
    samples = np.asarray(image)
    if png.depth == 8:
        return _have_color(samples, png.key)
    same = _have_color(samples, tuple(sample >> 8 for sample in png.key))
    if not same.any():
        return None
    return same & _have_color(np.asarray(read_low_bytes(png.data)), tuple(sample & 255 for sample in png.key))


def _have_color(samples: NDArray[np.uint8], color: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where RGB samples are this colour. Channel by channel: `all` over the last axis takes ten times as long."""
    red, green, blue = (samples[:, :, n] == color[n] for n in range(3))
    return np.asarray(red & green & blue)


def check_rows(png: Png, image: Image.Image) -> None:
    """Raise `ImageRejected` (`truncated`) for a file whose compressed pixels are fewer than its header says.

    It is `corrupt` where they cannot be inflated. Pillow itself compares the checksum behind them (Adler-32).
    zlib's data may end properly and early. Pillow then leaves the rest black, so only an image with a black last row,
    or one that is interlaced, is inflated a second time to be counted.
    """
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not png.interlaced and last.getbbox(alpha_only=False) is not None:
        return
    channels = {_GREY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}[png.color]
    passes = [(0, 0, 1, 1)]
    if png.interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    expected = 0
    for left, top, across, down in passes:
        width, height = -(-(image.width - left) // across), -(-(image.height - top) // down)
        if width > 0 and height > 0:
            expected += height * (1 + (width * channels * png.depth + 7) // 8)
    try:
        found = _count_inflated(png.data, expected)
    except zlib.error as error:
        raise ImageRejected("corrupt", f"the PNG's compressed pixels: {error}") from None
    if found < expected:
        raise ImageRejected("truncated", "the PNG has fewer rows of pixels than its header says")


def _count_inflated(data: bytes, most: int) -> int:
    """Count the bytes of a PNG's inflated pixels, at most about `most`, without keeping them."""
    inflater, count, position = zlib.decompressobj(), 0, len(SIGNATURE)
    while position + 8 <= len(data) and count < most and not inflater.eof:
        size, name = struct.unpack_from(">I4s", data, position)
        rest = data[position + 8 : position + 8 + size] if name == b"IDAT" else b""
        while rest and count < most and not inflater.eof:
            count += len(inflater.decompress(rest, 2**20))
            rest = inflater.unconsumed_tail
        position += 12 + size
    return count


def _check(data: bytes, name: bytes, start: int, end: int) -> bytes:
    """Return the content of a chunk that matters. Raises `ImageRejected` when it is not as it was written."""
    content = data[start + 8 : end - 4]
    if end > len(data):
        raise ImageRejected("truncated", f"the PNG ends in its {name.decode()} chunk")
    if zlib.crc32(name + content) != int.from_bytes(data[end - 4 : end], "big"):
        raise ImageRejected("corrupt", f"the checksum of the PNG's {name.decode()} chunk is wrong")
    return content


def _check_pixels(data: bytes, start: int, end: int) -> None:
    """Raise `ImageRejected` for a chunk of pixels with a wrong checksum, which Pillow does not compare.

    It is `truncated` when the file ends in zeros that begin in this chunk, as a download that broke off can leave it.
    """
    with memoryview(data) as view:
        checksum = zlib.crc32(view[start + 4 : end - 4])
    if checksum == int.from_bytes(data[end - 4 : end], "big"):
        return
    if len(data.rstrip(b"\0")) < end:
        raise ImageRejected("truncated", "the PNG ends in zeros that begin in its pixels")
    raise ImageRejected("corrupt", "the checksum of the PNG's IDAT chunk is wrong")


def _read_key(content: bytes, color: int, depth: int) -> tuple[int, ...] | None:
    """The transparent colour. Bits above the depth are ignored, as the specification says."""
    samples = {_GREY: 1, _RGB: 3}.get(color)
    if samples is None:
        return None
    if len(content) < 2 * samples:
        raise ImageRejected("corrupt", "the PNG's tRNS chunk is too short")
    return tuple(sample & (2**depth - 1) for sample in struct.unpack_from(f">{samples}H", content))


def _keep_orientation(data: bytes, name: bytes, start: int, end: int) -> bytes | None:
    """A chunk that may say how the image is turned, so that Pillow reads it; None for others and for broken ones."""
    content = data[start + 8 : end - 4]
    if name != b"eXIf" and not (name in _TEXTS and content.startswith(_ORIENTED)):
        return None
    if zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(data[end - 4 : end], "big"):
        return None
    if name == b"eXIf":
        return data[start:end]
    keyword, _, text = content.partition(b"\0")
    if name == b"tEXt":
        return _chunk(name, keyword + b"\0" + text[:_MAX_TEXT])
    compressed = name == b"zTXt" or text[:1] == b"\x01"
    text = text[2:].split(b"\0", 2)[-1] if name == b"iTXt" else text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _MAX_TEXT)
        except zlib.error:
            return None
    if name == b"zTXt":
        return _chunk(b"tEXt", keyword + b"\0" + text)
    return _chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text[:_MAX_TEXT])


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
