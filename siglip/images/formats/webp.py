"""WebP: a file without its metadata, for when that is what a decoder rejects."""

from __future__ import annotations

import struct

_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Chunks without pixels, each with its flag in the VP8X chunk (WebP container specification)."""


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
