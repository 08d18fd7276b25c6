"""The guard of fetching by URL: which URLs, hosts, ports and addresses may be fetched from.

The check is at the place where a socket is opened: it checks the IP address of each connection, also after a redirect,
and the connection goes to exactly this address. No second DNS lookup can return another address (DNS rebinding). Safety
therefore does not depend on how a parser reads an ambiguous URL. Ambiguous URLs are refused anyway, so that their
senders get an error message.

The check does not know which public addresses lead into this network, such as NAT64 under the network's own prefix or
a public address of an internal load balancer. A network policy that blocks internal addresses for the process that
fetches is the second protection. Proxies named in environment variables are not used, because the proxy would do the
DNS lookup.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address
from typing import Annotated

import httpcore2
import httpx2
from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.store import show
from storage.web.addresses import Address, Network, classify_address, parse_address

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Returns all IP addresses of a host name. Raises `OSError` if there are none."""

MAX_URL = 8192
"""Largest number of characters in a URL. Signed URLs of object stores have about 2,000."""
CONNECT_SECONDS = 3.0
CONNECT_ADDRESSES = 4
"""Timeout for connecting to one address, and how many of a host's addresses are tried."""
LOOKUPS = 8
"""Threads for DNS lookups. A slow DNS server blocks a thread, so no other work uses these threads."""

CODES: dict[str, str] = {
    "fetch_disabled": "fetching URLs is disabled on this server",
    "fetch_bad_url": "not a plain http or https URL, or its host is ambiguous",
    "fetch_forbidden": "this server does not fetch from the host, its address or its port",
    "fetch_failed": "no connection, no valid certificate, too many redirects, or a response other than 200",
    "fetch_encoded": "the response is compressed, although the request asked for no compression",
    "fetch_too_large": "the response is larger than fetch.max_bytes",
    "fetch_timeout": "the response did not arrive within fetch.max_seconds",
}
"""All codes of `FetchRefused`, with their meanings."""

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# The URL Standard's rule: a host whose last part is a number is an IPv4 address, even 2130706433 or 0x7f.1.
_NUMBER = re.compile(r"([0-9]+|0x[0-9a-f]*)")


