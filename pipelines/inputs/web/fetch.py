"""Fetching one image from the web: with retries, within bounds, and with what its host asks for.

What a fetch says about an *image* is a reject: it is not there, may not be had, is too large. What it says about a host
or the network (no answer, 429, 5xx) passes: the row is rejected as `host_trouble` for now, and a later run tries it
again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpcore2
import httpx2

from pipelines.inputs.web.config import FetchConfig
from pipelines.inputs.web.hosts import LONGEST_SECONDS, CachedResolver, Host, Hosts, back_off
from pipelines.inputs.web.memory import Memory, NoRoom
from siglip.images.decode import ImageRejected
from storage.store import show
from storage.web.client import Response, WebClient
from storage.web.guard import FetchRefused, Resolver, SystemResolver, parse_url

logger = logging.getLogger(__name__)

TRIES = 3
"""How often a run requests an image whose host is in trouble."""
LOOKUPS = 32
"""DNS look-ups of a reader at the same time. More of them overload a resolver, which then answers that hosts do not
exist."""
_FIELDS = ("etag", "last-modified", "content-type")
"""The header fields of a response that are recorded."""
_RECORDED = 500
"""The most characters of a header field that are recorded."""
_VALUED = frozenset(["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"])
"""The directives of X-Robots-Tag that have a value after a colon."""
_REASONS = {404: "missing", 410: "missing", 401: "forbidden", 402: "forbidden", 403: "forbidden", 451: "forbidden"}
"""By HTTP status, the reason of an image's rejection. For all other statuses it is `unreadable`."""


@dataclass(frozen=True)
class Fetched:
    """What became of a URL.

    `found` is the image's bytes, or why there are none. `response` describes the response, for the row's metadata:
    where it came from, and what identifies its version. `note` says in a few words what the host answered. `trouble`
    names the host and what it did, if a later run may succeed; else it is "".
    """

    found: bytes | ImageRejected
    response: dict[str, str] | None = None
    note: str = ""
    trouble: str = ""


