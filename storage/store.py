"""The object store: list, ranged read, put, put-if-absent, delete; local folders and s3:// alike.

Paths are taken literally: a `#`, a `%20` or a space in a name is that character. Nothing is percent-decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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
        from storage.s3 import open_s3

        return open_s3(options)
    if "://" in uri and not uri.startswith("file://"):
        raise StoreError(f"{uri}: only local paths and s3:// are supported")
    from storage.local import LocalStore

    return LocalStore()


def join(base: str, *names: str) -> str:
    """A name under a folder or prefix."""
    return "/".join([base.rstrip("/"), *names])