class GuardConfig(BaseModel):
    """Settings of the guard: from which hosts, ports and networks to fetch, and the limits of one fetch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_seconds: float = Field(10.0, gt=0, description="Seconds for the whole fetch: DNS lookups, redirects, body.")
    max_redirects: int = Field(3, ge=0, description="Redirects to follow; each is checked like the first URL.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field((80, 443), description="Allowed ports.")
    allowed_hosts: tuple[str, ...] | None = Field(
        None, description="Only these hosts, such as images.example.org or *.example.org; null is every public host."
    )
    allowed_networks: tuple[Network, ...] = Field(
        (),
        description="Networks that are not public and still allowed, such as an internal image store's. Everyone who "
        "may name a URL can reach them.",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _plain(cls, hosts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for host in hosts or ():
            if not _HOST.fullmatch(host.removeprefix("*.")):
                raise ValueError(
                    f"{host!r} is not a host name in lower case, such as images.example.org or *.example.org"
                )
        return hosts


class FetchRefused(Exception):
    """A fetch was refused or failed. `code` is a key of `CODES`, `message` is for the one who named the URL.

    `detail` is for the operator only, because a client must not learn which private address a host name has.

    `passing` tells whether the same fetch may succeed later: the name was not found, the host could not be connected
    to, broke off or was too slow, or answered 408, 425, 429 or 5xx. Otherwise the refusal is about the URL itself.
    `status` is the HTTP status of the last response, if it is complete, and `fields` are its header fields, also if its
    body broke off.
    """

    def __init__(
        self,
        code: str,
        message: str,
        detail: str = "",
        *,
        passing: bool = False,
        status: int | None = None,
        fields: dict[bytes, str] | None = None,
    ) -> None:
        if code not in CODES:
            raise KeyError(f"{code!r} is not a documented code")
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = detail
        self.passing = passing
        self.status = status
        self.fields = fields or {}


class SystemResolver:
    """Resolves host names with the operating system's resolver, including /etc/hosts and search domains."""

    def __init__(self, threads: int = LOOKUPS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns-lookup")

    async def __call__(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


def parse_url(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """Parse an absolute, unambiguous http(s) URL: no credentials, no control characters, one reading of the host.

    `base` is the URL that redirected to `text`. Raises `FetchRefused`.
    """
    where = "the image's URL" if base is None else "the image's host redirected to a URL that"
    if len(text) > MAX_URL:
        raise FetchRefused("fetch_bad_url", f"{where} is longer than {MAX_URL} characters")
    try:
        url = httpx2.URL(text) if base is None else base.join(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise FetchRefused("fetch_bad_url", f"{where} cannot be read: {show(str(error))}") from None
    if url.scheme not in ("http", "https"):
        raise FetchRefused("fetch_bad_url", f"{where} does not start with http:// or https://")
    if url.userinfo:
        raise FetchRefused("fetch_bad_url", f"{where} carries a user name or password")
    host = url.raw_host.decode("ascii").removesuffix(".")
    if ":" not in host:  # a host with a colon is an IPv6 address, which httpx2 has validated
        if not _HOST.fullmatch(host):
            raise FetchRefused("fetch_bad_url", f"{where} has no valid host name")
        if _NUMBER.fullmatch(host.rpartition(".")[2]) and parse_address(host) is None:
            raise FetchRefused("fetch_bad_url", f"{where} has a host that is not four decimal numbers from 0 to 255")
    return url.copy_with(host=host)


def check_target(target: httpx2.URL, config: GuardConfig) -> None:
    """Check what needs no DNS lookup: port and host name. Raises `FetchRefused`."""
    port = {"http": 80, "https": 443}[target.scheme] if target.port is None else target.port
    if port not in config.ports:
        ports = ", ".join(map(str, config.ports))
        raise FetchRefused("fetch_forbidden", f"port {port}: this server fetches from ports {ports} only")
    allowed = config.allowed_hosts
    host = target.raw_host.decode("ascii")
    if allowed is not None and not any(_matches(host, pattern) for pattern in allowed):
        raise FetchRefused("fetch_forbidden", f"{show(host)}: this server does not fetch from this host")


class GuardedBackend(httpcore2.AnyIOBackend):
    """Network backend that connects to allowed addresses only. The pool opens every connection with it."""

    def __init__(self, config: GuardConfig, resolver: Resolver) -> None:
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
        """Connect to the first address of `host` that accepts a connection. Raises `FetchRefused`."""
        addresses = await self._resolve(host)
        for address in addresses[:CONNECT_ADDRESSES]:
            try:
                return await super().connect_tcp(str(address), port, CONNECT_SECONDS, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _resolve(self, host: str) -> list[Address]:
        """Return the addresses of `host`. Raises `FetchRefused` unless all of them are allowed.

        A host name without an address and a host name with an internal address get the same message, so that a client
        cannot find out which internal names exist.
        """
        literal = parse_address(host)
        passing = False
        try:
            answers = [host] if literal else await self._resolver(host)
        except (OSError, UnicodeError) as error:
            answers, why, passing = [], str(error), isinstance(error, OSError)
        else:
            why = "no address"
        addresses = [parse_address(answer) for answer in answers]
        for answer, address in zip(answers, addresses, strict=True):
            reason = self._refusal_reason(address)
            if reason:
                addresses, why = [], f"{answer} is {reason}"
                break
        if not addresses:
            shown = why if literal else "it has no public address"
            message = f"{show(host)}: this server does not fetch from it: {shown}"
            raise FetchRefused("fetch_forbidden", message, why, passing=passing)
        return [address for address in addresses if address is not None]

    def _refusal_reason(self, address: Address | None) -> str | None:
        """Return why this server must not connect to an IP address, or None if it may. `None` is not an IP address."""
        if address is None:
            return "not an address"
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            return "bound to an interface"
        if any(address in network for network in self._config.allowed_networks):
            return None
        return classify_address(address)


def _matches(host: str, pattern: str) -> bool:
    """Whether a host equals the pattern, or is a subdomain of it if the pattern starts with `*.`"""
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
