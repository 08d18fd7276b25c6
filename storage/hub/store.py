"""The store for datasets on the Hugging Face hub, for reading only.

A branch moves, and a commit does not. So a revision is resolved to a commit, and files are listed and read at that
commit. The ETag of a file is the hash of its content (SHA-256 of a file in Git LFS or Xet, else Git's hash), so a file
that a later commit does not touch is the same version. A listing resolves the revision anew. A read of a listed version
stays at the commit that the process knows, as long as this has that version; else the revision is resolved once more,
and what still does not fit is `Changed`. `stat`, and a read of any version, resolve a revision that is older than
`RESOLVED_SECONDS`.

What it costs in requests: one for each revision and process, one more before a listing of a gated dataset, and one for
each 1,000 files and folders of a listing. A file costs one request for its address, or one for each of the ranges that
are asked for together at first. It is kept for `ADDRESS_SECONDS`, and each range then costs one request to the host
that has the file. A small file that is not in LFS or Xet comes from the hub itself, with one or two requests. `stat`
costs one. None of them is an API call for each file, of which the hub allows the fewest.

There are `StoreOptions.attempts` attempts at each request, with pauses between them that double, as for the other
stores; huggingface_hub's own retries are not used. An attempt ends after `client.CONNECT_SECONDS` without a connection,
after `client.READ_SECONDS` without a byte, or `client.CALL_SECONDS` of a call, and when a body arrives at less than
`bodies.SLOWEST` bytes/s over that time. What the hub asks to wait comes on top: see `storage.hub.client`.

The address and the token come from the environment of each machine that reads, as huggingface_hub reads them:
`HF_ENDPOINT`, and `HF_TOKEN` or the token of `hf auth login`. `StoreOptions.endpoint` is for S3 only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from storage.hub.bodies import Body, receive
from storage.hub.client import HubClient, Moved
from storage.hub.errors import NoRevision, PastTheEnd, no_hub
from storage.hub.latest import Latest
from storage.hub.names import Place, make_api_url, make_file_url, read_endpoint, split_file, split_uri
from storage.links import LinkedFolders
from storage.retry import retry
from storage.store import Changed, Entry, NotFound, StoreError, StoreOptions, Unreachable, show

RESOLVED_SECONDS = 60.0
ADDRESS_SECONDS = 600.0
"""The hub signs the address of a file for an hour."""
_AGAIN_SECONDS = 1.0
"""A revision that was resolved so short ago is not resolved again for a file that does not fit."""
_INPUTS_ONLY = "hf:// is for inputs only: write to a folder or to another store"

T = TypeVar("T")
_Page = list[dict[str, Any]]


@dataclass(frozen=True)
class _Pin:
    """A revision's commit, the dataset's present name, and when that was so (`time.monotonic`).

    `gated` says whether the dataset's files are only for those whom its owner lets in.
    """

    repo: str
    commit: str
    since: float
    gated: bool = False


@dataclass(frozen=True)
class _Address:
    """Where the bytes of a file are at another host, what the hub said of the file, and until when it is used."""

    url: str
    etag: str
    size: int | None
    until: float


class HubStore:
    """Files of datasets on the hub at `endpoint`. Threads may share it.

    See `storage.store.Store` for the methods. Those that write raise `StoreError`. A listing is in parts, each of which
    is asked for again if it fails. Memory holds one part, and the latest 1,024 revisions and addresses of files.
    """

    def __init__(self, endpoint: str, options: StoreOptions) -> None:
        self._client = HubClient(endpoint)
        self._attempts = options.attempts
        self._pins: Latest[tuple[str, str], _Pin] = Latest()
        self._addresses: Latest[tuple[str, str, str], _Address] = Latest()
        self._resolving: dict[tuple[str, str], tuple[float, Future[_Pin]]] = {}
        self._lock = threading.Lock()

    def list(
        self,
        prefix: str,
        unreadable: Callable[[str, StoreError], None] | None = None,
        links: LinkedFolders | None = None,
    ) -> Iterator[Entry]:
        place = split_uri(prefix)
        below = f"{place.path}/" if place.path else ""
        for page in self._list_pages(prefix, place, recursive=True):
            for one in page:
                if one["type"] == "file" and one["path"].startswith(below):
                    yield _make_entry(place, one)

    def names(self, folder: str, start: str = "") -> Iterator[str]:
        place = split_uri(folder)
        below = f"{place.path}/" if place.path else ""
        if "/" in start:
            return
        for page in self._list_pages(folder, place, recursive=False):
            for one in page:
                if one["type"] == "file" and one["path"].startswith(below + start):
                    yield one["path"][len(below) :]

    def stat(self, uri: str) -> Entry | None:
        place = split_uri(uri)
        if not place.path or uri.endswith("/"):
            return None
        try:
            return self._at_commit(uri, place, RESOLVED_SECONDS, lambda pin: self._look_up(uri, place, pin))
        except NotFound:
            return None

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        place = split_file(uri)
        if stop is not None and stop <= start:
            return b""
        age = float("inf") if etag else RESOLVED_SECONDS
        return self._at_commit(
            uri, place, age, lambda pin: self._retry(lambda: self._read(uri, place, pin, start, stop, etag))
        )

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        raise StoreError(f"{show(uri)}: {_INPUTS_ONLY}")

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        raise StoreError(f"{show(uri)}: {_INPUTS_ONLY}")

    def delete(self, uri: str) -> None:
        raise StoreError(f"{show(uri)}: {_INPUTS_ONLY}")

    def _retry(self, once: Callable[[], T]) -> T:
        return retry(once, self._attempts)

    # Commits

    def _pin(self, uri: str, place: Place, age: float) -> _Pin:
        """The commit of a revision, as it was at most `age` seconds ago. Threads that ask together share a request."""
        key, now = (place.repo, place.revision), time.monotonic()
        known = self._pins.get(key)
        if known is not None and now - known.since <= age:
            return known
        with self._lock:
            begun = self._resolving.get(key)
            mine = begun is None or now - begun[0] > age
            if begun is None or mine:
                begun = self._resolving[key] = now, Future()
        if mine:
            try:
                pin = self._resolve(uri, place, now)
                self._pins.put(key, pin)
                begun[1].set_result(pin)
            except BaseException as error:
                begun[1].set_exception(error)
                raise
            finally:
                with self._lock:
                    if self._resolving.get(key) is begun:
                        del self._resolving[key]
        return begun[1].result()

    def _resolve(self, uri: str, place: Place, since: float) -> _Pin:
        if place.is_commit:
            return _Pin(place.repo, place.revision, since)
        url = make_api_url(self._client.endpoint, place.repo, "revision", place.revision)
        found, _ = self._retry(lambda: self._client.get_json(uri, place.repo, url, {"expand": ["sha", "gated"]}))
        if not isinstance(found, dict) or not isinstance(found.get("sha"), str):
            raise no_hub(uri, self._client.endpoint)
        return _Pin(str(found.get("id") or place.repo), found["sha"], since, bool(found.get("gated")))

    def _at_commit(self, uri: str, place: Place, age: float, once: Callable[[_Pin], T]) -> T:
        """What `once` returns for the commit that is known, or, if the file is not there, for the latest one."""
        pin = self._pin(uri, place, age)
        try:
            return once(pin)
        except PastTheEnd:
            raise
        except (Changed, NotFound):
            latest = self._pin(uri, place, _AGAIN_SECONDS)
            if latest.commit == pin.commit:
                raise
        return once(latest)

    # Listings

    def _list_pages(self, uri: str, place: Place, recursive: bool) -> Iterator[_Page]:
        """The pages of a folder's files and folders. None if there is no such folder."""
        pin = self._pin(uri, place, 0.0)
        if pin.gated:  # else each of its files would fail
            self._retry(lambda: self._client.check_access(uri, pin.repo))
        url = make_api_url(self._client.endpoint, pin.repo, "tree", pin.commit, place.path)
        params = {"recursive": str(recursive).lower(), "expand": "false"}
        first = True
        while True:
            try:
                page, response = self._retry(partial(self._client.get_json, uri, pin.repo, url, params))
            except NotFound as error:
                if not first or isinstance(error, NoRevision):
                    raise
                return
            if not isinstance(page, list) or not all(_is_listed(one) for one in page):
                raise no_hub(uri, self._client.endpoint)
            yield page
            link = response.links.get("next", {}).get("url")
            if not link:
                return
            # Only the place in the listing is taken from the link: those of mirrors lead to the hub they mirror.
            cursor = parse_qs(urlsplit(link).query).get("cursor")
            if not cursor or cursor[0] == params.get("cursor"):
                raise no_hub(uri, self._client.endpoint)
            params, first = {**params, "cursor": cursor[0]}, False

    # Files

    def _look_up(self, uri: str, place: Place, pin: _Pin) -> Entry:
        """A file at a commit, by the hub's headers, which name its hash as a listing does. Raises `NotFound`."""
        known = self._addresses.get((pin.repo, pin.commit, place.path))
        if known is not None and known.etag and known.size is not None and time.monotonic() < known.until:
            return Entry(uri, known.size, known.etag)

        def once() -> Entry:
            with self._client.ask(uri, pin.repo, "HEAD", self._file_url(place, pin), {}) as answer:
                if answer.etag and answer.size is not None:
                    if answer.elsewhere:
                        self._keep(place, pin, answer.elsewhere, answer.etag, answer.size)
                    return Entry(uri, answer.size, answer.etag)
            return self._list_one(uri, place, pin)

        return self._retry(once)

    def _list_one(self, uri: str, place: Place, pin: _Pin) -> Entry:
        """A file at a commit, as a listing has it: with a call of the API. Raises `NotFound`."""
        url = make_api_url(self._client.endpoint, pin.repo, "paths-info", pin.commit)
        found, _ = self._client.get_json(uri, pin.repo, url, {}, {"paths": [place.path], "expand": "false"})
        if not isinstance(found, list) or not all(_is_listed(one) for one in found):
            raise no_hub(uri, self._client.endpoint)
        for one in found:
            if one["type"] == "file" and one["path"] == place.path:
                return _make_entry(place, one)
        raise NotFound(f"{show(uri)}: no such file in the dataset")

    def _read(self, uri: str, place: Place, pin: _Pin, start: int, stop: int | None, etag: str | None) -> bytes:
        """Read a range. Raises `Unreachable` if a response does not have all of it, and `Changed`."""
        # Always a range, because only its response has the file's size as well as the length of the body.
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        try:
            body = self._fetch(uri, place, pin, headers, start, stop, etag)
        except PastTheEnd:
            if self._look_up(uri, place, pin).size > start:
                raise Unreachable(f"{show(uri)}: one response says that it ends before {start}, another not") from None
            return b""
        if not body.confirmed and (stop is None or body.total < stop):
            size = self._look_up(uri, place, pin).size
            if size != body.total:
                raise Unreachable(f"{show(uri)}: one response says {body.total} bytes, another {size}")
        return body.data

    def _fetch(
        self,
        uri: str,
        place: Place,
        pin: _Pin,
        headers: dict[str, str],
        start: int,
        stop: int | None,
        etag: str | None,
    ) -> Body:
        known = self._addresses.get((pin.repo, pin.commit, place.path))
        if known is not None and time.monotonic() < known.until:
            _check(uri, known.etag, etag)
            try:
                with self._client.fetch(uri, known.url, headers) as response:
                    return receive(uri, response, start, stop, known.size)
            except Moved:
                self._addresses.remove((pin.repo, pin.commit, place.path))
        with self._client.ask(uri, pin.repo, "GET", self._file_url(place, pin), headers) as answer:
            size, found, elsewhere = answer.size, answer.etag, answer.elsewhere
            if etag and found != etag:
                # The headers may lack the hash, as those of a mirror, or have another one. The API decides.
                listed = self._list_one(uri, place, pin)
                size, found = listed.size, listed.etag
                _check(uri, found, etag)
            if not elsewhere:
                return receive(uri, answer.response, start, stop, size)
        try:
            with self._client.fetch(uri, elsewhere, headers) as response:
                body = receive(uri, response, start, stop, size)
        except Moved as error:
            raise Unreachable(str(error)) from error
        self._keep(place, pin, elsewhere, found, size)
        return body

    def _keep(self, place: Place, pin: _Pin, url: str, etag: str, size: int | None) -> None:
        address = _Address(url, etag, size, time.monotonic() + ADDRESS_SECONDS)
        self._addresses.put((pin.repo, pin.commit, place.path), address)

    def _file_url(self, place: Place, pin: _Pin) -> str:
        return make_file_url(self._client.endpoint, pin.repo, pin.commit, place.path)


def _check(uri: str, found: str, wanted: str | None) -> None:
    if wanted and found != wanted:
        raise Changed(f"{show(uri)} changed since it was listed")


def _is_listed(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("path"), str) or not isinstance(one.get("type"), str):
        return False
    lfs = one.get("lfs") or {"size": one.get("size"), "oid": one.get("oid")}
    return one["type"] != "file" or (isinstance(lfs.get("size"), int) and isinstance(lfs.get("oid"), str))


def _make_entry(place: Place, one: dict[str, Any]) -> Entry:
    """The entry of a file of a listing. Of a file in LFS or Xet, size and hash are its content's, not the pointer's."""
    content = one.get("lfs") or one
    return Entry(f"{place.root}/{one['path']}", content["size"], content["oid"])


_stores: dict[tuple[str, StoreOptions], HubStore] = {}
_opening = threading.Lock()


def open_hub(options: StoreOptions) -> HubStore:
    """The store of the hub that `HF_ENDPOINT` names: one in each process, which all threads share."""
    endpoint = read_endpoint()
    with _opening:
        if (endpoint, options) not in _stores:
            _stores[endpoint, options] = HubStore(endpoint, options)
        return _stores[endpoint, options]
