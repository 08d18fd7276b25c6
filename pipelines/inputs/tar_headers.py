"""Blocks of tars: headers, the extended headers of PAX and GNU before them, and the zeros that end an archive."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 512
"""Bytes of a tar's block. A header is one block; a member's data are padded to a multiple of it."""
ZEROS = bytes(BLOCK)
END = 2 * BLOCK
"""The zeros that end an archive, before the padding."""
RECORD = 20 * BLOCK
"""A tar is padded to a multiple of this, unless its writer was told otherwise."""

_USUAL = {20, 63, 126, 10_000, *(1 << n for n in range(5, 14)), *(n * ten for n in range(1, 10) for ten in (100, 1000))}
_PADDINGS = tuple(BLOCK * factor for factor in sorted(_USUAL))
"""Multiples to which programs pad tars: GNU tar's default, powers of two up to 4 MiB, and the blocking factors that
people choose for tapes: 63, 126 and round numbers. Any multiple would do, but then every tar that breaks off in zeros
would be one padded record."""
_END_PADDINGS = tuple(sorted({*_PADDINGS, *(BLOCK * factor for factor in range(1, 129))}))
"""The same at the end of a tar, where any blocking factor up to 128 is believed."""
_HOLE = 4096 + BLOCK
"""Zeros up to this length may be a page that was never written, so fewer of them are believed to be padding."""
_BLACK = (".bmp", ".tif", ".tiff")
"""Formats whose files may end with zeros: black pixels."""
_LAST_BYTES = (b"\xff\xd9", b"IEND\xaeB`\x82")
"""The last bytes of a whole JPEG and PNG."""

_CHECKED = struct.Struct("148s8s356s")
_PAX_NAMES = (b"GNU.sparse.name", b"path")
_PAX_SIZES = (b"GNU.sparse.realsize", b"GNU.sparse.size")
_PAX_KEPT = frozenset((*_PAX_NAMES, *_PAX_SIZES, b"size", b"GNU.sparse.map", b"GNU.sparse.major"))
_SPARSE_ENTRIES = 10_000
"""The most pieces of a sparse file. A photo has one; more of them would only cost memory."""


class BadHeader(ValueError):
    """An extended header, or the map of a sparse file, that cannot be read."""


@dataclass(frozen=True)
class Header:
    """A member's own header: its name, its type (one byte), and `size`, the bytes that follow in the tar."""

    name: bytes
    type: bytes
    size: int
    block: bytes


@dataclass
class Extended:
    """Extended headers that apply to the next member: the records that matter here, and how many bytes they have.

    `pieces` are offsets and sizes of a sparse file in PAX's format 0.0, where they are repeated records.
    """

    records: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[int] = field(default_factory=list)
    length: int = 0

    def name(self) -> bytes | None:
        """Return the member's name, if an extended header says it."""
        return next((self.records[key] for key in _PAX_NAMES if key in self.records), None)

    def size(self) -> int | None:
        """Return the bytes that the member has in the tar, if an extended header says it. Raises `BadHeader`."""
        return _parse_decimal(self.records[b"size"]) if b"size" in self.records else None

    def real_size(self) -> int | None:
        """Return the size of a sparse file with its holes, or None if the member is none. Raises `BadHeader`."""
        text = next((self.records[key] for key in _PAX_SIZES if key in self.records), None)
        if text is None and (self.pieces or b"GNU.sparse.map" in self.records or b"GNU.sparse.major" in self.records):
            raise BadHeader("a sparse file without a size")
        return None if text is None else _parse_decimal(text)

    def sparse_map(self) -> list[int] | None:
        """Return a sparse file's offsets and sizes in turn, or None if they are at the beginning of its data (1.0)."""
        if self.records.get(b"GNU.sparse.major") == b"1":
            return None
        if b"GNU.sparse.map" in self.records:
            return _limit([_parse_decimal(text) for text in self.records[b"GNU.sparse.map"].split(b",") if text])
        return _limit(self.pieces)


def parse_header(block: bytes) -> Header | None:
    """Parse a block as a member's header. Returns None if its checksum or its size is wrong, so if it is no header.

    Python's `tarfile` is not used: it takes the time stamps of GNU tar's incremental format for a folder's name
    (CPython issue 155629), and reads extended headers of any size at once.
    """
    before, checksum, after = _CHECKED.unpack(block)
    try:
        expected = _parse_number(checksum)
        total = sum(before) + sum(after) + 8 * ord(" ")
        # Some old programs summed signed bytes.
        if expected != total and expected != total - 256 * sum(byte > 127 for byte in before + after):
            return None
        size = _parse_number(block[124:136])
    except ValueError:
        return None
    if size < 0:
        return None
    name = _until_nul(block[:100])
    if block[257:263] == b"ustar\0":
        prefix = _until_nul(block[345:476] if block[508:] == b"tar\0" else block[345:500])  # star has a shorter one
        name = prefix + b"/" + name if prefix else name
    return Header(name, block[156:157], size, block)


