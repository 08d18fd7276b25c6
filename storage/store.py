"""The object store: list, ranged read, put, put-if-absent, delete; local folders and s3:// alike.

Paths are taken literally: a `#`, a `%20` or a space in a name is that character. Nothing is percent-decoded.

Every method raises `StoreError` or one of its five kinds and nothing else, whatever the name it is given. Trouble that
may pass (a refused connection, silence, 5xx, a body that breaks off) is retried `ATTEMPTS` times in all before it is
raised; see `storage/s3.py` for how long that takes at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Protocol

ATTEMPTS = 5
_SHOWN = 400


class StoreError(Exception):
    """The store could not do what was asked, and none of the kinds below says why: no space left, a write refused.

    The message is one line that names the URI.
    """


class NotFound(StoreError):
    """There is no such object, bucket or folder."""


class Forbidden(StoreError):
    """The credentials are missing, expired or not allowed to do this, or the object is archived."""


class Changed(StoreError):
    """The object is no longer the one that was listed: its ETag differs, or it is shorter."""


class InvalidUri(StoreError):
    """This can never be an object's name: another scheme, no bucket, a NUL, too long, a symbolic link to itself."""


class Unreachable(StoreError):
    """The store does not answer, or answers that it cannot now (5xx, SlowDown), also after retries."""


def show(uri: str) -> str:
    """A URI for a message: one line, whatever it holds, and not longer than a screen."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in uri)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(uri)} characters)"


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
    """One object of a listing. `etag` is S3's, or size and modification time on a local disk.

    What a listing finds but cannot be read (a link to nothing, a pipe, a socket, a device) has size -1 and no ETag.
    """

    uri: str
    size: int
    etag: str


class Store(Protocol):
    """What the pipeline needs of a store. Every method takes whole URIs and raises `StoreError`."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects under a folder, at any depth, in no promised order; nothing when there are none.

        Streams. A listing that cannot be finished raises: half of one never looks like a whole.
        """

    def stat(self, uri: str) -> Entry | None:
        """The object of exactly this name, or None. A folder, a pipe or a device is no object."""

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        """Bytes [start, stop) of an object, all of it by default; `Changed` when its ETag is another.

        Exactly `stop - start` bytes, fewer only where the object itself ends. What is cut short is read again.
        """

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        """Write an object, whole or not at all, replacing what was there. A file's content from its beginning on."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Write an object unless one is there. True when the object there holds `data`, whoever wrote it."""

    def delete(self, uri: str) -> None:
        """Remove an object; it is no error when it is gone."""


def join(base: str, *names: str) -> str:
    """A name under a folder or prefix."""
    return "/".join([base.rstrip("/"), *names])
