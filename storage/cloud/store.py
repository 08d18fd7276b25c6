"""The store for Google Cloud Storage and Azure Blob Storage.

obstore sends each request once. The retries are made here, as for S3, so that a conditional write knows which attempts
were its own. There are `StoreOptions.attempts` attempts at each operation and each page of a listing, with pauses
between them that double. An attempt ends after `CONNECT_SECONDS` without a connection, after `READ_SECONDS` without a
byte, and after `REQUEST_SECONDS` in all.

Credentials, the account and an emulator's address come from the environment variables that obstore reads, on each
machine that reads or writes: `GOOGLE_*` and `AZURE_*`. `StoreOptions.endpoint` and `region` are for S3 only.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, Literal

from storage.cloud.errors import PastTheEnd, translate_errors
from storage.cloud.names import split_object, split_prefix
from storage.links import LinkedFolders
from storage.retry import pause, retry
from storage.store import Changed, Entry, NotFound, StoreError, StoreOptions, Unreachable, join, show

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
REQUEST_SECONDS = 600.0
_PAGE = 1000
_PART_BYTES = 16 * 2**20
"""Objects that are larger are uploaded in parts of this size. They appear when all parts are there."""
_ADDRESSES = {
    "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BASE_URL"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_CONNECTION_STRING"),
}


class CloudStore:
    """Objects in Google Cloud Storage or in Azure Blob Storage. Threads may share it.

    See `storage.store.Store` for the methods. A listing is in parts, each of which is asked for again if it fails.
    """

    def __init__(self, scheme: Literal["gs", "az"], options: StoreOptions) -> None:
        self._scheme = scheme
        self._attempts = options.attempts
        self._buckets: dict[str, Any] = {}
        self._opening = threading.Lock()

    def list(
        self,
        prefix: str,
        unreadable: Callable[[str, StoreError], None] | None = None,
        links: LinkedFolders | None = None,
    ) -> Iterator[Entry]:
        import obstore

        bucket, key = split_prefix(prefix)
        root = f"{self._scheme}://{bucket}/"
        last, attempt = None, 0
        while True:
            try:
                with translate_errors(prefix):
                    pages = obstore.list(self._bucket(bucket), key or None, offset=last, chunk_size=_PAGE)
                    for page in pages:
                        for meta in page:
                            yield _make_entry(root + meta["path"], meta)
                        last, attempt = page[-1]["path"] if page else last, 0
                return
            except Unreachable:
                attempt += 1
                if attempt >= self._attempts:
                    raise
            pause(attempt - 1)

    def names(self, folder: str, start: str = "") -> Iterator[str]:
        import obstore

        bucket, key = split_prefix(folder)
        if "/" in start:
            return
        found = self._retry(join(folder, start), lambda: obstore.list_with_delimiter(self._bucket(bucket), key or None))
        first = len(key) + 1 if key else 0
        for meta in found["objects"]:
            name = meta["path"][first:]
            if name and name.startswith(start):
                yield name

    def stat(self, uri: str) -> Entry | None:
        import obstore

        bucket, key = split_prefix(uri)
        if not key or uri.endswith("/"):
            return None
        try:
            return _make_entry(uri, self._retry(uri, lambda: obstore.head(self._bucket(bucket), key)))
        except NotFound:
            return None

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        bucket, key = split_object(uri)
        if stop is not None and stop <= start:
            return b""
        data: bytes = self._retry(uri, lambda: self._read(uri, bucket, key, start, stop, etag))
        return data

    def _read(self, uri: str, bucket: str, key: str, start: int, stop: int | None, etag: str | None) -> bytes:
        """Read a range with one request. Raises `Unreachable` when the response does not have all of it."""
        import obstore

        # Always a range, because only its response has the object's size as well as the length of the body.
        options: Any = {"range": {"offset": start} if stop is None else (start, stop)}
        if etag:  # of an object whose size alone is known it is empty
            options["if_match"] = f'"{etag}"'
        try:
            with translate_errors(uri):
                response = obstore.get(self._bucket(bucket), key, options=options)
                size, given = response.meta["size"], tuple(response.range)
                data = bytes(response.bytes())
        except PastTheEnd:
            self._confirm(uri, start, None, etag)
            return b""
        end = size if stop is None else min(stop, size)
        if given != (start, end) or len(data) != end - start:
            raise Unreachable(f"{show(uri)}: the response has {len(data)} bytes at {given}, not those asked for")
        if stop is not None and size < stop:
            self._confirm(uri, start, size, _strip(response.meta["e_tag"]))
        return data

    def _confirm(self, uri: str, start: int, size: int | None, etag: str | None) -> None:
        """Check with a second request that the object really ends before the requested range does, as `S3Store` does.

        `size` is the object's size by the first response, or None if that only said that it has no byte at `start`.
        """
        entry = self.stat(uri)
        if entry is None:
            raise NotFound(f"{show(uri)}: no such object")
        if etag and entry.etag != etag:
            raise Changed(f"{show(uri)} changed while it was read")
        if entry.size > start if size is None else entry.size != size:
            raise Unreachable(f"{show(uri)}: one response ends it early, another says {entry.size} bytes")

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        import obstore

        bucket, key = split_object(uri)
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        size = file.seek(0, os.SEEK_END)
        parts = size > _PART_BYTES

        def once() -> Any:
            file.seek(0)
            whole = file if parts else file.read()
            return obstore.put(self._bucket(bucket), key, whole, use_multipart=parts, chunk_size=_PART_BYTES)

        response = self._retry(uri, once)
        if not parts and response["e_tag"]:
            return Entry(uri, size, _strip(response["e_tag"]))
        stored = self.stat(uri)
        if stored is None or stored.size != size:
            raise Unreachable(f"{show(uri)}: the store responds that the upload is complete, and it is not there")
        return stored

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        bucket, key = split_object(uri)

        def once() -> bool:
            with contextlib.suppress(AlreadyExistsError):
                obstore.put(self._bucket(bucket), key, data, mode="create", use_multipart=False)
                return True
            return False

        for attempt in range(self._attempts):
            with contextlib.suppress(Changed):
                if self._retry(uri, once):
                    return True
            # It exists: perhaps an earlier attempt of this call was done, and its response lost.
            try:
                return self.read(uri) == data
            except NotFound:  # refused although there is no object, or it was removed since
                pause(attempt)
        raise Unreachable(f"{show(uri)}: the store responds that it exists, and then that it does not")

    def delete(self, uri: str) -> None:
        import obstore

        bucket, key = split_object(uri)
        with contextlib.suppress(NotFound):
            self._retry(uri, lambda: obstore.delete(self._bucket(bucket), key))

    def _retry(self, uri: str, once: Callable[[], Any]) -> Any:
        def translated() -> Any:
            with translate_errors(uri):
                return once()

        return retry(translated, self._attempts)

    def _bucket(self, name: str) -> Any:
        """obstore's client for a bucket or container: one for each."""
        with self._opening:
            if name not in self._buckets:
                self._buckets[name] = self._connect(name)
            return self._buckets[name]

    def _connect(self, name: str) -> Any:
        from obstore.store import AzureStore, GCSStore

        options: dict[str, Any] = {
            "client_options": {
                "connect_timeout": f"{CONNECT_SECONDS}s",
                "read_timeout": f"{READ_SECONDS}s",
                "timeout": f"{REQUEST_SECONDS}s",
                "allow_http": allows_http(self._scheme),
            },
            "retry_config": {"max_retries": 0},
        }
        return GCSStore(name, **options) if self._scheme == "gs" else AzureStore(name, **options)


def allows_http(scheme: str) -> bool:
    """Tell whether the environment names an address without TLS, as those of emulators are."""
    return any("http://" in os.environ.get(variable, "") for variable in _ADDRESSES[scheme])


def _make_entry(uri: str, meta: Any) -> Entry:
    return Entry(uri, meta["size"], _strip(meta["e_tag"]))


def _strip(etag: str | None) -> str:
    """An ETag without its quotes, which some responses of one server have and others have not."""
    return (etag or "").strip('"')


_stores: dict[tuple[str, StoreOptions], CloudStore] = {}
_opening = threading.Lock()


def open_cloud(scheme: Literal["gs", "az"], options: StoreOptions) -> CloudStore:
    """The store for a scheme and these options: one in each process, which all threads share.

    Raises `StoreError` if obstore is not installed.
    """
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise StoreError(f"{scheme}:// needs obstore: pip install 'sightline[cloud]'") from None
    with _opening:
        if (scheme, options) not in _stores:
            _stores[scheme, options] = CloudStore(scheme, options)
        return _stores[scheme, options]
