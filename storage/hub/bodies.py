"""The body of a response to a ranged request: exactly the bytes that were asked for, or an error.

A server that ignores the range sends the whole file, of which the range is taken. One that sends another range, too few
bytes, or a compressed body must not give wrong bytes.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

from storage.hub.client import READ_SECONDS
from storage.store import Unreachable, show

if TYPE_CHECKING:
    import httpx2

SLOWEST = 1024
"""Bytes a second. A body that arrives at less over `READ_SECONDS` is given up."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Body(NamedTuple):
    """Bytes of a file, and its `total` size. `confirmed` says whether two responses said the same size."""

    data: bytes
    total: int
    confirmed: bool


def receive(uri: str, response: httpx2.Response, start: int, stop: int | None, size: int | None) -> Body:
    """Read bytes [start, stop) of a file from a response. `size` is the file's size by another response, if known.

    Fewer bytes are returned only where the file ends. Raises `Unreachable`.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding not in ("", "identity"):
        raise Unreachable(f"{show(uri)}: the response is in {show(encoding)}, which was not asked for")
    named = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code == 206 and named and int(named[1]) == start:
        total, end, skip = int(named[3]), int(named[2]) + 1, 0
    elif response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Unreachable(f"{show(uri)}: the response does not say how long the file is")
        total, end, skip = int(length), int(length), start
    else:
        given = response.headers.get("Content-Range", "no range")
        raise Unreachable(f"{show(uri)}: the response is of status {response.status_code} with {show(given)}")
    if size is not None and total != size:
        raise Unreachable(f"{show(uri)}: one response says {size} bytes, another {total}")
    wanted = max(0, (total if stop is None else min(stop, total)) - start)
    data = _receive(uri, response, skip, wanted)
    if wanted and (end < start + wanted or len(data) < wanted):
        raise Unreachable(f"{show(uri)}: the response ended after {len(data)} of {wanted} bytes")
    return Body(bytes(data[:wanted]), total, size is not None)


def _receive(uri: str, response: httpx2.Response, skip: int, wanted: int) -> bytearray:
    """Read `wanted` bytes of a body, or all that there are, after skipping `skip` bytes."""
    data = bytearray()
    mark, marked, seen = time.monotonic(), 0, 0
    for piece in response.iter_raw():
        seen += len(piece)
        data += piece[skip:]
        skip = max(0, skip - len(piece))
        if len(data) >= wanted and not skip:
            break
        now = time.monotonic()
        if now - mark > READ_SECONDS:
            if seen - marked < SLOWEST * READ_SECONDS:
                raise Unreachable(f"{show(uri)}: the response has less than {SLOWEST} bytes a second")
            mark, marked = now, seen
    return data
