"""Loose images, and images that a list or a Parquet column names: one object, one row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.inputs.rows import Input, Reading, Row
from siglip.images.decode import ImageRejected, readable_suffixes
from storage.schemes import open_store
from storage.store import Changed, InvalidUri, NotFound, StoreError, Unreachable

_AHEAD = 32
"""Objects asked for at once: a store that answers after 30 ms gives 267 a second at most to one that asks for 8."""
_AHEAD_BYTES = 64 * 2**20
_UNKNOWN_BYTES = 2 * 2**20
"""What an object from a list is taken for, whose size nobody has asked for yet."""


def recognizes(name: str) -> bool:
    """Whether an object of this lower-case name is a loose image."""
    return "." in name and name.rpartition(".")[2] in readable_suffixes()


def fetch_images(planned: Iterable[Input], reading: Reading) -> Iterator[Row]:
    """One row for each input, in order, fetched ahead as far as a bound in objects and one in bytes.

    Raises `StoreError` when a planned object cannot be read, or when the store does not answer for one from a list.
    """
    ahead: deque[tuple[int, Future[Row]]] = deque()
    held = 0
    with ThreadPoolExecutor(_AHEAD) as pool:
        for item in planned:
            size = item.size if item.size >= 0 else _UNKNOWN_BYTES
            while ahead and (len(ahead) >= _AHEAD or held + size > _AHEAD_BYTES):
                held -= ahead[0][0]
                yield ahead.popleft()[1].result()
            ahead.append((size, pool.submit(_fetch, item, reading)))
            held += size
        while ahead:
            yield ahead.popleft()[1].result()


def _fetch(planned: Input, reading: Reading) -> Row:
    row = Row(planned.key, planned.uri, metadata=planned.metadata)
    try:
        size, etag = planned.size, planned.etag
        if planned.kind == "uri":
            entry = open_store(planned.uri, reading.store).stat(planned.uri)
            if entry is None:
                raise NotFound(f"{planned.uri}: no such object")
            size, etag = entry.size, entry.etag
        if size > reading.max_bytes:
            row.rejected = ImageRejected("too_many_bytes", f"{size} bytes, over {reading.max_bytes}")
        else:
            row.data = open_store(planned.uri, reading.store).read(planned.uri, 0, size, etag) if size else b""
    except StoreError as error:
        if planned.kind == "uri":
            row.rejected = _judge_listed(error)
        else:
            row.rejected = reading.lose(planned, error).rejected
    return row


def _judge_listed(error: StoreError) -> ImageRejected:
    """A name in somebody's list may be anything: what is not there, or can never be, is said of that image.

    Raises `error` when it says something of the store instead.
    """
    if isinstance(error, NotFound):
        return ImageRejected("missing", str(error))
    if isinstance(error, InvalidUri):
        return ImageRejected("unreadable", str(error))
    if isinstance(error, Changed):  # while it was read: of a name in a list no version was planned
        raise Unreachable(str(error)) from error
    raise error
