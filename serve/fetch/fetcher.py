"""Fetching an image by the URL that a stranger sent, without becoming the stranger's way into this network.

The guard sits where a socket is opened. Whatever a URL, a redirect or a name server says, the address that is about to
be connected to is checked, and exactly that address is connected to: there is no second look-up that could give
another answer. What a parser makes of an odd URL therefore decides nothing; odd URLs are refused all the same, for
their senders' sake.

It does not know: which public addresses belong to this network (NAT64 under a prefix of its own, a public address on
an internal load balancer). A network policy that keeps the ingress from internal addresses is the second wall.
Proxies named in the environment are not used, because they would do the look-up that is checked here.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address
from types import TracebackType
from typing import Annotated, Self
from weakref import WeakValueDictionary

import httpcore2
import httpx2
from pydantic import BaseModel, ConfigDict, Field, field_validator

from serve.fetch.addresses import Address, Network, classify_address, parse_address
from serve.log import log

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""A host name to all of its addresses. Raises OSError when there are none."""

MAX_URL = 8192
"""Characters of a URL. Signed ones of object stores have about 2,000."""
CONNECTIONS = 64
"""Connections open at once; more fetches wait, and the wait counts as their time."""
KEY_CONNECTIONS = 16
"""Of these for one key; its other fetches wait for each other, and only then does their time begin."""
CONNECT_SECONDS = 3.0
CONNECT_ADDRESSES = 4
"""How long one address may take to be connected to, and how many of a name's addresses are tried."""
LOOKUPS = 8
"""Threads that look up names. A thread is stuck for as long as a slow name server wants: these are nobody else's."""

CODES: dict[str, str] = {
    "fetch_disabled": "fetching URLs is switched off on this server",
    "fetch_bad_url": "not a plain http or https URL, or one with a host that can be read in two ways",
    "fetch_forbidden": "the host, its address or its port is not one that this server fetches from",
    "fetch_failed": "no connection, no valid certificate, too many redirects, or an answer other than 200",
    "fetch_encoded": "the answer is compressed although it was asked not to be",
    "fetch_too_large": "the answer is larger than fetch.max_bytes",
    "fetch_timeout": "the answer was not there within fetch.max_seconds",
}
"""Every code of `FetchRefused`, with its meaning."""

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# The URL Standard's rule: a host whose last part is a number is an IPv4 address, be it 2130706433 or 0x7f.1.
_NUMBER = re.compile(r"([0-9]+|0x[0-9a-f]*)")


