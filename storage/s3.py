"""S3, and what speaks its protocol.

botocore sends each request once; the retries are ours, so that they are the same for a request and for a body that
breaks off, and so that a conditional write knows which attempt was whose. How long an operation takes at most:

* `CONNECT_SECONDS` to connect and `READ_SECONDS` of silence end an attempt, and so does a body of which less than
  `SLOWEST` bytes/s arrive over `READ_SECONDS`;
* `ATTEMPTS` attempts in all, with pauses between them that double (about 8 s together);
* a body that breaks off is resumed where it ended, by the same ETag, so a slow store costs time, not work.

So with 5 attempts a dead store costs 5 x 30 s + 8 s, under three minutes, for each operation, and each page of a
listing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from storage.store import (
    ATTEMPTS,
    Changed,
    Entry,
    Forbidden,
    InvalidUri,
    NotFound,
    StoreError,
    StoreOptions,
    Unreachable,
    show,
)

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
SLOWEST = 10_000
PAUSE_SECONDS = 0.5
_PIECE = 256 << 10
_KEY_BYTES = 1024

_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}|arn:[\x21-\x7e]+")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
# Codes that mean "later" under whatever status; every other 5xx, 409 and 429 means it too.
_TRANSIENT = frozenset(("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"))
_INVALID = frozenset(("InvalidBucketName", "KeyTooLongError", "InvalidURI"))

T = TypeVar("T")


class S3Store:
    """S3 and what speaks its protocol, conditional writes included. Safe to share between threads.

    Raises `StoreError` where a client cannot be made of the options or of the environment.
    """

    def __init__(self, options: StoreOptions) -> None:
        import boto3
        from botocore.config import Config

        self._endpoint = options.endpoint or "AWS"
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
                    # Stores other than AWS often know neither the newer checksums nor their trailers.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    def list(self, prefix: str) -> Iterator[Entry]:
        bucket, key = _split(prefix)
        key = f"{key}/" if key and not key.endswith("/") else key
        # botocore asks for URL-encoded names and decodes them: XML cannot carry every character of a key.
        arguments = {"Bucket": bucket, "Prefix": key}
        while True:
            page = self._retry(prefix, lambda: self._page(prefix, arguments))
            for item in page.get("Contents", []):
                # Consoles create an empty object to show a folder.
                if not item["Key"].endswith("/") or item["Size"]:
                    yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, uri: str) -> Entry | None:
        bucket, key = _split(uri)
        if not key or key.endswith("/"):
            return None
        try:
            head = self._retry(uri, lambda: self._client.head_object(Bucket=bucket, Key=key))
        except NotFound:
            return None
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        bucket, key = _split_object(uri)
        if stop is not None and stop <= start:
            return b""
        body = _Body(self, uri, bucket, key, start, stop, etag)
        return self._retry(uri, body.fetch)

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        bucket, key = _split_object(uri)
        size = len(data) if isinstance(data, bytes) else data.seek(0, os.SEEK_END)

        def once() -> Any:
            if not isinstance(data, bytes):
                data.seek(0)
            return self._client.put_object(Bucket=bucket, Key=key, Body=data)

        answer = self._retry(uri, once)
        return Entry(uri, size, answer["ETag"].strip('"'))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = _split_object(uri)

        for attempt in range(ATTEMPTS):
            try:
                self._retry(uri, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))
                return True
            except Changed:  # 412: perhaps our own earlier attempt, whose answer was lost
                try:
                    return self.read(uri) == data
                except NotFound:  # refused though nothing is there, or removed since
                    _pause(attempt)
        raise Unreachable(f"{show(uri)}: S3 says that it exists, and that it does not")

    def delete(self, uri: str) -> None:
        bucket, key = _split_object(uri)
        with contextlib.suppress(NotFound):
            self._retry(uri, lambda: self._client.delete_object(Bucket=bucket, Key=key))

    def _page(self, prefix: str, arguments: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(**arguments)
        # An answer whose body was lost is parsed as an empty listing.
        if "IsTruncated" not in page or (page["IsTruncated"] and "NextContinuationToken" not in page):
            raise Unreachable(f"{show(prefix)}: S3 answered with less than a page of a listing")
        return page

    def _retry(self, uri: str, once: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                with self._translate(uri):
                    return once()
            except Unreachable:
                if attempt == ATTEMPTS - 1:
                    raise
            _pause(attempt)
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def _translate(self, uri: str) -> Iterator[None]:
        """Other people's errors as the store's, worded for the person who set the bucket and the credentials."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            raise _refusal(show(uri), error.response) from error
        except (BotoCoreError, ResponseParserError, HTTPError, OSError, ValueError) as error:
            raise self._failure(show(uri), error) from error

    def _failure(self, uri: str, error: Exception) -> StoreError:
        """What it means that no answer came, or no request went out."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        message = " ".join(str(error).split())
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError)):
            return Forbidden(f"{uri}: no S3 credentials: set AWS_ACCESS_KEY_ID or AWS_PROFILE, or use a role")
        if isinstance(error, (boto.ProfileNotFound, boto.CredentialRetrievalError)):
            return Forbidden(f"{uri}: {message}")
        if isinstance(error, (boto.ParamValidationError, boto.UnsupportedS3ArnError)):
            return InvalidUri(f"{uri}: S3 has no such name: {message}")
        if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)):
            return Unreachable(f"{uri}: cannot reach S3 at {self._endpoint}: check AWS_ENDPOINT_URL")
        if isinstance(error, boto.SSLError):
            return Unreachable(f"{uri}: no secure connection to S3 at {self._endpoint}: {message}")
        # `HTTPClientError` is botocore's for whatever happened on the connection.
        broken = (boto.HTTPClientError, ResponseParserError, boto.IncompleteReadError, HTTPError, OSError)
        if isinstance(error, broken):
            return Unreachable(f"{uri}: S3 at {self._endpoint} broke off or fell silent: {message}")
        return StoreError(f"{uri}: {message}")  # an endpoint that is no URL, a configuration file that cannot be read


class _Body:
    """One read. Each `fetch` goes on where the one before broke off, on the same version of the object."""

    def __init__(
        self, store: S3Store, uri: str, bucket: str, key: str, start: int, stop: int | None, etag: str | None
    ) -> None:
        self._store, self._uri, self._start, self._stop, self._etag = store, uri, start, stop, etag
        self._object = {"Bucket": bucket, "Key": key}
        self._pinned = etag
        self._got = bytearray()
        self._wanted: int | None = None

    def fetch(self) -> bytes:
        """All bytes that were asked for. Raises `Unreachable` where an answer was cut short."""
        try:
            return self._fetch()
        except _PastTheEnd:
            if self._got:
                raise
            self._confirm(None)
            return b""
        except Changed:
            if self._etag is None and self._pinned:  # replaced between two attempts, and any version will do
                self._got.clear()
                self._pinned = self._wanted = None
                raise Unreachable(f"{show(self._uri)} is being replaced") from None
            raise

    def _fetch(self) -> bytes:
        begin = self._start + len(self._got)
        if self._wanted is not None and begin >= self._wanted:  # the connection broke behind the last byte
            return bytes(self._got)
        # Always a range: only an answer to one names the object's size beside the length of its own body.
        arguments = {**self._object, "Range": f"bytes={begin}-{'' if self._stop is None else self._stop - 1}"}
        if self._pinned:
            arguments["IfMatch"] = f'"{self._pinned}"'
        with self._store._translate(self._uri):
            answer = self._store._client.get_object(**arguments)
        self._pinned = self._pinned or answer["ETag"].strip('"')
        named = _RANGE.fullmatch(answer.get("ContentRange", ""))
        if "ContentRange" not in answer:  # the range was ignored: this is the whole object
            self._got.clear()
            size, end, skip = answer["ContentLength"], answer["ContentLength"], self._start
        elif named and int(named[1]) == begin:
            size, end, skip = int(named[3]), int(named[2]) + 1, 0
        else:
            answer["Body"].close()
            raise Unreachable(f"{show(self._uri)}: S3 answered with another range: {answer['ContentRange']}")
        self._wanted = wanted = size if self._stop is None else min(self._stop, size)
        self._receive(answer["Body"], skip)
        if end < wanted or self._start + len(self._got) < wanted:
            raise Unreachable(f"{show(self._uri)}: the answer ended after {len(self._got)} bytes")
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
        """Ask whether the object really ends before what was asked for: an answer that lies must not shorten it.

        `size` is what the answer said that the object has, None where it only said that it has not `start` bytes.
        """
        head = self._store._client.head_object(**self._object)
        if self._pinned and head["ETag"].strip('"') != self._pinned:
            raise Changed(f"{show(self._uri)} changed while it was read")
        if head["ContentLength"] > self._start if size is None else head["ContentLength"] != size:
            raise Unreachable(
                f"{show(self._uri)}: one answer ends it early, another says {head['ContentLength']} bytes"
            )


def _refusal(uri: str, response: dict[str, Any]) -> StoreError:
    """What an answer of S3 that is no success means."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    if code == "NoSuchBucket":
        return NotFound(f"{uri}: no such bucket")
    if status == 404:
        return NotFound(f"{uri}: no such object")
    if status == 412:
        return Changed(f"{uri} changed since it was listed")
    if status == 416:
        return _PastTheEnd(f"{uri} is shorter than what was asked for")
    if code in _INVALID:
        return InvalidUri(f"{uri}: S3 has no such name ({code})")
    if status == 501:
        return StoreError(f"{uri}: this S3 server cannot do what was asked ({code or status})")
    if code in _TRANSIENT or status in (409, 429) or status >= 500:
        return Unreachable(f"{uri}: S3 answered {code or status}")
    if code == "InvalidObjectState":
        return Forbidden(f"{uri}: S3 refused ({code}): the object is archived and must be restored first")
    if status in (400, 401, 403):
        return Forbidden(f"{uri}: S3 refused ({code}): check the credentials and their permissions")
    return StoreError(f"{uri}: S3 answered {code or status}")


