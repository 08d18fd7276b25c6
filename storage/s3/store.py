"""The store for S3 and for other servers with its protocol.

botocore sends each request once. The retries are made here, so that they are the same for a request and for a body
that breaks off, and so that a conditional write knows which attempts were its own. The limits of an operation:

* An attempt ends after `CONNECT_SECONDS` without a connection, after `READ_SECONDS` without a byte, and when a body
  arrives at less than `SLOWEST` bytes/s over `READ_SECONDS`.
* There are `StoreOptions.attempts` attempts in all, with pauses between them that double: about 8 s together for 5
  attempts, and 64 s for 8.
* A body that breaks off is continued where it ended, from the same ETag, so a slow store does not lose progress.

With 5 attempts a store that does not respond takes 5 x 30 s + 8 s, under three minutes, for each operation and for each
page of a listing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import IO, Any, TypeVar

from storage.links import LinkedFolders
from storage.retry import pause, retry
from storage.s3.errors import PastTheEnd, translate_errors
from storage.s3.listing import list_pages
from storage.s3.names import split_object, split_prefix
from storage.s3.pages import Page, request_page, watch_pages
from storage.s3.uploads import UPLOAD_BYTES, upload_parts
from storage.store import Changed, Entry, NotFound, StoreError, StoreOptions, Unreachable, join, show

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
SLOWEST = 10_000
"""Slowest accepted transfer of a body, bytes/s."""
_PIECE = 256 << 10

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

T = TypeVar("T")


class S3Store:
    """Objects in S3, or in another server with its protocol and its conditional writes. Threads may share it.

    See `storage.store.Store` for the methods. Raises `StoreError` when no client can be made from the options and the
    environment.
    """

    def __init__(self, options: StoreOptions) -> None:
        import boto3
        from botocore.config import Config

        self._endpoint = options.endpoint or "AWS"
        self._attempts = options.attempts
        with self._translate(f"S3 at {self._endpoint}"):
            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=options.endpoint,
                region_name=options.region,
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"mode": "standard", "total_max_attempts": 1},
                    max_pool_connections=32,
                    # Servers other than AWS often support neither the newer checksums nor their trailers.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        watch_pages(self._client)

    def list(
        self,
        prefix: str,
        unreadable: Callable[[str, StoreError], None] | None = None,
        links: LinkedFolders | None = None,
    ) -> Iterator[Entry]:
        bucket, key = split_prefix(prefix)
        key = f"{key}/" if key and not key.endswith("/") else key
        root = f"s3://{bucket}/"
        for page in list_pages(partial(self._page, prefix), bucket, key):
            entries = map(Entry, [root + name for name in page.keys], page.sizes, page.etags)
            if any(map(str.endswith, page.keys, repeat("/"))):
                # Consoles create an empty object to show a folder.
                yield from (entry for entry in entries if entry.size or not entry.uri.endswith("/"))
            else:
                yield from entries

    def names(self, folder: str, start: str = "") -> Iterator[str]:
        bucket, key = split_prefix(folder)
        key = f"{key}/" if key and not key.endswith("/") else key
        if "/" in start:
            return
        split_prefix(f"s3://{bucket}/{key}{start}")
        arguments = {"Bucket": bucket, "Prefix": key + start, "Delimiter": "/"}
        while True:
            page = self._page(join(folder, start), arguments)
            # The folder's own object has no name in it.
            yield from (name[len(key) :] for name in page.keys if len(name) > len(key))
            if page.token is None:
                return
            arguments["ContinuationToken"] = page.token

    def stat(self, uri: str) -> Entry | None:
        bucket, key = split_prefix(uri)
        if not key or key.endswith("/"):
            return None
        try:
            head = self._retry(uri, lambda: self._client.head_object(Bucket=bucket, Key=key))
        except NotFound:
            return None
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        bucket, key = split_object(uri)
        if stop is not None and stop <= start:
            return b""
        body = _RangeRead(self, uri, bucket, key, start, stop, etag)
        return self._retry(uri, body.fetch)

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        bucket, key = split_object(uri)
        size = len(data) if isinstance(data, bytes) else data.seek(0, os.SEEK_END)
        if size > UPLOAD_BYTES:
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            upload_parts(self._client, partial(self._retry, uri), bucket, key, file, size)
            stored = self.stat(uri)
            if stored is None or stored.size != size:
                raise Unreachable(f"{show(uri)}: S3 responds that the upload is complete, and the object is not there")
            return stored

        def once() -> Any:
            if not isinstance(data, bytes):
                data.seek(0)
            return self._client.put_object(Bucket=bucket, Key=key, Body=data)

        response = self._retry(uri, once)
        return Entry(uri, size, response["ETag"].strip('"'))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = split_object(uri)

        for attempt in range(self._attempts):
            try:
                self._retry(uri, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))
                return True
            except Changed:  # 412: perhaps an earlier attempt of this call was done, and its response lost
                try:
                    return self.read(uri) == data
                except NotFound:  # refused although there is no object, or it was removed since
                    pause(attempt)
        raise Unreachable(f"{show(uri)}: S3 responds that it exists, and then that it does not")

    def delete(self, uri: str) -> None:
        bucket, key = split_object(uri)
        with contextlib.suppress(NotFound):
            self._retry(uri, lambda: self._client.delete_object(Bucket=bucket, Key=key))

    def _page(self, uri: str, arguments: dict[str, Any]) -> Page:
        """A page of a listing. `uri` is for the messages of errors."""
        return self._retry(uri, lambda: request_page(self._client, uri, arguments))

    def _retry(self, uri: str, once: Callable[[], T]) -> T:
        def translated() -> T:
            with self._translate(uri):
                return once()

        return retry(translated, self._attempts)

    def _translate(self, uri: str) -> contextlib.AbstractContextManager[None]:
        return translate_errors(uri, self._endpoint)


class _RangeRead:
    """One ranged read. Each `fetch` continues where the last one broke off, on the same version of the object."""

    def __init__(
        self, store: S3Store, uri: str, bucket: str, key: str, start: int, stop: int | None, etag: str | None
    ) -> None:
        self._store, self._uri, self._start, self._stop, self._etag = store, uri, start, stop, etag
        self._object = {"Bucket": bucket, "Key": key}
        self._pinned = etag
        self._got = bytearray()
        self._wanted: int | None = None

    def fetch(self) -> bytes:
        """All requested bytes. Raises `Unreachable` when a response was cut short: then call it again."""
        try:
            return self._fetch()
        except PastTheEnd:
            if self._got:
                raise
            self._confirm(None)
            return b""
        except Changed:
            if self._etag is None and self._pinned:  # replaced between two attempts; the caller accepts any version
                self._got.clear()
                self._pinned = self._wanted = None
                raise Unreachable(f"{show(self._uri)} is being replaced") from None
            raise

    def _fetch(self) -> bytes:
        begin = self._start + len(self._got)
        if self._wanted is not None and begin >= self._wanted:  # the connection broke after the last byte
            return bytes(self._got)
        # Always a range, because only its response has the object's size as well as the length of the body.
        arguments = {**self._object, "Range": f"bytes={begin}-{'' if self._stop is None else self._stop - 1}"}
        if self._pinned:
            arguments["IfMatch"] = f'"{self._pinned}"'
        with self._store._translate(self._uri):
            response = self._store._client.get_object(**arguments)
        self._pinned = self._pinned or response["ETag"].strip('"')
        named = _RANGE.fullmatch(response.get("ContentRange", ""))
        if "ContentRange" not in response:  # the server ignored the range and sends the whole object
            self._got.clear()
            size, end, skip = response["ContentLength"], response["ContentLength"], self._start
        elif named and int(named[1]) == begin:
            size, end, skip = int(named[3]), int(named[2]) + 1, 0
        else:
            response["Body"].close()
            raise Unreachable(f"{show(self._uri)}: S3 responded with another range: {response['ContentRange']}")
        self._wanted = wanted = size if self._stop is None else min(self._stop, size)
        self._receive(response["Body"], skip)
        if end < wanted or self._start + len(self._got) < wanted:
            raise Unreachable(f"{show(self._uri)}: the response ended after {len(self._got)} bytes")
        if named is None or (self._stop is not None and size < self._stop):
            self._confirm(size)
        del self._got[wanted - self._start :]
        return bytes(self._got)

    def _receive(self, body: Any, skip: int) -> None:
        mark, marked = time.monotonic(), len(self._got)
        with body as raw:
            while piece := raw.read1(_PIECE):
                self._got += piece[skip:]
                skip = max(0, skip - len(piece))
                now = time.monotonic()
                if now - mark > READ_SECONDS:
                    if len(self._got) - marked < SLOWEST * READ_SECONDS:
                        raise Unreachable(f"{show(self._uri)}: S3 sends less than {SLOWEST} bytes a second")
                    mark, marked = now, len(self._got)

    def _confirm(self, size: int | None) -> None:
        """Check with a second request that the object really ends before the requested range does.

        A wrong response must not shorten the data. `size` is the object's size by the first response, or None when
        that only said that the object has no byte at `start`.
        """
        head = self._store._client.head_object(**self._object)
        if self._pinned and head["ETag"].strip('"') != self._pinned:
            raise Changed(f"{show(self._uri)} changed while it was read")
        if head["ContentLength"] > self._start if size is None else head["ContentLength"] != size:
            raise Unreachable(
                f"{show(self._uri)}: one response ends it early, another says {head['ContentLength']} bytes"
            )


_stores: dict[StoreOptions, S3Store] = {}
_opening = threading.Lock()


def open_s3(options: StoreOptions) -> S3Store:
    """The store for these options: one in each process, which all threads share."""
    with _opening:
        if options not in _stores:
            _stores[options] = S3Store(options)
        return _stores[options]