class FetchConfig(BaseModel):
    """Whether URLs are fetched, from where, and what one fetch may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(False, description="Fetch images by URL. Off: callers send the bytes.")
    max_bytes: int = Field(20 * 2**20, gt=0, description="Bytes of one answer.")
    max_seconds: float = Field(10.0, gt=0, description="Seconds for all of it: look-up, redirects, body.")
    max_redirects: int = Field(3, ge=0, description="Redirects that are followed, each checked like the first URL.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        (80, 443), description="Ports that are connected to."
    )
    allowed_hosts: tuple[str, ...] | None = Field(
        None, description="Only these hosts, such as images.example.org or *.example.org; null for all public ones."
    )
    allowed_networks: tuple[Network, ...] = Field(
        (),
        description="Networks that are fetched from although they are not public, such as an image store's. Whoever "
        "may send a URL reaches them.",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _plain(cls, hosts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for host in hosts or ():
            if not _HOST.fullmatch(host.removeprefix("*.")):
                raise ValueError(f"{host!r} is no host name in lower case, such as images.example.org or *.example.org")
        return hosts


class FetchRefused(Exception):
    """A URL that was not fetched. `code` is a key of `CODES`, `message` is for the caller.

    `detail` is for the operator's log alone: which private address a name has is none of a stranger's business.
    """

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"{code!r} is not a documented code")
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = detail


class SystemResolver:
    """Names as this machine sees them: /etc/hosts, search domains and all."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="lookup")

    async def __call__(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Fetches URLs within `config`'s bounds. One for each event loop; `aclose` it, or use it as a context.

    A name is resolved once for each connection, all its addresses must be acceptable (one that is not says that the
    name is not what it seems), and the first that answers is used. A connection is kept for a few seconds and reused
    for the same scheme, host and port, at the address that was checked.
    """

    def __init__(self, config: FetchConfig, resolver: Resolver | None = None) -> None:
        self.config = config
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpcore2.default_ssl_context() if config.enabled else None,
            max_connections=CONNECTIONS,
            keepalive_expiry=5.0,
            network_backend=_GuardedBackend(config, resolver or SystemResolver()),
        )
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that are kept."""
        await self._pool.aclose()

    async def fetch(self, url: str, key: str = "", hold: Callable[[int], None] = lambda count: None) -> bytes:
        """The body that `url` answers a GET with.

        `hold` is told of each piece's bytes as it comes, and may raise what ends the fetch. Fetches of one `key` take
        no more than `KEY_CONNECTIONS` at once, however slow the hosts are that it names. Raises `FetchRefused`.
        """
        turn = self._turns.get(key) or self._turns.setdefault(key, asyncio.Semaphore(KEY_CONNECTIONS))
        try:
            async with turn:
                return await self._fetch(url, hold)
        except FetchRefused as refused:
            # Not the message: it may repeat a part of the URL, which may be a secret.
            log.info("a URL was not fetched: %s %s", refused.code, refused.detail)
            raise

    async def _fetch(self, url: str, hold: Callable[[int], None]) -> bytes:
        if not self.config.enabled:
            raise FetchRefused(
                "fetch_disabled",
                "this server does not fetch URLs: send the image's bytes as a data: URI or as base64 "
                "(its operator can set fetch.enabled)",
            )
        try:
            async with asyncio.timeout(self.config.max_seconds):
                return await self._follow(url, hold)
        except TimeoutError:
            raise FetchRefused(
                "fetch_timeout", f"the image did not arrive within {self.config.max_seconds:g} s"
            ) from None
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
            message = "the image's host could not be connected to, or has no valid certificate"
            raise FetchRefused("fetch_failed", message, str(error)) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise FetchRefused(
                "fetch_failed", "the image's host broke off or did not speak HTTP", str(error)
            ) from error

    async def _follow(self, url: str, hold: Callable[[int], None]) -> bytes:
        target = parse_url(url)
        for _ in range(self.config.max_redirects + 1):
            self._check(target)
            headers: dict[str | bytes, str | bytes] = {
                "Host": target.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "sightline",
            }
            request = httpcore2.URL(
                scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
            )
            async with self._pool.stream("GET", request, headers=headers) as response:
                fields = {name.lower(): value.decode("utf-8", "replace") for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in fields:
                    target = parse_url(fields[b"location"], target)
                    continue
                return await self._read(response, fields, hold)
        raise FetchRefused("fetch_failed", f"the image's URL redirects more than {self.config.max_redirects} times")

    def _check(self, target: httpx2.URL) -> None:
        """What can be refused before any look-up."""
        port = {"http": 80, "https": 443}[target.scheme] if target.port is None else target.port
        if port not in self.config.ports:
            ports = ", ".join(map(str, self.config.ports))
            raise FetchRefused("fetch_forbidden", f"port {port}: this server fetches from ports {ports} only")
        allowed = self.config.allowed_hosts
        host = target.raw_host.decode("ascii")
        if allowed is not None and not any(_matches(host, pattern) for pattern in allowed):
            raise FetchRefused("fetch_forbidden", f"{host}: not a host that this server fetches from")

    async def _read(self, response: httpcore2.Response, fields: dict[bytes, str], hold: Callable[[int], None]) -> bytes:
        """The body of an answer, no more than `max_bytes` of it."""
        if response.status != 200:
            raise FetchRefused("fetch_failed", f"the image's host answered {response.status}")
        encoding = fields.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # a few kilobytes of gzip can be gigabytes; images are compressed as is
            raise FetchRefused("fetch_encoded", f"the image's host sent it with Content-Encoding: {encoding[:20]}")
        limit = self.config.max_bytes
        too_large = FetchRefused("fetch_too_large", f"the image is larger than {limit:,} bytes")
        length = fields.get(b"content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > limit:
                raise too_large
            hold(len(chunk))
        return bytes(body)


def parse_url(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """An absolute http(s) URL in one spelling only: no credentials, no control characters, a host that means one thing.

    `base` is the URL that redirected to `text`. Raises `FetchRefused`.
    """
    where = "the image's URL" if base is None else "the image's host redirected to a URL that"
    if len(text) > MAX_URL:
        raise FetchRefused("fetch_bad_url", f"{where} is longer than {MAX_URL} characters")
    try:
        url = httpx2.URL(text) if base is None else base.join(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise FetchRefused("fetch_bad_url", f"{where} cannot be read: {error}") from None
    if url.scheme not in ("http", "https"):
        raise FetchRefused("fetch_bad_url", f"{where} does not start with http:// or https://")
    if url.userinfo:
        raise FetchRefused("fetch_bad_url", f"{where} carries a user name or password")
    host = url.raw_host.decode("ascii").removesuffix(".")
    if ":" not in host:  # else IPv6, which httpx2 has parsed
        if not _HOST.fullmatch(host):
            raise FetchRefused("fetch_bad_url", f"{where} has no valid host name")
        if _NUMBER.fullmatch(host.rpartition(".")[2]) and parse_address(host) is None:
            raise FetchRefused("fetch_bad_url", f"{where} has a host that is not four decimal numbers from 0 to 255")
    return url.copy_with(host=host)


class _GuardedBackend(httpcore2.AnyIOBackend):
    """Opens sockets to acceptable addresses only. Every connection of the pool comes from here."""

    def __init__(self, config: FetchConfig, resolver: Resolver) -> None:
        self._config = config
        self._resolver = resolver

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._resolve(host)
        for address in addresses[:CONNECT_ADDRESSES]:
            try:
                return await super().connect_tcp(str(address), port, CONNECT_SECONDS, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _resolve(self, host: str) -> list[Address]:
        """The addresses of `host`, all of them acceptable.

        A name without an address and one with an internal address are refused with the same words: a stranger is
        not to learn which names exist inside.
        """
        literal = parse_address(host)
        try:
            answers = [host] if literal else await self._resolver(host)
        except (OSError, UnicodeError) as error:
            answers, why = [], str(error)
        else:
            why = "no address"
        addresses = [parse_address(answer) for answer in answers]
        for answer, address in zip(answers, addresses, strict=True):
            kind = self._refuse(address)
            if kind:
                addresses, why = [], f"{answer} is {kind}"
                break
        if not addresses:
            reason = why if literal else "it has no public address"
            raise FetchRefused("fetch_forbidden", f"{host}: this server does not fetch from it: {reason}", why)
        return [address for address in addresses if address is not None]

    def _refuse(self, address: Address | None) -> str | None:
        if address is None:
            return "not an address"
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            return "bound to an interface"
        if any(address in network for network in self._config.allowed_networks):
            return None
        return classify_address(address)


def _matches(host: str, pattern: str) -> bool:
    """Whether a host is the pattern, or under it when the pattern starts with `*.`"""
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