class _PastTheEnd(Changed):
    """A range that starts at or behind the object's end."""


def _pause(attempt: int) -> None:
    # Everyone who was refused at once must not come back at once.
    time.sleep(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))


def _split(uri: str) -> tuple[str, str]:
    """Bucket and key or prefix. Raises `InvalidUri` for what S3 can hold under no account."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InvalidUri(f"{show(uri)}: expected s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidUri(f"{show(uri)}: no bucket can have this name")
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidUri(f"{show(uri)}: a key is UTF-8") from None
    if length > _KEY_BYTES:
        raise InvalidUri(f"{show(uri)}: a key has at most {_KEY_BYTES} bytes, this one {length}")
    if "\0" in key:
        raise InvalidUri(f"{show(uri)}: a key has no NUL")
    depth = 0
    for name in key.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(name, 1)
        if depth < 0:
            raise InvalidUri(f"{show(uri)}: its .. lead out of the bucket")
    return bucket, key


def _split_object(uri: str) -> tuple[str, str]:
    bucket, key = _split(uri)
    if not key:
        raise InvalidUri(f"{show(uri)} names a bucket, not an object")
    return bucket, key


_stores: dict[StoreOptions, S3Store] = {}
_opening = threading.Lock()


def open_s3(options: StoreOptions) -> S3Store:
    """The store of these options: one for each process. Threads that open it at once get the same."""
    with _opening:
        if options not in _stores:
            _stores[options] = S3Store(options)
        return _stores[options]
