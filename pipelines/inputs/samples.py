"""Samples in WebDataset's layout: consecutive members with the same name up to the first dot, as rows with metadata."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.inputs.rows import Row, Skipped
from pipelines.inputs.tar_headers import BadHeader
from pipelines.inputs.tar_stream import Member, TarReader
from siglip.images.decode import ImageRejected, readable_suffixes
from storage.settings import refuse_double_keys

METADATA_SUFFIXES = frozenset(("json", "txt", "cls"))
"""Suffixes of members that become the metadata of their sample's images."""

SAMPLE_IMAGES, SAMPLE_BYTES = 256, 128 * 2**20
"""The most images, and bytes of images, that are held until their sample ends. A longer sample is read in parts."""
METADATA_BYTES = 8 * 2**20
"""The most metadata of a sample, and the most that the rows of a part have of metadata that they share."""
_NESTING = 100
"""The deepest nesting of JSON that is kept as JSON. Polars and other readers in Rust stop at 128 levels."""

_TOO_LARGE = "metadata files over 8 MiB in their sample"
_NO_IMAGE = "metadata files without an image"
_DOUBLE = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])')
_CLASS = re.compile(r"\s*-?[0-9]{1,18}\s*", re.ASCII)
_DATE = re.compile(r"[0-9]+(\.[0-9]+)+")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Metadata:
    """A metadata member: its name, and its content as JSON text. `between` is its extension without the suffix."""

    name: str
    extension: str
    between: str
    text: str


class Samples:
    """Makes rows of the members of one tar.

    A sample's only image has the sample's name as key; several images have their members' names, as has one with
    two numbers after the first dot, which is a date. All images of a sample share its metadata, with one exception:
    a number after the first dot (`2024.05.000001.json`) is a part of a name instead of a kind of data. Such
    metadata belong to the image of the same name, or else to an image whose name is the sample's. In a sample that
    is read in parts, this holds for everything between the first and the last dot. Counts what becomes no row, and
    metadata that no row has, in `skipped`.
    """

    def __init__(self, source: str, max_bytes: int, skipped: Skipped) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._skipped = skipped
        self._stem: str | None = None
        self._start()

    def _start(self) -> None:
        self._images: list[tuple[Row, str]] = []
        self._image_bytes = 0
        self._metadata: list[_Metadata] = []
        self._metadata_bytes = 0
        self._names: set[str] = set()
        self._in_parts = False

    def add(self, member: Member, tar: TarReader) -> Iterator[Row]:
        """Add the tar's present member. Yields the rows of the sample before it, if another one begins.

        Raises `EOFError` if the tar ends within the member.
        """
        if member.joined:
            yield from self.finish()
        if member.kind == "folder":
            return
        name = member.name.removeprefix("./")
        stem, extension = split_name(name)
        between, _, suffix = extension.rpartition(".")
        # macOS writes such a file with metadata before each file, also inside of a sample.
        if stem[_base(stem) :].startswith("._"):
            self._skipped.add(show_name(name), "hidden files")
            return
        image, metadata = suffix in readable_suffixes(), suffix in METADATA_SUFFIXES
        # A name that comes twice begins a new sample: the tar was appended to, or joined from several.
        own_name = name if image else extension
        if stem != self._stem or ((image or metadata) and own_name in self._names):
            yield from self.finish()
            self._stem = stem
        if member.kind == "link" or (member.kind == "part" and not image):
            self._skipped.add(show_name(name), "links and devices in tars")
        elif image:
            size = member.size if member.size <= self._max_bytes else 0
            full = len(self._images) >= SAMPLE_IMAGES or self._image_bytes + size > SAMPLE_BYTES
            if self._images and full:
                yield from self._take_part()
            self._names.add(own_name)
            self._images.append((self._read_image(name, member, tar), between))
            self._image_bytes += size
        elif metadata:
            self._add_metadata(_Metadata(name, extension, between, ""), suffix, member, tar)
        else:
            self._skipped.add_suffix(show_name(name))

    def finish(self) -> Iterator[Row]:
        """Yield the rows of the sample that was added last."""
        rows, left = self._make_rows()
        for item in left:
            self._skipped.add(show_name(item.name), _NO_IMAGE)
        self._start()
        self._stem = None
        yield from rows

    def _take_part(self) -> list[Row]:
        """Return the rows so far of a sample that is too large to be held. Metadata without an image wait for one."""
        self._in_parts = True
        rows, left = self._make_rows()
        metadata = [item for item in self._metadata if not item.between] + left
        self._start()
        self._in_parts, self._metadata = True, metadata
        self._metadata_bytes = sum(_weigh(item) for item in metadata)
        return rows

    def _read_image(self, name: str, member: Member, tar: TarReader) -> Row:
        row = Row(show_name(name), self._source)
        if member.kind == "part":
            row.rejected = ImageRejected("truncated", "the image's beginning is in another volume of the tar")
        elif member.size > self._max_bytes:
            row.rejected = ImageRejected("too_many_bytes", f"{member.size} bytes, over {self._max_bytes}")
        else:
            try:
                row.data = tar.read(member)
            except BadHeader as error:
                row.rejected = ImageRejected("unreadable", f"stored as {error}")
        return row

    def _add_metadata(self, item: _Metadata, suffix: str, member: Member, tar: TarReader) -> None:
        most = min(self._max_bytes, METADATA_BYTES - self._metadata_bytes)
        text = None
        if member.size <= most:
            try:
                text = encode_metadata(suffix, tar.read(member))
            except BadHeader as error:
                text = json.dumps(f"unreadable: stored as {error}")
        if text is None or len(text) > most:
            self._skipped.add(show_name(item.name), _TOO_LARGE)
            return
        item = _Metadata(item.name, item.extension, item.between, text)
        self._metadata.append(item)
        self._names.add(item.extension)
        self._metadata_bytes += _weigh(item)

    def _make_rows(self) -> tuple[list[Row], list[_Metadata]]:
        """Return the rows of the images, and the metadata that belong to none of them."""
        if not self._images:
            return [], self._metadata if not self._in_parts else [item for item in self._metadata if item.between]
        own, shared, left = self._assign(self._in_parts)
        if self._is_too_much(own, shared):
            own, shared, left = self._assign(by_name=True)
        if self._is_too_much(own, shared):
            counts = Counter(between for _, between in self._images)
            repeated = [item for between, items in own.items() if counts[between] > 1 for item in items]
            for item in (*shared, *repeated):
                self._skipped.add(show_name(item.name), _TOO_LARGE)
            own = {between: items for between, items in own.items() if counts[between] == 1}
            shared, self._metadata = [], [item for item in self._metadata if item.between]
        for row, between in self._images:
            row.metadata = _join(own.get(between, ()), shared, short=bool(between))
        if len(self._images) == 1 and not self._in_parts and not _DATE.fullmatch(self._images[0][1]):
            self._images[0][0].key = show_name(self._stem or "")
        return [row for row, _ in self._images], left

    def _assign(self, by_name: bool) -> tuple[dict[str, list[_Metadata]], list[_Metadata], list[_Metadata]]:
        """Return the metadata of single images by what is between their names' dots, those of all images, and others.

        With `by_name`, all metadata with something between the dots belong to single images; else those with a number.
        """
        names = {between for _, between in self._images}
        own: dict[str, list[_Metadata]] = {}
        shared: list[_Metadata] = []
        left: list[_Metadata] = []
        for item in self._metadata:
            if not item.between or not (by_name or _is_numbered(item.between)):
                shared.append(item)
            elif item.between in names:
                own.setdefault(item.between, []).append(item)
            elif "" in names and not self._in_parts:
                own.setdefault("", []).append(item)
            else:
                left.append(item)
        return own, shared, left

    def _is_too_much(self, own: dict[str, list[_Metadata]], shared: list[_Metadata]) -> bool:
        """Tell whether rows would repeat too much of the metadata. What only one row has is bounded as it is read."""
        if len(self._images) == 1:
            return False
        counts = Counter(between for _, between in self._images)
        total = sum(map(_weigh, shared)) * len(self._images)
        total += sum(_weigh(item) * (counts[between] - 1) for between, items in own.items() for item in items)
        return total > METADATA_BYTES


