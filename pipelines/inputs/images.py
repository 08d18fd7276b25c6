"""Single images: loose files, and images that a list or a Parquet column names. Each is one object and one row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.inputs.rows import Input, Reading, Row
from siglip.images.decode import ImageRejected, readable_suffixes
from storage.schemes import is_web, open_store
from storage.store import Changed, InvalidUri, NotFound, StoreError, Unreachable, show

_AHEAD = 32
"""Objects fetched at the same time. From a store with 30 ms latency, 8 at a time would be at most 267 a second."""
_AHEAD_BYTES = 64 * 2**20
"""The most bytes that are fetched ahead."""
_UNKNOWN_BYTES = 2 * 2**20
"""The assumed size of an object named in a list, whose size is not known before it is fetched."""

Fetched = bytes | ImageRejected
"""What a fetch gives: the bytes of an object, or why there are none."""


def recognizes(name: str) -> bool:
    """Tell whether an object is a loose image, by its lower-case name."""
    return "." in name and name.rpartition(".")[2] in readable_suffixes()


def fetch_images(planned: Iterable[Input], reading: Reading) -> Iterator[Row]:
    """Yield one row for each input, in order. Fetches objects ahead, up to a number of objects and of bytes.

    Rows of lists that name the same object and are near each other share one fetch, and the same bytes. Raises
    `StoreError` if a planned object cannot be read, or if the store does not answer for an object of a list.
    """
    ahead: deque[tuple[int, Input, Future[Fetched]]] = deque()
    held = 0
    with ThreadPoolExecutor(_AHEAD) as pool:

        def take_first() -> Row:
            nonlocal held
            size, item, future = ahead.popleft()
            held -= size
            found = future.result()
            row = Row(item.key, item.uri, metadata=item.metadata)
            row.data, row.rejected = (None, found) if isinstance(found, ImageRejected) else (found, None)
            return row

        for item in planned:
            same = next(
                (f for _, other, f in ahead if item.kind == other.kind == "uri" and item.uri == other.uri), None
            )
            size = 0 if same else item.size if item.size >= 0 else _UNKNOWN_BYTES
            while ahead and (len(ahead) >= _AHEAD or held + size > _AHEAD_BYTES):
                yield take_first()
            ahead.append((size, item, same or pool.submit(_fetch, item, reading)))
            held += size
        while ahead:
            yield take_first()


def _fetch(planned: Input, reading: Reading) -> Fetched:
    try:
        size, etag = planned.size, planned.etag
        if not planned.uri:
            return ImageRejected("missing", "the row of the list has no URI")
        if is_web(planned.uri):
            return ImageRejected(
                "unreadable", "an http(s) URL in a Parquet file that has other values too: write a list"
            )
        if planned.kind == "uri":
            entry = open_store(planned.uri, reading.store).stat(planned.uri)
            if entry is None:
                raise NotFound(f"{planned.uri}: no such file or object")
            size, etag = entry.size, entry.etag
        if size > reading.max_bytes:
            return ImageRejected("too_many_bytes", f"{size} bytes, over {reading.max_bytes}")
        return open_store(planned.uri, reading.store).read(planned.uri, 0, size, etag) if size else b""
    except StoreError as error:
        if planned.kind == "uri":
            return _reject_listed(error, planned.uri)
        rejected = reading.reject_or_raise(planned, error).rejected
        return rejected or ImageRejected("missing", str(error))


def _reject_listed(error: StoreError, uri: str) -> ImageRejected:
    """Return the rejection of an image named in a list that does not exist or whose URI is invalid.

    Raises `error` if it is trouble of the store instead of a wrong name.
    """
    if isinstance(error, NotFound):
        blanks = any(part != part.strip() for part in uri.split("/"))
        note = f"; blanks belong to a name, and this one is {show(repr(uri))}" if blanks else ""
        return ImageRejected("missing", f"{error}{note}")
    if isinstance(error, InvalidUri):
        return ImageRejected("unreadable", str(error))
    if isinstance(error, Changed):  # it changed while it was read; the plan has no version of it to compare with
        raise Unreachable(str(error)) from error
    raise error
