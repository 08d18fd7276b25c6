"""The interface of an object store: list, ranged read, put, put-if-absent, delete.

Paths are literal: a `#`, a `%20` or a space in a name is that character. Nothing is percent-decoded.

Every method raises `StoreError` or one of its six subclasses and nothing else, for every possible name. Errors that
may pass (a refused connection, a silent one, 5xx, a body that breaks off) are raised after `StoreOptions.attempts`
attempts in all. A store's module says how long that takes at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from storage.links import LinkedFolders

ATTEMPTS = 5
"""Attempts at an operation, if `StoreOptions` do not say otherwise."""
_SHOWN = 400


class StoreError(Exception):
    """An operation of the store failed. Raised itself for causes without a subclass, such as a damaged file.

    The message is one line that names the URI.
    """


class NotFound(StoreError):
    """There is no such object, bucket or folder."""


class Forbidden(StoreError):
    """The credentials are missing, expired or lack a permission, or the object is archived."""


class Changed(StoreError):
    """The object is another version than the listed one: its ETag differs, or it is shorter."""


class InvalidUri(StoreError):
    """No object can have this name: an unknown scheme, no bucket, a NUL, too long, a symbolic link to itself."""


class LinkNotFollowed(InvalidUri):
    """A symbolic link that leads to itself; in a listing also one to a folder above, or to one that is read anyway."""


class Unreachable(StoreError):
    """The store does not respond, or responds that it cannot now (5xx, SlowDown), also after retries."""


class NoSpace(StoreError):
    """The disk is full, or a quota is used up."""


def show(uri: str) -> str:
    """A URI for a message: always one line of printable characters, and cut off after 400."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in uri)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(uri)} characters)"


@dataclass(frozen=True)
class StoreOptions:
    """How to reach an object store, and how often to try. It is sent to every task, and holds no secret."""

    endpoint: str | None = None
    region: str | None = None
    attempts: int = ATTEMPTS

    @classmethod
    def from_environment(cls, endpoint: str | None = None, region: str | None = None) -> StoreOptions:
        """The given values, or those of the environment variables that the AWS tools read.

        They are resolved here because the workers of a cluster have another environment.
        """
        environment = os.environ
        return cls(
            endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None,
            region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None,
        )


class Entry(NamedTuple):
    """One object of a listing. `size` is in bytes. `etag` is the store's, or size and modification time on a disk.

    A name that is listed but cannot be read (a link to nothing, a pipe, a socket, a device) has size -1 and no ETag.
    """

    uri: str
    size: int
    etag: str


class Store(Protocol):
    """An object store. Every method takes whole URIs and raises `StoreError`."""

    def list(
        self,
        prefix: str,
        unreadable: Callable[[str, StoreError], None] | None = None,
        links: LinkedFolders | None = None,
    ) -> Iterator[Entry]:
        """All objects under a folder, at any depth, in no particular order. Empty when there are none.

        The listing is streamed. It raises when it cannot be completed, so it never ends early without an error. With
        `unreadable`, a folder or file below `prefix` that cannot be looked at is given to that function with the error,
        and the rest is listed: a closed folder, a link to itself or to a folder above, a path that is too long. Links
        to folders are followed, but each folder is read once, also in several listings with the same `links`. S3 has
        neither such paths nor links.
        """

    def names(self, folder: str, start: str = "") -> Iterator[str]:
        """The last path components of the objects directly in a folder that begin with `start`, in no particular order.

        Streamed, and empty when there is no such folder. The objects are not looked at, so a disk's temporary files,
        pipes and links are named too, whatever a link leads to. Folders are not named. Raises as `list` does.
        """

    def stat(self, uri: str) -> Entry | None:
        """The object with exactly this name, or None. A folder, a pipe or a device is not an object."""

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        """Bytes [start, stop) of an object, by default all of it. Raises `Changed` when `etag` is not its ETag.

        Returns exactly `stop - start` bytes, fewer only where the object itself ends. A response that is cut short is
        read again.
        """

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        """Write an object atomically, replacing one of the same name. A file is written from its first byte on."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Write an object unless one has the name. True when the stored object holds `data`, also if another wrote it.

        Atomic: of several writers at the same time exactly one object is stored.
        """

    def delete(self, uri: str) -> None:
        """Remove an object. It is not an error when there is none."""


def join(base: str, *names: str) -> str:
    """A name under a folder or prefix."""
    return "/".join([base.rstrip("/"), *names])
