"""Loose images, and images that a list or a Parquet column names: one object, one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from pipelines.rows import Input, Reading, Row
from siglip.images import ImageRejected, readable_suffixes
from storage.store import Changed, InvalidUri, NotFound, StoreError, Unreachable, open_store

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 8


def recognizes(name: str) -> bool:
    """Whether an object of this lower-case name is a loose image."""
    return "." in name and name.rpartition(".")[2] in readable_suffixes()


def fetch_images(planned: Iterable[Input], reading: Reading) -> Iterator[Row]:
    """One row for each input, in order, a few fetched ahead.

    Raises `StoreError` when a planned object cannot be read, or when the store does not answer for one from a list.
    """
    with ThreadPoolExecutor(_AHEAD) as pool:
        yield from map_ahead(pool, lambda item: _fetch(item, reading), planned, _AHEAD)


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`pool.map` that reads its input and holds results only a few ahead."""
    source = iter(items)
    pending = [pool.submit(function, item) for item in islice(source, ahead)]
    while pending:
        yield pending.pop(0).result()
        pending.extend(pool.submit(function, item) for item in islice(source, 1))


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
