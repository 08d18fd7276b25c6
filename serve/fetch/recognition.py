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
START_CHARACTERS = 1024
"""Characters of a string that are looked at, behind the white space that it begins with."""
SPACE_CHARACTERS = 8192
"""White space before an image. A text that begins with more is refused, because nothing of what is read is left
(`serve.embedding.inputs.TEXT_CHARACTERS`)."""
URL_CHARACTERS = 8192
"""A longer string is no URL."""
GIF_CHARACTERS, WEAK_CHARACTERS = 46, 60
"""Characters of base64 of the smallest GIF; fewer than the smallest file has of a format with a short signature."""
LONG_CHARACTERS = 1024
"""A text of so many characters of base64's alphabet, without a space, is no text."""
LINE_CHARACTERS = (60, 100)
"""Characters in each line of base64 that is wrapped: 64 and 76 are usual. A text has no such words."""
LEAST_CHARACTERS = 32
"""Fewer characters of base64 are no image: the smallest GIF has 35 bytes."""
_DATA_URI = re.compile(
    r"data:\s?(?:image/[\w.+-]*(?:[;,]|$)|[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[^;,\s]*)*(?:;base64)?,|;base64,|,(?=\S))",
    re.IGNORECASE | re.ASCII,
)
_URL = re.compile(r"https?://", re.IGNORECASE)
_ANY_URL = re.compile(r"(?:https?|s3|gs|file|blob|ftp)://", re.IGNORECASE)
_CUT_DATA_URI = re.compile(r"image/[\w.+-]+;base64,", re.IGNORECASE | re.ASCII)
_FIRST = re.compile(r"(?:/9j|_9j|iVBO|R0lG|UklG|Qk|SUk|TU0A|AAAA|AAAB|OEJQ|/0|_0)")
"""How base64 of an image begins, as a cheap test that excludes almost all texts."""
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
_WEAK = (b"\xff\xd8\xff", b"II", b"MM", b"\0\0\1\0", b"8BPS", b"BM")
"""Short signatures, which ordinary words and paths may have too."""
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
"""Brands of HEIF files, which stand behind `ftyp`."""


def is_url(source: str) -> bool:
    """Whether a string is an http(s) URL. White space before it does not count."""
    return _URL.match(_start(source)) is not None


def is_data_uri(source: str) -> bool:
    """Whether a string is a data: URI (RFC 2397), perhaps one without data. White space before it does not count."""
    return _DATA_URI.match(_start(source)) is not None


def is_image(source: str) -> bool:
    """Whether a string is a data: URI, or begins with base64 of an image file.

    It reads the first characters only. The image may be incomplete, and the data: URI may have other data.
    """
    return is_data_uri(source) or _is_base64(source)


def is_image_url(source: str) -> bool:
    """Whether a string is a URL, and its path or its end has the suffix of an image file."""
    if len(source) > URL_CHARACTERS or _ANY_URL.match(_start(source)) is None:
        return False
    url = source.strip().lower()
    if len(url.split()) > 1:
        return False
    path = re.split(r"[?#]", url, maxsplit=1)[0]
    return path.endswith(IMAGE_SUFFIXES) or url.endswith(IMAGE_SUFFIXES)


def is_damaged_image(source: str) -> bool:
    """Whether a string is meant as an image and cannot be read as one: a data: URI without `data:`, or long base64.

    Base64 in lines is recognised by its first two lines, which have the same length.
    """
    start = _start(source)
    is_long = len(start) >= LONG_CHARACTERS and _BASE64.fullmatch(start, 0, LONG_CHARACTERS) is not None
    return is_long or _has_lines(start) or _CUT_DATA_URI.match(start) is not None


def _is_base64(source: str) -> bool:
    start = _start(source)
    if not _FIRST.match(start):
        return False
    start = start[: 2 * HEAD_CHARACTERS]  # room for line breaks
    head = "".join(start.split())[:HEAD_CHARACTERS]
    if len(head) < LEAST_CHARACTERS or not _BASE64.fullmatch(head) or _has_spaces(start):
        return False
    whole = head.rstrip("=").translate(_STANDARD)
    data = pybase64.b64decode(whole[: len(whole) // 4 * 4])
    if not (data.startswith(_SIGNATURES) or _has_inner_signature(data)):
        return False
    # A few bytes may also be those of a word or a path.
    if data.startswith(b"GIF8"):
        return len(source) >= GIF_CHARACTERS
    return len(source) >= WEAK_CHARACTERS or not data.startswith(_WEAK)


def _start(source: str) -> str:
    """The first characters of a string, without white space before them."""
    return source[: SPACE_CHARACTERS + START_CHARACTERS].lstrip()[:START_CHARACTERS]


def _has_lines(start: str) -> bool:
    """Whether the first characters of a string are wrapped base64: full lines of one length."""
    lines = start.split("\n", 2)[:2]
    first, *others = (line.rstrip("\r") for line in lines)
    least, most = LINE_CHARACTERS
    if not others or not least <= len(first) <= most or not _BASE64.fullmatch(first):
        return False
    return len(others[0]) <= len(first) and _BASE64.fullmatch(others[0]) is not None


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
