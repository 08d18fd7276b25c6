"""Unpacking of a gzip body (RFC 1952), in pieces, as it arrives."""

from __future__ import annotations

import zlib
from typing import Any

from serve.http.errors import ApiError

MAX_MEMBERS = 4096
"""Members of a body. Tools that compress in parallel write one for each 64 KiB or more."""
PIECE_BYTES = 2**18
"""Bytes that are unpacked in one call, so that the event loop does not wait for longer."""
_MAGIC = b"\x1f\x8b"


class GzipUnpacker:
    """Unpacks a gzip body, which is one member or several, one after the other (RFC 1952, section 2.2).

    Nothing is dropped: bytes after a member that do not begin another one are an error, and so is a body that ends
    within a member.
    """

    def __init__(self) -> None:
        self._member: Any = None
        self._members = 0
        self._rest = b""

    def unpack(self, chunk: bytes, limit: int, last: bool) -> bytes:
        """Unpack the next piece of a body, to at most `limit` bytes. `last` says that it is the last piece.

        When the result has `limit` bytes, the rest is lost: the caller then refuses the body. Raises `ApiError`.
        """
        pieces: list[bytes] = []
        size = 0
        data = self._rest + chunk
        self._rest = b""
        while data and size < limit:
            if self._member is None:
                if len(data) < len(_MAGIC) and not last:
                    self._rest = data
                    return b"".join(pieces)
                self._begin_member(data)
            try:
                pieces.append(self._member.decompress(data, min(PIECE_BYTES, limit - size)))
            except zlib.error:
                raise ApiError("invalid_request", "the body is not gzip, or is damaged") from None
            size += len(pieces[-1])
            data = self._member.unconsumed_tail
            if self._member.eof:
                data = self._member.unused_data
                self._member = None
        if last and size < limit and (self._member is not None or not self._members):
            raise ApiError("invalid_request", "the body's gzip ends early")
        return b"".join(pieces)

    def _begin_member(self, data: bytes) -> None:
        if not data.startswith(_MAGIC):
            what = (
                "has other bytes after its gzip" if self._members else "is not gzip, although Content-Encoding says so"
            )
            raise ApiError("invalid_request", f"the body {what}")
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise ApiError("invalid_request", f"the body's gzip has more than {MAX_MEMBERS} members")
        self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
