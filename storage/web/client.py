"""An HTTP client that gets one image by its URL: guarded, with redirects, and bounded in bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpcore2

from storage.store import show
from storage.web.guard import (
    FetchRefused,
    GuardConfig,
    GuardedBackend,
    Resolver,
    SystemResolver,
    check_target,
    parse_url,
)

USER_AGENT = "sightline"
"""What a request says of its sender, unless it is configured."""
PASSING = frozenset((408, 425, 429, *range(500, 600)))
"""Statuses that say that the host is in trouble or wants to be left alone, and nothing about the image."""

_BROKEN_OFF = "the image's host closed the connection early or did not speak HTTP"


@dataclass(frozen=True)
class Response:
    """A response of status 200: its body, the URL that it came from after all redirects, and its header fields.

    The names of `fields` are in lower case. The values of a field that comes several times are joined by line feeds.
    """

    body: bytes
    url: str
    fields: dict[bytes, str]


class WebClient:
    """HTTP client that gets URLs within the limits of `config`. Each event loop needs its own.

    Use it as an async context manager, or call `aclose`. At most `connections` connections are open at the same time;
    further requests wait, and the wait counts towards `max_seconds`. Bodies have at most `max_bytes`.

    A host name is resolved once for each connection. All its addresses must be allowed, because a host name with a
    forbidden address is suspicious. The first address that accepts a connection is used. An idle connection is kept for
    5 s and reused for the same scheme, host and port, so still at the checked address. If `tls` is false, https URLs
    cannot be fetched, and no certificates are loaded.
    """

    def __init__(
        self,
        config: GuardConfig,
        max_bytes: int,
        connections: int,
        user_agent: str = USER_AGENT,
        resolver: Resolver | None = None,
        tls: bool = True,
    ) -> None:
        self._config, self._max_bytes, self._user_agent = config, max_bytes, user_agent
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpcore2.default_ssl_context() if tls else None,
            max_connections=connections,
            keepalive_expiry=5.0,
            network_backend=GuardedBackend(config, resolver or SystemResolver()),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def get(self, url: str, hold: Callable[[int], None] = lambda count: None) -> Response:
        """GET `url`, and follow its redirects.

        `hold` is called with the number of bytes of each chunk when it arrives. An exception that it raises ends the
        fetch. Raises `FetchRefused`.
        """
        try:
            async with asyncio.timeout(self._config.max_seconds):
                return await self._follow(url, hold)
        except TimeoutError:
            message = f"the image did not arrive within {self._config.max_seconds:g} s"
            raise FetchRefused("fetch_timeout", message, passing=True) from None
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
            message = "the image's host could not be connected to, or has no valid certificate"
            raise FetchRefused("fetch_failed", message, str(error), passing=True) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise FetchRefused("fetch_failed", _BROKEN_OFF, str(error), passing=True) from error

    async def _follow(self, url: str, hold: Callable[[int], None]) -> Response:
        target = parse_url(url)
        for _ in range(self._config.max_redirects + 1):
            check_target(target, self._config)
            headers: dict[str | bytes, str | bytes] = {
                "Host": target.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": self._user_agent,
            }
            request = httpcore2.URL(
                scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
            )
            async with self._pool.stream("GET", request, headers=headers) as response:
                fields: dict[bytes, str] = {}
                for name, value in response.headers:
                    text = value.decode("utf-8", "replace")
                    fields[name.lower()] = f"{fields[name.lower()]}\n{text}" if name.lower() in fields else text
                if response.status in (301, 302, 303, 307, 308) and b"location" in fields:
                    target = parse_url(fields[b"location"], target)
                    continue
                body = await self._read(response, fields, hold)
                return Response(body, str(target.copy_with(fragment=None)), fields)
        raise FetchRefused("fetch_failed", f"the image's URL redirects more than {self._config.max_redirects} times")

    async def _read(self, response: httpcore2.Response, fields: dict[bytes, str], hold: Callable[[int], None]) -> bytes:
        """Read the body of a response, up to `max_bytes`. Raises `FetchRefused`."""
        status = response.status
        if status != 200:
            message = f"the image's host answered {status}"
            raise FetchRefused("fetch_failed", message, passing=status in PASSING, status=status, fields=fields)
        encoding = fields.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # a few kB of gzip can expand to GB, and images are compressed anyway
            message = f"the image's host sent it with Content-Encoding: '{show(encoding)}'"
            raise FetchRefused("fetch_encoded", message, status=status, fields=fields)
        limit = self._max_bytes
        too_large = FetchRefused(
            "fetch_too_large", f"the image is larger than {limit:,} bytes", status=status, fields=fields
        )
        length = fields.get(b"content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:  # Python refuses to read thousands of digits
            raise too_large
        body = bytearray()
        try:
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
                hold(len(chunk))
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise FetchRefused("fetch_failed", _BROKEN_OFF, str(error), passing=True, fields=fields) from error
        return bytes(body)
