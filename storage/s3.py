"""S3, and what speaks its protocol."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from storage.store import ATTEMPTS, Changed, Entry, Forbidden, NotFound, StoreError, StoreOptions


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


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{uri}: expected s3://bucket/prefix")
    return bucket, key


@cache
def open_s3(options: StoreOptions) -> S3Store:
    """The store of these options: one for each process."""
    return S3Store(options)
