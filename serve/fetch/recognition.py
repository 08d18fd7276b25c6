"""Recognising images in strings: data: URIs, base64 of an image file, and URLs of images."""

from __future__ import annotations

import re

import pybase64

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif"),
    *(".avif", ".jxl", ".jp2", ".ico", ".svg"),
)
"""Suffixes of image files."""
HEAD_CHARACTERS = 64
"""Characters of base64 from which an image is recognised."""
LEAST_CHARACTERS = 32
"""Fewer characters of base64 are no image: the smallest GIF has 35 bytes."""
_DATA_URI = re.compile(
    r"\s*data:(?:image/|(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,\s]*)*(?:;base64)?,)", re.IGNORECASE | re.ASCII
)
_URL = re.compile(r"\s*https?://", re.IGNORECASE)
_FIRST = re.compile(r"\s*(?:/9j|_9j|iVBO|R0lG|UklG|Qk|SUk|TU0A|AAAA|AAAB|OEJQ|/0|_0)")
"""How base64 of an image begins, as a cheap test that excludes almost all texts."""
_SPACE = re.compile(r"\s*")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+=*", re.ASCII)
_STANDARD = str.maketrans("-_", "+/")
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\1\0",
    b"\0\0\0\x0cJXL ",
    b"\0\0\0\x0cjP  ",
    b"\xffO\xffQ",
    b"8BPS",
)
"""The first bytes of image files."""
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
"""Brands of HEIF files, which stand behind `ftyp`."""


def is_url(source: str) -> bool:
    """Whether a string is an http(s) URL. White space before it does not count."""
    return _URL.match(source) is not None


def is_data_uri(source: str) -> bool:
    """Whether a string is a data: URI (RFC 2397), perhaps one without data. White space before it does not count."""
    return _DATA_URI.match(source) is not None


def is_image(source: str) -> bool:
    """Whether a string is a data: URI, or begins with base64 of an image file.

    It reads the first characters only. The image may be incomplete, and the data: URI may have other data.
    """
    return is_data_uri(source) or _is_base64(source)


def is_image_url(source: str) -> bool:
    """Whether a string is an http(s) URL, and its path or its end has the suffix of an image file."""
    if not is_url(source):
        return False
    url = source.strip().lower()
    if any(character.isspace() for character in url):
        return False
    path = re.split(r"[?#]", url, maxsplit=1)[0]
    return path.endswith(IMAGE_SUFFIXES) or url.endswith(IMAGE_SUFFIXES)


def _is_base64(source: str) -> bool:
    if not _FIRST.match(source):
        return False
    space = _SPACE.match(source)
    begin = space.end() if space else 0
    start = source[begin : begin + 2 * HEAD_CHARACTERS]  # room for line breaks
    head = "".join(start.split())[:HEAD_CHARACTERS]
    if len(head) < LEAST_CHARACTERS or not _BASE64.fullmatch(head) or _has_spaces(start):
        return False
    whole = head.rstrip("=").translate(_STANDARD)
    data = pybase64.b64decode(whole[: len(whole) // 4 * 4])
    return data.startswith(_SIGNATURES) or _has_inner_signature(data)


def _has_spaces(start: str) -> bool:
    """Whether there are words: white space other than line breaks among the first characters."""
    return any(character in " \t" for character in start[:LEAST_CHARACTERS])


def _has_inner_signature(data: bytes) -> bool:
    """Whether data are the start of a WebP, HEIF or BMP file, whose first bytes alone do not tell."""
    if data[:4] == b"RIFF":
        return data[8:12] == b"WEBP"
    if data[4:8] == b"ftyp":
        return data[8:12] in _BRANDS
    return data[:2] == b"BM" and data[6:10] == b"\0\0\0\0" and 14 < int.from_bytes(data[10:14], "little") < 4096