def parse_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records of a PAX header that matter here. Raises `BadHeader`."""
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 12)
        length = data[position:space] if space > 0 else b""
        end = position + int(length) if length.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise BadHeader("a record with a wrong length")
        if key in _PAX_KEPT or key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            yield key, value
        position = end


def apply_records(extended: Extended, data: bytes) -> None:
    """Add the records of a PAX header. An empty value takes back an earlier one. Raises `BadHeader`."""
    for key, value in parse_records(data):
        if key not in _PAX_KEPT:
            extended.pieces.append(_parse_decimal(value))
        elif value:
            extended.records[key] = value
        else:
            extended.records.pop(key, None)


def parse_old_sparse(header: Header, more: Iterator[bytes]) -> tuple[list[int], int]:
    """Return the map and the real size of a sparse file in GNU tar's own format.

    `more` yields the blocks after the header, of which the map may need some. Raises `BadHeader`.
    """
    try:
        size = _parse_number(header.block[483:495])
        pieces = [_parse_number(header.block[at : at + 12]) for at in range(386, 482, 12)]
        extended = header.block[482]
        while extended:
            block = next(more)
            if len(pieces) < 2 * _SPARSE_ENTRIES:  # the others are read, so that the member's data are found
                pieces += [_parse_number(block[at : at + 12]) for at in range(0, 504, 12)]
            extended = block[504]
        if size < 0:
            raise ValueError("a negative size")
    except ValueError as error:
        raise BadHeader("a sparse file with a broken map") from error
    used = [(pieces[at], pieces[at + 1]) for at in range(0, len(pieces), 2) if pieces[at] or pieces[at + 1]]
    return [number for piece in used for number in piece], size


def expand_sparse(data: bytes, pieces: list[int] | None, size: int) -> bytes:
    """Return a sparse file with its holes as zeros. `pieces` None: the map is at the beginning of `data`.

    Raises `BadHeader` if the map does not fit the data.
    """
    start = 0
    if pieces is None:
        pieces, start = _split_map(data)
    if len(pieces) % 2 or sum(pieces[1::2]) != len(data) - start:
        raise BadHeader("a sparse file whose map does not fit its data")
    whole = bytearray(size)
    for offset, length in zip(_limit(pieces)[::2], pieces[1::2], strict=True):
        if offset < 0 or length < 0 or offset + length > size:
            raise BadHeader("a sparse file whose map goes beyond its size")
        whole[offset : offset + length] = data[start : start + length]
        start += length
    return bytes(whole)


def _split_map(data: bytes) -> tuple[list[int], int]:
    """Return the map at the beginning of a sparse file's data (PAX format 1.0), and where its pieces begin."""
    count, numbers, position = 1, list[int](), 0
    while len(numbers) < count:
        end = data.find(b"\n", position, position + 24)
        if end < 0:
            raise BadHeader("a sparse file with a broken map")
        numbers.append(_parse_decimal(data[position:end]))
        position, count = end + 1, 2 * numbers[0] + 1
        if count > 2 * _SPARSE_ENTRIES:
            raise BadHeader(f"a sparse file in more than {_SPARSE_ENTRIES} pieces")
    return numbers[1:], -(-position // BLOCK) * BLOCK


def _limit(pieces: list[int]) -> list[int]:
    if len(pieces) > 2 * _SPARSE_ENTRIES:
        raise BadHeader(f"a sparse file in more than {_SPARSE_ENTRIES} pieces")
    return pieces


def _parse_number(data: bytes) -> int:
    """Parse a number of a header: octal digits, or binary if the first bit is set (GNU and star). May be negative."""
    if data[0] & 0x80:
        return int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big") - (1 << (8 * len(data) - 1)) * (
            data[0] >> 6 & 1
        )
    return int(_until_nul(data).strip() or b"0", 8)


def _parse_decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise BadHeader("a number that is none")
    return int(text)


def _until_nul(data: bytes) -> bytes:
    return data.split(b"\0", 1)[0]


def is_archive_end(zeros: int, total: int) -> bool:
    """Tell whether `zeros` before a member are the end and the padding of an archive of `total` bytes."""
    if zeros <= END:
        return zeros == END
    return _fits(zeros, total, _PADDINGS if zeros > _HOLE else (RECORD,))


def is_padding(zeros: int, total: int, start: int) -> bool:
    """Tell whether `zeros` at the end of a tar of `total` bytes are an end and padding.

    Either the whole tar or its last archive, from byte `start`, may be padded. `tar -A` keeps the ends of the archives
    that it joins last, so a few records are believed too.
    """
    joined = total % RECORD == 0 and zeros < 3 * (END + RECORD)
    return joined or any(_fits(zeros, size, _END_PADDINGS) for size in (total, total - start))


def breaks_off(name: str, data: bytes) -> bool:
    """Tell whether a file seems to be cut, and filled with zeros. Some cameras pad a whole JPEG with zeros."""
    end = data[-BLOCK:]
    if not end or end.strip(b"\0") or name.lower().endswith(_BLACK):
        return False
    return not data.rstrip(b"\0").endswith(_LAST_BYTES)


def _fits(zeros: int, total: int, sizes: tuple[int, ...]) -> bool:
    """Tell whether an archive of `total` bytes is a multiple of one of `sizes`, and needs that many zeros for it."""
    return any(total % size == 0 and zeros < END + size for size in sizes)