def split_name(name: str) -> tuple[str, str]:
    """Split by WebDataset's rule: the key is the path up to the file name's first dot, the rest is the extension.

    A backslash separates folders too. The extension is in lower case.
    """
    start = _base(name)
    start += len(name[start:]) - len(name[start:].lstrip("."))
    stem, _, extension = name[start:].partition(".")
    return name[:start] + stem, extension.lower()


def show_name(name: str) -> str:
    """Return a name as valid UTF-8. Names in tars may be any bytes, strings in Parquet may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def encode_metadata(suffix: str, data: bytes) -> str:
    """Return a metadata member's content as JSON text that every reader of RFC 8259 accepts.

    `.json` becomes its value, `.cls` an integer, all else a string. NaN, Infinity and numbers that no double can hold
    become strings with what stood there. JSON that has a key twice, is nested too deeply or is broken is a string with
    the whole text. What is not UTF-8 (or UTF-16 with a byte order mark), and half a surrogate pair, becomes U+FFFD.
    """
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    if suffix == "json":
        # Hooks for numbers make parsing slow, so they are used only where something did not fit.
        for hooks in _HOOKS:
            try:
                value = json.loads(text, object_pairs_hook=refuse_double_keys, parse_constant=str, **hooks)
                encoded = _dump(value)
            except (ValueError, RecursionError):
                continue
            if _count_levels(encoded) <= _NESTING:
                return encoded
            break
    elif suffix == "cls":
        return _dump(int(text) if _CLASS.fullmatch(text) else text.strip())
    return _dump(text)


def _join(own: Iterable[_Metadata], shared: list[_Metadata], short: bool) -> str | None:
    """Return one JSON object. With `short`, the image's own metadata are named by their suffix, not their extension."""
    found: dict[str, str] = {}
    taken = {item.extension for item in shared}
    for item in own:
        suffix = item.extension.rpartition(".")[2]
        found[suffix if short and suffix not in taken else item.extension] = item.text
    found |= {item.extension: item.text for item in shared}
    return "{" + ", ".join(f"{_dump(name)}: {text}" for name, text in found.items()) + "}" if found else None


def _weigh(item: _Metadata) -> int:
    return len(item.text) + len(item.name) + 200


def _is_numbered(between: str) -> bool:
    first = between.partition(".")[0]
    return first.isascii() and first.isdigit()


def _base(name: str) -> int:
    return max(name.rfind("/"), name.rfind("\\")) + 1


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub("\ufffd", text)


def _parse_float(text: str) -> float | str:
    value = float(text)
    return value if abs(value) != float("inf") else text


def _parse_int(text: str) -> int | str:
    return int(text) if len(text) < 1000 else text


_HOOKS: tuple[dict[str, Any], ...] = ({}, {"parse_float": _parse_float, "parse_int": _parse_int})


def _count_levels(text: str) -> int:
    """Return how deeply a JSON text is nested, or 0 for one with few brackets."""
    if text.count("[") + text.count("{") <= _NESTING:
        return 0
    steps = (bool(match[1]) - bool(match[2]) for match in _DOUBLE.finditer(text))
    return max(itertools.accumulate(steps), default=0)
