"""AVIF and HEIC: their items, and pixels that were never written. Boxes are those of ISO/IEC 14496-12 and 23008-12."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from siglip.images.rejection import ImageRejected

_CODED = (b"av01", b"hvc1")
_MOST_ITEMS = 10_000
_HOLE = bytes(256)
"""A run of zeros that coded pixels do not have. HEVC forbids more than two zero bytes in a row. The longest run in
1,600 AVIFs of noise, patterns and flat colours was of three."""


@dataclass(frozen=True)
class HeifItem:
    """An item: its type, such as `av01`, and where its content is in the file, as starts and ends."""

    type: bytes
    extents: tuple[tuple[int, int], ...]


def read_items(data: bytes) -> list[HeifItem]:
    """Read the index of a file. Empty where there is none, as in a film, or where it is broken."""
    try:
        return _read_meta(data)
    except (IndexError, ValueError):
        return []


def check_coded(data: bytes, items: list[HeifItem]) -> None:
    """Raise `ImageRejected` where coded pixels were never written: `truncated` at the end of the file, or `corrupt`."""
    left = 2 * len(data)  # a broken index can name the same bytes many times
    for item in items if data.find(_HOLE) >= 0 else []:
        for start, end in item.extents if item.type in _CODED else ():
            left -= end - start
            if left < 0:
                return
            if (hole := data.find(_HOLE, start, end)) >= 0:
                at_end = not data[hole:].strip(b"\0")
                text = "the file ends in zeros that begin in its pixels" if at_end else "zeros in the coded pixels"
                raise ImageRejected("truncated" if at_end else "corrupt", text)


def _read_meta(data: bytes) -> list[HeifItem]:
    meta = next((box for box in _boxes(data, 0, len(data)) if box[0] == b"meta"), None)
    if meta is None:
        return []
    types: dict[int, bytes] = {}
    extents: dict[int, tuple[tuple[int, int], ...]] = {}
    for name, start, end in _boxes(data, meta[1] + 4, meta[2]):
        if name == b"iinf":
            for entry, first, _ in _boxes(data, start + (6 if data[start] == 0 else 8), end):
                if entry == b"infe" and data[first] in (2, 3) and len(types) < _MOST_ITEMS:
                    size = 2 if data[first] == 2 else 4
                    number = int.from_bytes(data[first + 4 : first + 4 + size], "big")
                    types[number] = data[first + 6 + size : first + 10 + size]
        elif name == b"iloc":
            extents = dict(_read_locations(data, start, end))
    return [HeifItem(type, extents.get(number, ())) for number, type in types.items()]


def _boxes(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Boxes one after another: their names, and the starts and ends of their contents."""
    while position + 8 <= end:
        size, name, head = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        size = size or end - position
        if size < head:
            return
        yield name, position + head, min(position + size, end)
        position += size


def _read_locations(data: bytes, position: int, end: int) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """The items of a box `iloc` with their extents, of those whose content is in the file itself."""

    def take(size: int) -> int:
        nonlocal position
        position += size
        if position > end:
            raise ValueError("the box ends early")
        return int.from_bytes(data[position - size : position], "big")

    version = take(1)
    take(3)
    sizes = take(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide = 4 if version == 2 else 2
    for _ in range(min(take(wide), _MOST_ITEMS)):
        number = take(wide)
        method = take(2) & 15 if version else 0
        take(2)
        base = take(base_size)
        found = []
        for _ in range(take(2)):
            take(index_size if version else 0)
            start, size = base + take(offset_size), take(length_size)
            found.append((start, min(start + size, len(data)) if size else len(data)))
        yield number, tuple(found) if method == 0 else ()
