"""Stored objects as Python file objects, with ranged reads and read-ahead."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from storage.store import Changed, Entry, NotFound, Store, show

READ_BYTES = 8 * 2**20
"""Largest ranged read of a `StoreFile`. With 8 MB the 30 ms until S3 responds are a small part of the transfer."""
LEAST_BYTES = 64 * 2**10
"""Smallest ranged read. S3 takes as long for fewer bytes. pyarrow first reads this much of a Parquet file's footer."""
SPOOLED_BYTES = 64 * 2**20
"""Files up to this size are held in memory while they are written or downloaded, larger ones on the local disk."""
_THREADS = 4
_AHEAD = 16
"""Objects that `read_ahead` reads at the same time."""


@dataclass(frozen=True)
class Download:
    """A downloaded object: a seekable `file` at its beginning, its `size` in bytes and its hex `sha256`."""

    file: IO[bytes]
    size: int
    sha256: str


def read_ahead(store: Store, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """Read whole objects, given by their listed entries, and yield them with their content, in order.

    Up to `_AHEAD` objects are read at the same time, together of about `SPOOLED_BYTES`: for many small files.
    """
    waiting: deque[tuple[Entry, Future[bytes]]] = deque()
    held = 0
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for entry in entries:
                while waiting and (len(waiting) >= _AHEAD or held + entry.size > SPOOLED_BYTES):
                    first, future = waiting.popleft()
                    yield first, future.result()
                    held -= first.size
                waiting.append((entry, pool.submit(store.read, entry.uri)))
                held += entry.size
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def download(store: Store, uri: str) -> Iterator[Download]:
    """Download an object for the length of a `with` block: to memory if it is small, else to the local disk.

    Raises `NotFound` if there is none, and the store's other errors.
    """
    entry = store.stat(uri)
    if entry is None:
        raise NotFound(f"{show(uri)}: no such object")
    digest = hashlib.sha256()
    with tempfile.SpooledTemporaryFile(SPOOLED_BYTES) as spool:
        with StoreFile(store, entry) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                spool.write(piece)
        spool.seek(0)
        yield Download(spool, entry.size, digest.hexdigest())


class StoreFile(io.RawIOBase):
    """A stored object as a seekable file for reading. All bytes are of the version that `entry` names by its ETag.

    A read returns all requested bytes, up to the end of the object. A read of more than `chunk_bytes` is fetched in
    several ranges, a few at a time. For sequential reads the ranges grow with the number of bytes already read, up to
    `chunk_bytes`, and the next range is fetched ahead in the background, so a tar is streamed. Read-ahead never wastes
    much more than the number of bytes that were requested, also for random access (Parquet).

    Wrap it in `io.BufferedReader` for small reads. One thread may use it at a time. Raises the store's errors, and
    `Changed` when the object is shorter than its entry says.
    """

    def __init__(self, store: Store, entry: Entry, chunk_bytes: int = READ_BYTES) -> None:
        super().__init__()
        if entry.size < 0:
            raise NotFound(f"{show(entry.uri)} is not a file that can be read")
        self._chunk_bytes = chunk_bytes
        self._store = store
        self._entry = entry
        self._position = 0
        self._run = 0  # where the current sequential read began; `_chunk` is its latest range
        self._start, self._chunk = 0, b""
        self._ahead: tuple[int, int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(_THREADS)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}
        if whence not in bases:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        if bases[whence] + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = bases[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._entry.size - self._position)
        buffer = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(buffer)
        return bytes(buffer)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        if self.closed:
            raise ValueError("read of a closed file")
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._entry.size - self._position)]
        count = len(view)
        while view:
            taken = self._take(view) or self._fetch(view)
            self._position += taken
            view = view[taken:]
        return count

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._chunk, self._ahead = b"", None
        super().close()

    def _take(self, view: memoryview) -> int:
        """Copy bytes at the position that are already in memory, and return their number, which may be 0."""
        if self._ahead and self._ahead[0] <= self._position < self._ahead[1]:
            self._start, end, future = self._ahead
            self._ahead, self._chunk = None, b""
            self._chunk = future.result()
            self._read_ahead(end)
        if not self._start <= self._position < self._start + len(self._chunk):
            return 0
        offset = self._position - self._start
        part = memoryview(self._chunk)[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def _fetch(self, view: memoryview) -> int:
        """Fetch the requested bytes; in a sequential read also half as many more as were read so far."""
        begin = self._position
        if begin != self._start + len(self._chunk):
            self._run = begin
        if self._ahead:
            self._ahead[2].cancel()
            self._ahead = None
        if len(view) >= self._chunk_bytes:
            return self._fetch_large(view)
        length = max(len(view), min((begin - self._run) // 2, self._chunk_bytes), min(LEAST_BYTES, self._chunk_bytes))
        end = min(begin + length, self._entry.size)
        self._start, self._chunk = begin, self._range(begin, end)
        if begin > self._run:
            self._read_ahead(end)
        return self._take(view)

    def _fetch_large(self, view: memoryview) -> int:
        """Fill the view from ranges, `_THREADS` at a time. No more than that are in memory besides the view."""
        begin, end = self._position, self._position + len(view)
        starts = deque(range(begin, end, self._chunk_bytes))
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        while starts or waiting:
            if starts and len(waiting) < _THREADS:
                start = starts.popleft()
                waiting.append((start, self._pool.submit(self._range, start, min(start + self._chunk_bytes, end))))
                continue
            start, future = waiting.popleft()
            data = future.result()
            view[start - begin : start - begin + len(data)] = data
        # The caller of such a large read knows what it needs, so no read-ahead is derived from it.
        self._run = self._start = end
        self._chunk = b""
        return len(view)

    def _read_ahead(self, begin: int) -> None:
        """Start fetching the next range in the background."""
        end = min(begin + min(max((begin - self._run) // 2, LEAST_BYTES), self._chunk_bytes), self._entry.size)
        if begin < end:
            self._ahead = (begin, end, self._pool.submit(self._range, begin, end))

    def _range(self, start: int, stop: int) -> bytes:
        data = self._store.read(self._entry.uri, start, stop, self._entry.etag or None)
        if len(data) != stop - start:
            raise Changed(f"{show(self._entry.uri)} ends before its {self._entry.size} bytes")
        return data
