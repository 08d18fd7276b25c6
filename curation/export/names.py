"""Names of exported files, made from keys: paths that stay in their folder, words for formats that need plain ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_COMPONENT_BYTES = 200
"""The most bytes of a folder's or file's name: file systems allow 255, and an extension may follow."""
_PATH_BYTES = 1000
_WORD_BYTES = 64
"""The most bytes of a word. With a tag and an extension it fits in the 100 bytes of a tar's oldest name field."""
IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "gif", "webp", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif", "hif")
)
"""File suffixes of images, in lower case and without a dot. A word does not contain the suffix of its key."""


def make_path(key: str) -> str:
    """Return a relative path for a key, which is the key itself if it is a path that can be used as it stands.

    The path has no `..`, no empty parts, no control characters and no backslashes, and no part over 200 bytes. Two keys
    may have the same path: `write_new` in `curation.export.destination` then chooses another one.
    """
    parts = [_make_part(part) for part in key.split("/") if part not in ("", ".")]
    path = "/".join(parts) or "image"
    if len(path.encode()) <= _PATH_BYTES:
        return path
    return _cut(path.replace("/", "_"), _COMPONENT_BYTES)


def make_word(key: str) -> str:
    """Return a word of ASCII letters, digits, `_` and `-` for a key, without the suffix of its image. At most 64 bytes.

    Two keys may have the same word: see `Words`.
    """
    stem, dot, suffix = key.rpartition(".")
    text = stem if dot and suffix.lower() in IMAGE_SUFFIXES else key
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[-_WORD_BYTES:].lstrip("-") or "image"


def make_tag(row_id: str) -> str:
    """Return 16 hexadecimal digits that tell a row from all others of the output, from its id."""
    return hashlib.sha256(row_id.encode()).hexdigest()[:16]


def add_tag(name: str, row_id: str) -> str:
    """Add a row's tag to a file name, before its extension."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.rpartition(".")
    if not stem:
        stem, dot, suffix = last, "", ""
    return f"{folder}{slash}{stem}-{make_tag(row_id)}{dot}{suffix}"


class Repeats:
    """Which of many names come more than once.

    Holds 8 bytes for each name while it counts. A name may be taken for a repeated one by chance: of a billion names,
    with a probability of one in 40. It then gets a tag that it does not need.
    """

    def __init__(self, names: Iterable[str]) -> None:
        hashes = np.fromiter(map(_hash, names), np.uint64)
        hashes.sort()
        self._repeated: NDArray[np.uint64] = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        self.rows = len(hashes)
        """The number of names, the repeated ones counted each time."""

    def __contains__(self, name: str) -> bool:
        """Whether the name comes more than once."""
        value = _hash(name)
        where = int(np.searchsorted(self._repeated, value))
        return where < len(self._repeated) and self._repeated[where] == value

    def __len__(self) -> int:
        """The number of different names that come more than once."""
        return len(self._repeated)


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()))


def _make_part(part: str) -> str:
    clean = "".join("_" if ord(char) < 32 or ord(char) == 127 or char == "\\" else char for char in part)
    return _cut("_" * len(clean) if clean == ".." else clean, _COMPONENT_BYTES)


def _cut(text: str, size: int) -> str:
    """Cut a text to this number of bytes in UTF-8. A text that is cut ends with digits that depend on all of it."""
    data = text.encode()
    if len(data) <= size:
        return text
    tag = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: size - 17].decode(errors='ignore')}-{tag}"
