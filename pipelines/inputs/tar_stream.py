"""Reading a tar's members one after the other, to the last byte, also where the tar is damaged.

Python's `tarfile` is not used. It stops at the first end of archive, or passes over damaged places without telling of
them; it reads an extended header of any declared size whole, and recurses for each further one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.inputs.tar_headers import (
    BLOCK,
    END,
    RECORD,
    ZEROS,
    BadHeader,
    Extended,
    Header,
    apply_records,
    breaks_off,
    expand_sparse,
    is_archive_end,
    is_padding,
    parse_header,
    parse_old_sparse,
)

_EXTENDED_BYTES = 1 << 20
"""The most bytes of extended headers of one member. A name has a few hundred; extended attributes up to 64 KiB each."""
_MAP_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20
_FAR = 1 << 62
"""Sizes in headers may be larger than a file can be."""

_NO_DATA = b"123456"
"""Types whose size is not the size of data in the tar: links, devices, folders."""
_NO_FILES = b"5VD"
"""Folders, volume labels and lists of folders."""
_LINKS = b"12346AEIN"
"""Links, devices, pipes, and programs' own records. A type that nobody defined is a file, as POSIX says."""
_MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"Rar!": "rar",
    b"\x1f\x9d": "compress",
    b"\x1f\x8b": "gzip",
}


@dataclass(frozen=True)
class Member:
    """A member: a file, a part of a file whose beginning is in another volume, a link or device, or a folder.

    `size` is the size of the file, `stored` what it takes in the tar: they differ for sparse files. `joined` is True
    for the first member after an end of archive.
    """

    name: str
    kind: Literal["file", "part", "link", "folder"]
    size: int
    stored: int
    joined: bool = False
    sparse: bool = False
    pieces: list[int] | None = None


