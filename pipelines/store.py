"""The object store: list, ranged read, put, put-if-absent, delete; local folders and s3:// alike.

Paths are taken literally: a `#`, a `%20` or a space in a name is that character. Nothing is percent-decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

READ_BYTES = 8 * 2**20
"""One ranged read of a `StoreFile`. At 8 MB the 30 ms that S3 takes to answer are a small part of the transfer."""
ATTEMPTS = 5


class StoreError(Exception):
    """The store could not do what was asked, after retries. The message is one line."""


class NotFound(StoreError):
    """There is no such object, bucket or folder."""


class Forbidden(StoreError):
    """The credentials are missing, expired or not allowed to do this."""


class Changed(StoreError):
    """The object is no longer the one that was listed: its ETag differs."""


@dataclass(frozen=True)
class StoreOptions:
    """How to reach S3. Travels to every task; holds no secret."""

    endpoint: str | None = None
    region: str | None = None

    @classmethod
    def from_environment(cls, endpoint: str | None = None, region: str | None = None) -> StoreOptions:
        """What is configured, else what the AWS tools read: spelled out, because workers have another environment."""
        environment = os.environ
        return cls(
            endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None,
            region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None,
        )


@dataclass(frozen=True)
class Entry:
    """One object of a listing. `etag` is S3's, or size and modification time on a local disk."""

    uri: str
    size: int
    etag: str


class Store(Protocol):
    """What the pipeline needs of a store. Every method takes whole URIs and raises `StoreError`."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects under a folder, at any depth, in no promised order; nothing when there are none."""

    def stat(self, uri: str) -> Entry | None:
        """The object of exactly this name, or None."""

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        """Bytes [start, stop) of an object, all of it by default; `Changed` when its ETag is another."""

    def put(self, uri: str, data: bytes) -> Entry:
        """Write an object, whole or not at all, replacing what was there."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Write an object unless one is there. True when the object there holds `data`, whoever wrote it."""

    def delete(self, uri: str) -> None:
        """Remove an object; it is no error when it is gone."""


def open_store(uri: str, options: StoreOptions = StoreOptions()) -> Store:
    """The store that holds `uri`."""
    if uri.startswith("s3://"):
        return _open_s3(options)
    if "://" in uri and not uri.startswith("file://"):
        raise StoreError(f"{uri}: only local paths and s3:// are supported")
    return LocalStore()


def join(base: str, *names: str) -> str:
    """A name under a folder or prefix."""
    return "/".join([base.rstrip("/"), *names])


