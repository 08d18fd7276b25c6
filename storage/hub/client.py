"""Requests to the hub: addresses, token, redirects, time limits, and the pauses that the hub asks for.

A request is sent once; `storage.retry` repeats it. The token goes to the address of the hub and to no other: files that
are large are on other hosts, to which the hub redirects with URLs that are signed for one file and some time.

A response of 429, or 503 with `Retry-After`, says how long to wait. All threads of the process then wait with their
next request of the same kind: those for files count apart from the others, as the hub counts them. A process waits for
`MOST_WAIT_SECONDS` at most. It asks for nothing while the hub wants a longer pause, and raises `Unreachable`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from storage.hub.errors import PASSING, PastTheEnd, explain_response, no_hub, translate_errors
from storage.store import Forbidden, StoreError, Unreachable, show

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
CALL_SECONDS = 60.0
"""Of a listing of many names the hub prepares a page for some time before it sends a byte."""
MOST_WAIT_SECONDS = 330.0
"""The hub counts requests over windows of five minutes, so a longer pause is no rate limit that passes."""
_MAX_REDIRECTS = 8
_PORTS = {"http": 80, "https": 443}
_DRAINED = 64 * 2**10
_MOST_JSON_BYTES = 64 * 2**20


class Moved(StoreError):
    """The URL to which the hub had redirected does not give the file any more: its signature may have expired."""


@dataclass(frozen=True)
class Answer:
    """A response of the hub about a file, and what it says of the file, which is "" or None if it does not say it.

    `elsewhere` is the URL at another host that has the file's bytes, or "" if they are the body of `response`.
    """

    response: httpx2.Response
    commit: str
    etag: str
    size: int | None
    elsewhere: str


class HubClient:
    """Sends requests to the hub at `endpoint`, and to the hosts that it redirects to. Threads may share it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._origin = _origin(self.endpoint)
        self._waits: dict[str, float] = {}
        self._lock = threading.Lock()
        self._agent = f"sightline; hf_hub/{importlib.metadata.version('huggingface_hub')}"

    def get_json(
        self, uri: str, repo: str, url: str, params: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> tuple[Any, httpx2.Response]:
        """The JSON of a response of the hub's API, and the response. With `data` it is a POST of a form."""
        method = "GET" if data is None else "POST"
        with self._follow(uri, repo, method, url, {}, params=params, data=data) as answer:
            response = answer.response
            if answer.elsewhere or not response.headers.get("Content-Type", "").startswith("application/json"):
                raise no_hub(uri, self.endpoint)
            body = bytearray()
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_JSON_BYTES:
                    raise no_hub(uri, self.endpoint)
        try:
            return json.loads(bytes(body)), response
        except ValueError as error:
            raise Unreachable(f"{show(uri)}: the hub's response is not JSON: {show(str(error))}") from error

    def check_access(self, uri: str, repo: str) -> None:
        """Raise `Forbidden` if the token gives no access to a dataset's files. Their names may be public all the same.

        Raises `Unreachable` too. Any other answer says nothing, as that of a mirror without this call.
        """
        try:
            with self._follow(uri, repo, "GET", f"{self.endpoint}/api/datasets/{repo}/auth-check", {}):
                pass
        except (Forbidden, Unreachable):
            raise
        except StoreError:
            pass

    @contextlib.contextmanager
    def ask(self, uri: str, repo: str, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Ask the hub for a file. Raises `StoreError` for a status of 400 or more, and if this is no hub."""
        with self._follow(uri, repo, method, url, headers) as answer:
            if not answer.commit:  # a page of another server may have an ETag too
                raise no_hub(uri, self.endpoint)
            yield answer

    @contextlib.contextmanager
    def fetch(self, uri: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Get a URL that the hub redirected to, without the token. Raises `Moved` if it is refused there."""
        for _ in range(_MAX_REDIRECTS):
            if self._origin[0] == "https" and _origin(url)[0] != "https":
                raise StoreError(f"{show(uri)}: the hub redirects to an address without TLS, {urlsplit(url).hostname}")
            with self._send(uri, "GET", url, headers, urlsplit(url).netloc, "") as response:
                if target := _redirect(response):
                    url = target
                    continue
                if response.status_code == 416:
                    raise PastTheEnd(f"{show(uri)} is shorter than the requested range")
                host = urlsplit(url).hostname
                if response.status_code in PASSING:
                    raise Unreachable(f"{show(uri)}: {host} answered {response.status_code}")
                if response.status_code >= 400:
                    raise Moved(f"{show(uri)}: {host} answered {response.status_code}")
                yield response
                return
        raise StoreError(f"{show(uri)}: more than {_MAX_REDIRECTS} redirects")

    @contextlib.contextmanager
    def _follow(
        self, uri: str, repo: str, method: str, url: str, headers: Mapping[str, str], **options: Any
    ) -> Iterator[Answer]:
        """Send a request to the hub, and follow redirects that stay there: of datasets that were renamed, or cached."""
        from huggingface_hub.utils import get_token_to_send

        commit = etag = size = ""
        for _ in range(_MAX_REDIRECTS):
            kind = "files" if "/resolve" in urlsplit(url).path else "calls"
            with self._send(uri, method, url, headers, kind, get_token_to_send(None) or "", **options) as response:
                found = response.headers
                commit = found.get("X-Repo-Commit", commit)
                etag = found.get("X-Linked-Etag", etag)
                size = found.get("X-Linked-Size", size)
                target = _redirect(response)
                if target and _origin(target) == self._origin:
                    url = target
                    options.pop("params", None)  # which a redirect repeats
                    continue
                if response.status_code >= 400:
                    raise explain_response(uri, repo, self.endpoint, response.status_code, found)
                if not target:
                    etag = etag or found.get("ETag", "")
                    length = found.get("Content-Length", "") if method == "HEAD" else ""
                    size = size or length
                yield Answer(response, commit, _strip(etag), int(size) if size.isdecimal() else None, target)
                return
        raise StoreError(f"{show(uri)}: more than {_MAX_REDIRECTS} redirects: check HF_ENDPOINT")

    @contextlib.contextmanager
    def _send(
        self, uri: str, method: str, url: str, headers: Mapping[str, str], kind: str, token: str, **options: Any
    ) -> Iterator[httpx2.Response]:
        """Send one request. `kind` is what a pause that is asked for applies to."""
        import httpx2
        from huggingface_hub.utils import get_session

        self._pause(uri, kind)
        sent = {"User-Agent": self._agent, "Accept-Encoding": "identity", **headers}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        silent = CALL_SECONDS if kind == "calls" else READ_SECONDS
        timeout = httpx2.Timeout(silent, connect=CONNECT_SECONDS, pool=None)
        with (
            translate_errors(uri, self.endpoint),
            get_session().stream(
                method, url, headers=sent, timeout=timeout, follow_redirects=False, **options
            ) as response,
        ):
            if response.status_code in (429, 503):
                self._note_pause(kind, _told_seconds(response.headers))
            length = response.headers.get("Content-Length", "")
            if response.status_code >= 300 and length.isdecimal() and int(length[:9]) <= _DRAINED:
                response.read()  # else the connection would be closed
            yield response

    def _note_pause(self, kind: str, seconds: float) -> None:
        if seconds > 0:
            with self._lock:
                self._waits[kind] = max(self._waits.get(kind, 0.0), time.monotonic() + seconds)

    def _pause(self, uri: str, kind: str) -> None:
        """Wait until the hub wants requests of this kind again. Raises `Unreachable` if that is too long."""
        with self._lock:
            wait = self._waits.get(kind, 0.0) - time.monotonic()
        if wait <= 0:
            return
        if wait > MOST_WAIT_SECONDS:
            raise Unreachable(
                f"{show(uri)}: the hub wants no requests for {wait:.0f} s: set HF_TOKEN for a higher limit, or run "
                "fewer readers"
            )
        time.sleep(wait + random.uniform(0, 1))  # not all processes at once


def _redirect(response: httpx2.Response) -> str:
    """The URL that a response redirects to, or ""."""
    location = response.headers.get("Location", "")
    return urljoin(str(response.url), location) if response.status_code in (301, 302, 303, 307, 308) else ""


def _told_seconds(headers: Mapping[str, str]) -> float:
    """How long a response says to wait, or 0: until the hub's window of requests ends, or by `Retry-After`."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    told = headers.get("Retry-After", "").strip()
    if told.isdecimal():
        return float(told[:9])
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _origin(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:  # a port that is no number
        return "", "", -1


def _strip(etag: str) -> str:
    """An ETag without its quotes, and without the mark of a weak one."""
    return etag.removeprefix("W/").strip('"')
