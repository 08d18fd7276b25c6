"""Larger pictures of a sample's images: the originals, read where they were read for tagging, as JPEGs for the page."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from threading import Lock
from typing import Any

import pyarrow as pa

from pipelines.config import ParquetConfig
from pipelines.inputs.formats import Archive, archive_of
from pipelines.inputs.rows import Input, Reading, Skipped
from siglip.config import ImageSpec, Limits
from siglip.images.decode import ImageRejected
from siglip.images.decoder import Decoder
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions, show

SIDE = 1280
"""The longer side of a picture, in pixels. Smaller originals are not enlarged."""
CACHE_BYTES = 256 * 2**20
"""The most bytes of pictures that are kept. A picture has about 200 KB."""
SCAN_BYTES = 4 * 2**30
"""The most bytes of images that are read from an archive to find those of the sample."""
LIMITS = Limits()
"""The job's default limits of an image. A larger one has no picture, only its thumbnail."""
_AHEAD = 400
"""The most images that are kept from one pass over an archive: those of the questions that come next."""
_READERS = 2


class NoPicture(Exception):
    """There is no larger picture of an image. The message says why, for people."""


class Originals:
    """Reads the originals of a sample's images, and decodes them as the job does, in a process of its own.

    `sample` has the columns source and sha256. A picture is made only of bytes with the digest that the output has, so
    it is never of another image or of another version of it. A source is an object, or a tar or Parquet file, which is
    read from its beginning until the images are found: the digests of the next questions are looked for in the same
    pass. What the job's settings named (`parquet.image_column`) is not known here; a file for which it is needed gives
    no pictures.

    `request` never waits. Threads may share this object. The decoder starts with the first picture.
    """

    def __init__(
        self, sample: pa.Table, options: StoreOptions, limits: Limits = LIMITS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._sources: list[str] = sample["source"].to_pylist()
        self._digests: list[str] = sample["sha256"].to_pylist()
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        for row, source in enumerate(self._sources):
            self._rows[source].append(row)
        self._options, self._limits = options, limits
        self._lock = Lock()
        self._cache_bytes, self._held = cache_bytes, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._waiting: dict[tuple[str, str], Future[bytes]] = {}  # by source and digest
        self._absent: dict[tuple[str, str], str] = {}  # what a pass over an archive did not find, and why
        self._readers = ThreadPoolExecutor(_READERS, "originals")
        self._scanner = ThreadPoolExecutor(1, "archives")  # one pass at a time: the next request may be in this one
        self._decoding = Lock()
        self._decoder = Decoder(ImageSpec(size=16), limits, "fast", SIDE)
        self._closed = False
        self._running = 0

    def request(self, row: int) -> Future[bytes]:
        """Return a future of the picture of a row's image: a JPEG with at most `SIDE` pixels at a side.

        The future raises `NoPicture` when the original cannot be read or decoded.
        """
        place = source, digest = self._sources[row], self._digests[row]
        future: Future[bytes] = Future()
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                future.set_result(self._kept[digest])
                return future
            if (waiting := self._waiting.get(place)) is not None:
                return waiting
            if place in self._absent:
                future.set_exception(NoPicture(self._absent[place]))
                return future
            if self._closed:
                future.set_exception(NoPicture("the review has ended"))
                return future
            self._waiting[place] = future
        archive = archive_of(source.lower())
        if archive is None:
            self._readers.submit(self._run, self._read_object, row)
        else:
            self._scanner.submit(self._run, self._scan_archive, row, archive)
        return future

    def stop(self) -> None:
        """Take no more requests, and end those that wait with `NoPicture`. Does not wait for reads on their way."""
        self._closed = True
        for pool in (self._readers, self._scanner):
            pool.shutdown(wait=False, cancel_futures=True)
        for source, digest in list(self._waiting):
            self._fail(source, digest, "the review has ended")

    def close(self) -> None:
        """Stop, and end the decoder's process."""
        self.stop()
        with self._decoding:
            self._decoder.close()

    @property
    def busy(self) -> bool:
        """Whether a read is on its way. It may take minutes, if the store does not answer."""
        return self._running > 0

    def _run(self, task: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._running += 1
        try:
            task(*arguments)
        finally:
            with self._lock:
                self._running -= 1

    def _read_object(self, row: int) -> None:
        uri, digest = self._sources[row], self._digests[row]
        try:
            store = open_store(uri, self._options)
            entry = store.stat(uri)
            if entry is None:
                raise NoPicture(f"{show(uri)} is not there")
            if entry.size > self._limits.max_bytes:
                raise NoPicture(f"{show(uri)} has {entry.size:,} bytes, over {self._limits.max_bytes:,}")
            data = store.read(uri, 0, entry.size, entry.etag)
            if hashlib.sha256(data).hexdigest() != digest:
                raise NoPicture(f"{show(uri)} is not the file that was tagged")
            self._keep(digest, self._decode(data))
        except (NoPicture, StoreError) as error:
            self._fail(uri, digest, str(error))
        except Exception as error:  # a fault here costs a picture, not the review
            self._fail(uri, digest, f"{type(error).__name__}: {error}")

    def _scan_archive(self, row: int, archive: Archive) -> None:
        source, digest = self._sources[row], self._digests[row]
        with self._lock:
            if (source, digest) not in self._waiting:  # an earlier pass has found it
                return
            wanted = self._next_digests(row)
        done = False
        try:
            whole = self._scan(source, archive, wanted)
            done = not self._closed
            why = f"the image is not in {show(source)}" if whole else f"the image is far behind in {show(source)}"
        except (StoreError, ConfigError) as error:
            why = str(error)
        except Exception as error:  # a fault here costs pictures, not the review
            why = f"{type(error).__name__}: {error}"
        with self._lock:
            if done:
                self._absent.update({(source, missing): why for missing in wanted})
        for missing in wanted:
            self._fail(source, missing, why)

    def _next_digests(self, row: int) -> set[str]:
        """Return the digests to look for in the row's archive: of the row itself, and of the next questions."""
        rows = self._rows[self._sources[row]]
        start = rows.index(row)
        found: dict[str, None] = {}
        for other in chain(rows[start:], rows[:start]):
            if len(found) == _AHEAD:
                break
            digest = self._digests[other]
            if digest not in self._kept and (self._sources[row], digest) not in self._absent:
                found[digest] = None
        return set(found)

    def _scan(self, source: str, archive: Archive, wanted: set[str]) -> bool:
        """Read an archive until all wanted digests are found, and remove from `wanted` what is found.

        Returns False if the archive was not read to its end, because it has more than `SCAN_BYTES` of images.
        """
        entry = open_store(source, self._options).stat(source)
        if entry is None:
            raise NoPicture(f"{show(source)} is not there")
        planned = Input(archive.KIND, source, source, entry.size, entry.etag)
        reading = Reading(self._options, self._limits.max_bytes, ParquetConfig())
        left = SCAN_BYTES
        for found in archive.read(planned, reading, Skipped()):
            if self._closed or left < 0:
                return False
            left -= len(found.data or b"")
            if found.data is None or found.sha256 not in wanted:
                continue
            wanted.discard(found.sha256)
            try:
                self._keep(found.sha256, self._decode(found.data))
            except NoPicture as error:
                self._fail(source, found.sha256, str(error))
            if not wanted:
                break
        return True

    def _decode(self, data: bytes) -> bytes:
        with self._decoding:
            if self._closed:
                raise NoPicture("the review has ended")
            try:
                [outcome] = self._decoder.decode([data])
            except (OSError, RuntimeError) as error:
                raise NoPicture(f"the decoder did not start: {error}") from error
        if isinstance(outcome, ImageRejected):
            raise NoPicture(str(outcome))
        return outcome.thumbnail or b""

    def _keep(self, digest: str, picture: bytes) -> None:
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = picture
                self._held += len(picture)
            while self._held > self._cache_bytes and self._kept:
                self._held -= len(self._kept.popitem(last=False)[1])
            places = [place for place in self._waiting if place[1] == digest]
            waiting = [self._waiting.pop(place) for place in places]
        for future in waiting:
            future.set_result(picture)

    def _fail(self, source: str, digest: str, why: str) -> None:
        with self._lock:
            waiting = self._waiting.pop((source, digest), None)
        if waiting is not None:
            waiting.set_exception(NoPicture(why))