class TarReader:
    """Reads an uncompressed tar from a stream, forwards only.

    It reads on after an end of archive, as GNU tar does with `--ignore-zeros`, and after a damaged place from the next
    valid header.

    `problem` is the first damage found: a reject reason and a text; `damages` counts all. `ends` counts ends of
    archive that members follow, and `padded` tells of more zeros at the tar's end than most programs write. Memory is
    bounded by the members that the caller reads, and a few MiB.

    Zeros are an end of archive if they are as many as programs write: two blocks, and padding to
    a usual multiple (`tar_headers.is_archive_end`). At the tar's end more is accepted (`tar_headers.is_padding`). Other
    zeros are a problem: a part of the tar was not written.
    """

    def __init__(self, stream: io.BufferedIOBase, seekable: bool) -> None:
        self.position = 0
        self.problem: tuple[str, str] | None = None
        self.damages = 0
        self.ends = 0
        self.padded = False
        self._stream = stream
        self._seekable = seekable
        self._pushed = b""
        self._shared: dict[bytes, bytes] = {}
        self._left = 0  # bytes of the present member, with its padding, that are not read
        self._start = 0  # where the present archive began
        self._zeros = 0  # length of the zeros that end at the position
        self._lost = False  # whether the position is in a damaged place
        self._drop = False  # whether the next member's extended header could not be read
        self._torn = False  # whether the next member's extended header may be in a damaged place
        self._extends = False  # whether the tar has names in extended headers
        self._blank_end = ""  # the last member, if its data break off and zeros follow

    def members(self) -> Iterator[Member]:
        """Yield the members. Raises `EOFError` if the tar ends within one, and the stream's errors."""
        extended = Extended()
        joined = False
        while len(block := self._take(BLOCK)) == BLOCK:
            header = None if block == ZEROS else parse_header(block)
            if header is None:
                if self._is_compressed(block):
                    return
                if extended.length or self._drop:
                    self._leave(extended)
                    extended = Extended()
                self._pass_block(block)
                continue
            joined |= self._end_zeros()
            self._torn |= self._lost
            self._lost = False
            if header.type in b"xXgLK":
                self._torn = False
                extended = self._read_extended(header, extended)
                continue
            member = self._find_member(header, extended)
            extended = Extended()
            if member is not None:
                yield replace(member, joined=True) if joined else member
                joined = False
            self._skip(self._left)
        if not self._is_compressed(block):
            self._leave(extended)
            self._end(block)

    def read(self, member: Member) -> bytes:
        """Return the bytes of the member that was yielded last, once. Raises `BadHeader` for a broken sparse file.

        Raises `EOFError` if the tar ends within it.
        """
        if member.sparse and member.stored > member.size + _MAP_BYTES:
            raise BadHeader("a sparse file that is larger than its size")
        data = self._take(member.stored)
        self._left -= len(data)
        if len(data) < member.stored:
            raise EOFError(f"the tar ends within {member.name} at byte {self.position}")
        self._blank_end = member.name if breaks_off(member.name, data) else ""
        return expand_sparse(data, member.pieces, member.size) if member.sparse else data

    def _report(self, reason: str, detail: str) -> None:
        """Note a damaged place. All are counted, and the first is described."""
        self.problem = self.problem or (reason, detail)
        self.damages += 1

    def _take(self, size: int) -> bytes:
        if self._pushed:
            data, self._pushed = self._pushed, b""
        else:
            data = self._stream.read(size)
        self.position += len(data)
        return data

    def _skip(self, size: int) -> None:
        self._left = 0
        if self._seekable and size > _SKIP_BYTES:
            ahead = min(size - 1, _FAR)
            self._stream.seek(ahead, io.SEEK_CUR)
            self.position += ahead
            size -= ahead
        while size:
            count = len(self._take(min(size, _SKIP_BYTES)))
            if not count:
                raise EOFError(f"the tar ends before byte {self.position + size}, within a member")
            size -= count

    def _pass_block(self, block: bytes) -> None:
        """Pass a block that is no header: zeros, or the beginning of a damaged place."""
        if block == ZEROS[: len(block)]:
            self._zeros += len(block)
            return
        if not self._lost:
            self._report("corrupt_archive", f"no tar header at byte {self.position - len(block)}")
        self._lost, self._zeros = True, 0

    def _end_zeros(self) -> bool:
        """Judge the zeros before a header. Returns whether an archive began here that is not the first."""
        zeros, self._zeros = self._zeros, 0
        if not zeros or self._lost:
            return False
        end = self.position - BLOCK
        total, self._start = end - self._start, end
        if self._blank_end or not is_archive_end(zeros, total):
            place = f"from within {self._blank_end}" if self._blank_end else f"from byte {end - zeros}"
            self._report("corrupt_archive", f"zeros {place} to byte {end}, where members may be missing")
            self._torn = True
        else:
            self.ends += 1
        return True

    def _end(self, block: bytes) -> None:
        """Judge the tar's end. `block` is what is left of it, less than a block."""
        if block and not block.strip(b"\0"):
            self._zeros += len(block)
        elif block and self._zeros:
            self._pass_block(block)
        if self._lost:
            return
        detail = ""
        if not self.position:
            detail = "the file is empty"
        elif self._zeros < BLOCK:
            detail = f"no end of archive at byte {self.position}"
        elif self._zeros == self.position and self._zeros not in (END, RECORD):
            detail = f"nothing but {self._zeros} zeros"
        elif self._blank_end:
            detail = f"zeros from within {self._blank_end} to the end at byte {self.position}"
        elif self._zeros >= END + RECORD:
            self.padded = is_padding(self._zeros, self.position, self._start)
            start = self.position - self._zeros
            if not self.padded:
                detail = f"zeros from byte {start} to the end at byte {self.position}, too many to be padding"
        if detail:
            self._report("truncated_archive", detail)

    def _is_compressed(self, block: bytes) -> bool:
        """Tell whether the first block is of another format than tar, and note it."""
        if self.position != len(block):
            return False
        name = next((name for magic, name in _MAGIC.items() if block.startswith(magic)), None)
        if name:
            self._report("corrupt_archive", f"{name} data, not a tar: only gzip is unpacked, and only once")
        return name is not None

    def _leave(self, extended: Extended) -> None:
        """Note that an extended header has no member."""
        if extended.length or self._drop:
            self._report("corrupt_archive", f"no member after the extended header before byte {self.position}")
        self._drop = False

    def _read_extended(self, header: Header, extended: Extended) -> Extended:
        """Read an extended header, and return it with the earlier ones of the same member."""
        start = self.position - BLOCK
        self._left = _pad(header.size)
        extended.length += BLOCK + header.size
        if extended.length > _EXTENDED_BYTES:
            self._skip(self._left)
            self._refuse(start, f"has {header.size} bytes, over {_EXTENDED_BYTES}")
            return extended
        data = self._take(self._left)
        if len(data) < self._left:
            raise EOFError(f"the tar ends within an extended header at byte {self.position}")
        data = data[: header.size]
        try:
            if header.type == b"g":
                shared = Extended(dict(self._shared))
                apply_records(shared, data)
                self._shared = shared.records
                extended.length -= BLOCK + header.size
            elif header.type == b"L":
                extended.records[b"path"] = data.split(b"\0", 1)[0]
            elif header.type in b"xX":
                extended.pieces = []
                apply_records(extended, data)
            self._extends |= extended.name() is not None
        except BadHeader as error:
            self._refuse(start, str(error))
        return extended

    def _refuse(self, start: int, detail: str) -> None:
        """Note an extended header that cannot be read. The member after it is not read: its name may be another."""
        self._report("corrupt_archive", f"the extended header at byte {start}: {detail}")
        self._drop = True

    def _find_member(self, header: Header, extended: Extended) -> Member | None:
        """Return the member of a header, and set how many bytes it has in the tar. None if it cannot be read."""
        self._blank_end = ""
        drop, self._drop = self._drop or (self._torn and self._may_be_renamed(header)), False
        self._torn = False
        extended.records = {**self._shared, **extended.records}
        pieces, real, sparse = None, None, False
        try:
            size = extended.size()
            stored = header.size if size is None else size
            if header.type == b"S":
                sparse, (pieces, real) = True, parse_old_sparse(header, self._blocks())
            elif (real := extended.real_size()) is not None:
                sparse, pieces = True, extended.sparse_map()
        except BadHeader as error:
            self._report("corrupt_archive", f"the member before byte {self.position}: {error}")
            drop, stored = True, header.size
        if header.type in _NO_DATA and stored:
            stored = self._count_data(stored)
        self._left = _pad(stored) - (BLOCK if header.type in _NO_DATA and stored else 0)
        if drop:
            return None
        name = (extended.name() or header.name).decode("utf-8", "surrogateescape")
        if header.type in _NO_FILES or (header.type in b"\x000" and name.endswith("/")):
            kind: Literal["file", "part", "link", "folder"] = "folder"
        elif header.type == b"M":
            kind = "part"
        else:
            kind = "link" if header.type in _LINKS else "file"
        return Member(name, kind, stored if real is None else real, stored, sparse=sparse, pieces=pieces)

    def _may_be_renamed(self, header: Header) -> bool:
        """Tell whether an extended header may have named this member. Then its own name is cut, or lacks letters."""
        return self._extends or len(header.name) > 98 or b"?" in header.name or header.name.startswith(b"GNUSparse")

    def _count_data(self, size: int) -> int:
        """Return `size` if a link or folder has data, else 0. Programs differ, so the next block decides."""
        block = self._take(BLOCK)
        if len(block) == BLOCK and block != ZEROS and parse_header(block) is None:
            return size
        self._pushed = block
        self.position -= len(block)
        return 0

    def _blocks(self) -> Iterator[bytes]:
        while len(block := self._take(BLOCK)) == BLOCK:
            yield block
        raise EOFError(f"the tar ends within a header at byte {self.position}")


def _pad(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