class LocalStore:
    """Folders on a disk that every worker sees."""

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from self._walk(_local(prefix), frozenset())

    def _walk(self, folder: str, parents: frozenset[str]) -> Iterator[Entry]:
        real = os.path.realpath(folder)
        if real in parents:  # a symbolic link to a folder above
            return
        try:
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:
            raise Forbidden(f"{folder}: {error.strerror}") from error
        for child in children:
            if child.is_dir():
                yield from self._walk(child.path, parents | {real})
                continue
            entry = self.stat(child.path)
            if entry is not None:  # else a dangling link, or removed since
                yield entry

    def stat(self, uri: str) -> Entry | None:
        path = _local(uri)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(path, status.st_size, _local_etag(status))

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        path = _local(uri)
        try:
            with open(path, "rb") as file:
                if etag and _local_etag(os.fstat(file.fileno())) != etag:
                    raise Changed(f"{path} changed since it was listed")
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file") from error
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error

    def put(self, uri: str, data: bytes) -> Entry:
        path = Path(_local(uri))
        with self._temporary(path, data) as temporary:
            os.replace(temporary, path)
        entry = self.stat(str(path))
        if entry is None:
            raise StoreError(f"{path} vanished while it was written")
        return entry

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = Path(_local(uri))
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return path.read_bytes() == data
        return True

    def delete(self, uri: str) -> None:
        path = Path(_local(uri))
        path.unlink(missing_ok=True)
        # S3 has no folders: an empty one means nothing here either.
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        """`data` safely on the disk under a name of its own beside `path`, gone afterwards."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            for attempt in range(ATTEMPTS):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(temporary, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    break
                except FileNotFoundError:  # another task just removed the empty folder
                    if attempt == ATTEMPTS - 1:
                        raise
            yield temporary
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)


class S3Store:
    """S3 and what speaks its protocol, conditional writes included. Retries are botocore's, bounded."""

    def __init__(self, options: StoreOptions) -> None:
        import boto3
        from botocore.config import Config

        self._endpoint = options.endpoint
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=options.endpoint,
            region_name=options.region,
            config=Config(
                connect_timeout=10,
                read_timeout=60,
                retries={"mode": "standard", "max_attempts": ATTEMPTS},
                max_pool_connections=32,
                # Stores other than AWS often know neither the newer checksums nor their trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def list(self, prefix: str) -> Iterator[Entry]:
        bucket, key = _split(prefix)
        key = key.rstrip("/") + "/" if key else ""
        with self._translate(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # consoles create these to show a folder
                        yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))

    def stat(self, uri: str) -> Entry | None:
        bucket, key = _split(uri)
        if not key or key.endswith("/"):
            return None
        try:
            with self._translate(uri):
                head = self._client.head_object(Bucket=bucket, Key=key)
        except NotFound:
            return None
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        from botocore.exceptions import BotoCoreError

        if stop is not None and stop <= start:
            return b""
        bucket, key = _split(uri)
        arguments: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if start or stop is not None:
            arguments["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if etag:
            arguments["IfMatch"] = f'"{etag}"'
        for attempt in range(ATTEMPTS):
            with self._translate(uri):
                answer = self._client.get_object(**arguments)
            try:
                body: bytes = answer["Body"].read()
                return body
            except BotoCoreError as error:  # botocore retries a request, but not a body that breaks off
                if attempt == ATTEMPTS - 1:
                    raise StoreError(f"{uri}: {error}") from error
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def put(self, uri: str, data: bytes) -> Entry:
        bucket, key = _split(uri)
        with self._translate(uri):
            answer = self._client.put_object(Bucket=bucket, Key=key, Body=data)
        return Entry(uri, len(data), answer["ETag"].strip('"'))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        bucket, key = _split(uri)
        for attempt in range(ATTEMPTS):
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                code = error.response["ResponseMetadata"].get("HTTPStatusCode")
                if code == 412:  # perhaps our own first attempt, whose answer was lost
                    return self.read(uri) == data
                if code != 409 or attempt == ATTEMPTS - 1:  # 409: two writers at once, try again
                    with self._translate(uri):
                        raise
                time.sleep(0.1 * 2**attempt)
            except Exception:
                with self._translate(uri):
                    raise
        return False

    def delete(self, uri: str) -> None:
        bucket, key = _split(uri)
        with self._translate(uri):
            self._client.delete_object(Bucket=bucket, Key=key)

    @contextlib.contextmanager
    def _translate(self, uri: str) -> Iterator[None]:
        """botocore's errors as this module's, worded for the person who set the bucket and the credentials."""
        from botocore import exceptions as boto

        try:
            yield
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if code in ("NoSuchBucket", "NoSuchKey", "404", "NotFound"):
                missing = "bucket" if code == "NoSuchBucket" else "object"
                raise NotFound(f"{uri}: no such {missing}") from error
            if status == 412:
                raise Changed(f"{uri} changed since it was listed") from error
            if status == 416:
                raise Changed(f"{uri} is shorter than it was when it was listed") from error
            if status in (400, 401, 403):
                raise Forbidden(f"{uri}: S3 refused ({code}): check the credentials and their permissions") from error
            raise StoreError(f"{uri}: S3 answered {code or status}") from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError) as error:
            raise Forbidden(f"{uri}: no S3 credentials: set AWS_ACCESS_KEY_ID or AWS_PROFILE, or use a role") from error
        except boto.ProfileNotFound as error:
            raise Forbidden(f"{uri}: {error}") from error
        except boto.EndpointConnectionError as error:
            raise StoreError(f"{uri}: cannot reach S3 at {self._endpoint or 'AWS'}: check AWS_ENDPOINT_URL") from error
        except (boto.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise StoreError(f"{uri}: {' '.join(str(error).split())}") from error


class StoreFile(io.RawIOBase):
    """A stored object as a file: reads ahead by ranges of one ETag, seeks, never sees half an object.

    A connection that breaks costs one range, read again. The next range is fetched by a thread while this one is
    consumed. Wrap it in `io.BufferedReader` for small reads.
    """

    def __init__(self, store: Store, entry: Entry, chunk_bytes: int = READ_BYTES) -> None:
        super().__init__()
        self._chunk_bytes = chunk_bytes
        self._store = store
        self._entry = entry
        self._position = 0
        self._start, self._chunk = 0, b""
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._entry.size or not len(view):
            return 0
        if not self._start <= self._position < self._start + len(self._chunk):
            self._chunk = self._fetch(self._position)
            self._start = self._position
        offset = self._position - self._start
        part = self._chunk[offset : offset + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._chunk = b""
        super().close()

    def _fetch(self, start: int) -> bytes:
        ahead, self._ahead = self._ahead, None
        chunk = ahead[1].result() if ahead and ahead[0] == start else self._range(start)
        if not chunk:
            raise Changed(f"{self._entry.uri} ends before its {self._entry.size} bytes")
        following = start + len(chunk)
        if following < self._entry.size:
            self._ahead = (following, self._thread.submit(self._range, following))
        return chunk

    def _range(self, start: int) -> bytes:
        return self._store.read(
            self._entry.uri, start, min(start + self._chunk_bytes, self._entry.size), self._entry.etag or None
        )


def _local(uri: str) -> str:
    return uri.removeprefix("file://")


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{uri}: expected s3://bucket/prefix")
    return bucket, key


@cache
def _open_s3(options: StoreOptions) -> S3Store:
    return S3Store(options)
