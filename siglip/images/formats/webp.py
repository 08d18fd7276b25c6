"""WebP: its chunks, without metadata for when that is what a decoder rejects, and the extent of its first frame."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Chunks without pixels, each with its flag in the VP8X chunk (WebP container specification)."""

_LONG, _SURPLUS = 128, 64
"""Zero bytes at the end of pixels that are looked at, and how many of them are removed for a try."""


@dataclass(frozen=True)
class WebpFrame:
    """The first frame: the name and the content of its coded pixels, and the box that it covers if it is animated.

    `lonely` says that nothing but zeros comes behind it in an animation, whose end was then never written.
    """

    name: bytes
    content: bytes
    covered: tuple[int, int, int, int] | None
    lonely: bool


def read_first_frame(data: bytes) -> WebpFrame | None:
    """Find the first frame; None where the chunks are too broken for that, which is for the decoder to say."""
    covered = None
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        if name == b"ANMF" and covered is None and position + 24 <= len(data):
            left, top, width, height = (int.from_bytes(data[position + 8 + n :][:3], "little") for n in (0, 3, 6, 9))
            covered = (2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1)
            position += 24
            continue
        if name in (b"VP8 ", b"VP8L"):
            end = position + 8 + size
            rest = data[end : 8 + int.from_bytes(data[4:8], "little")] if covered else b""
            return WebpFrame(name, data[position + 8 : end], covered, len(rest) >= 8 and not rest.strip(b"\0"))
        position += 8 + size + size % 2
    return None


def shorten_webp(frame: WebpFrame) -> bytes | None:
    """Return a WebP of the frame's pixels without some of the many zeros at their end; None where there are not many.

    A whole file can end in many zeros: one colour in the lower half of a picture is coded so. It needs them all, and
    without them a decoder fails. In a file whose end was never written the decoder needs another number of them.
    """
    if frame.content[-_LONG:].strip(b"\0") or len(frame.content) < _LONG:
        return None
    content = frame.content[: -_SURPLUS - len(frame.content) % 2]
    body = b"WEBP" + struct.pack("<4sI", frame.name, len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def strip_webp(data: bytes) -> bytes:
    """Return a WebP without its colour profile, EXIF and XMP, and without chunks that the format does not define."""
    parts, position = [], 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        chunk = data[position : position + 8 + size + size % 2]
        if name == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~sum(_METADATA.values())]) + chunk[9:]
        if name in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            parts.append(chunk)
        position += 8 + size + size % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body