class ImageFetcher:
    """Fetches images by URL for one reader, within the limits of `config`. Belongs to one event loop.

    `max_bytes` is the most bytes of one image.
    """

    def __init__(self, config: FetchConfig, max_bytes: int, resolver: Resolver | None = None) -> None:
        self._config, self._max_bytes = config, max_bytes
        addresses = CachedResolver(resolver or SystemResolver(LOOKUPS))
        self._client = WebClient(config, max_bytes, config.connections, config.user_agent, addresses)
        self._hosts = Hosts(config.host_connections)
        self._slots = asyncio.Semaphore(config.connections)
        self._alone = asyncio.Lock()
        self.memory = Memory()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def fetch(self, url: str, last: bool) -> Fetched:
        """Fetch an image. Its bytes count as held, until the caller frees them in `memory`.

        If `last` is true, no later run will try it: trouble of its host is then rejected as `unreachable`.
        """
        try:
            name = parse_url(url).raw_host.decode("ascii")
        except FetchRefused as refused:
            return Fetched(ImageRejected("unreadable", refused.message))
        host = self._hosts.of(name)
        host.users += 1
        try:
            async with host.slots:
                outcome = await self._try(url, host)
        finally:
            host.users -= 1
        if isinstance(outcome, Fetched):
            return outcome
        kind, detail = outcome
        text = f"{name}: {kind}{f' ({detail})' if detail else ''}"
        if last:
            return Fetched(ImageRejected("unreachable", f"{text}, at the last of fetch.runs {self._config.runs}"))
        return Fetched(ImageRejected("host_trouble", text), trouble=f"{name}: {kind}")

    async def _try(self, url: str, host: Host) -> Fetched | tuple[str, str]:
        """Return what became of a URL, or the kind of its host's trouble with a detail.

        The image keeps its place at the host between two attempts. Otherwise each image of a dead host would be tried
        once before the first is tried again.
        """
        trouble = "not tried", "too many requests to this host had failed before"
        for attempt in range(TRIES):
            while not host.is_resting() and (pause := host.paused - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if host.is_resting():
                break
            try:
                response = await self._request(url)
            except FetchRefused as refused:
                if not refused.passing:
                    host.note_answer()
                    return _reject(refused, self._max_bytes)
                trouble = _describe(refused)
                if refused.status in (429, 503):
                    host.slow_down(_read_retry_after(refused.fields.get(b"retry-after", "")))
                    continue
                if not refused.fields:  # a host that answers, such as 500, may do so for some images only
                    host.note_failure()
                if attempt < TRIES - 1 and not host.is_resting():
                    await asyncio.sleep(back_off(attempt))
            except Exception as error:  # a host that finds a fault in the client costs its own images only
                logger.exception("fetching an image failed")
                return type(error).__name__, show(str(error))
            else:
                host.note_answer()
                return self._accept(url, response)
        return trouble

    async def _request(self, url: str) -> Response:
        """Request an image once, when the connections and the memory have room for it."""
        async with self._slots:
            await self.memory.wait()
            try:
                return await self._hold(url, must=False)
            except NoRoom:
                pass
            async with self._alone:
                await self.memory.wait()
                return await self._hold(url, must=True)

    async def _hold(self, url: str, must: bool) -> Response:
        """Request an image, whose bytes are counted as held. If it cannot be had, they are freed."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            self.memory.take(count, must)
            held += count

        try:
            return await self._client.get(url, take)
        except BaseException:
            self.memory.free(held)
            raise

    def _accept(self, url: str, response: Response) -> Fetched:
        """Return the image of a response, or its rejection if the host's X-Robots-Tag does not allow its use."""
        tag = _find_tag(response.fields.get(b"x-robots-tag", ""), self._config)
        if tag is not None:
            self.memory.free(len(response.body))
            return Fetched(ImageRejected("forbidden", f"HTTP 200, X-Robots-Tag: {tag} (see fetch.robots_tags)"))
        fields = {name: show(response.fields.get(name.encode(), ""))[:_RECORDED] for name in _FIELDS}
        recorded = {name: text for name, text in fields.items() if text}
        if response.url != str(httpx2.URL(url).copy_with(fragment=None)):
            recorded = {"url": response.url, **recorded}
        return Fetched(response.body, recorded, f"HTTP 200, {fields['content-type'] or 'no Content-Type'}")


def _find_tag(text: str, config: FetchConfig) -> str | None:
    """Return the directive of an X-Robots-Tag that is honoured, if there is one: for all agents, or for this one.

    A name with a colon before a directive says that it and those behind it are for this agent, unless it is a directive
    with a value, as in `max-snippet: 5`. `none` stands for `noindex, nofollow`.
    """
    agent = config.user_agent.split("/")[0].split()[0].lower()
    for line in text.lower().splitlines():
        ours = True
        for part in line.split(","):
            before, colon, after = (piece.strip() for piece in part.partition(":"))
            if colon and before in _VALUED:
                continue
            if colon:
                ours = before in (agent, "*")
            tag = after if colon else before
            if ours and any(
                one in config.robots_tags for one in (("noindex", "nofollow") if tag == "none" else (tag,))
            ):
                return tag
    return None


def _read_retry_after(text: str) -> float | None:
    """Return the seconds that a Retry-After asks for, given as a number or as a date, or None if it is neither."""
    text = text.strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _describe(refused: FetchRefused) -> tuple[str, str]:
    """Return the kind of a host's trouble, one of a few so that they can be counted, and a detail."""
    if refused.status is not None:
        wait = _read_retry_after(refused.fields.get(b"retry-after", ""))
        longer = wait is not None and wait > LONGEST_SECONDS
        return f"HTTP {refused.status}", f"Retry-After: {wait:,.0f} s" if longer else ""
    if refused.code == "fetch_timeout":
        return "timeout", ""
    if refused.code == "fetch_forbidden":
        return "no address", show(refused.detail)
    connecting = isinstance(refused.__cause__, (httpcore2.ConnectError, httpcore2.ConnectTimeout))
    return ("no connection" if connecting else "broken off"), show(refused.detail)


def _reject(refused: FetchRefused, max_bytes: int) -> Fetched:
    """Return the rejection of an image that no later run could fetch either."""
    status = "" if refused.status is None else f"HTTP {refused.status}"
    if refused.code == "fetch_too_large":
        return Fetched(ImageRejected("too_many_bytes", f"{status}, over {max_bytes} bytes"))
    if refused.code == "fetch_forbidden":
        key = "fetch.allowed_networks" if refused.detail else "fetch.ports and fetch.allowed_hosts"
        detail = f"not fetched: {refused.message.partition(': this server ')[0]}: {refused.detail or 'not allowed'}"
        return Fetched(ImageRejected("forbidden", f"{detail} (see {key})"))
    if refused.code == "fetch_failed" and refused.status is not None:
        return Fetched(ImageRejected(_REASONS.get(refused.status, "unreadable"), status))
    return Fetched(ImageRejected("unreadable", f"{status}{', ' if status else ''}{refused.message}"))
