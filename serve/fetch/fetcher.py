"""Fetching images by URLs from untrusted clients. What may be fetched is decided by the guard, `storage.web.guard`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from pydantic import Field

from serve.log import log
from storage.web.client import WebClient
from storage.web.guard import FetchRefused, GuardConfig, Resolver

CONNECTIONS = 64
"""Connections open at the same time. Further fetches wait, and the wait counts towards `max_seconds`."""
KEY_CONNECTIONS = 16
"""Fetches of one API key at the same time. Its further fetches wait, and this wait does not count towards
`max_seconds`."""


class FetchConfig(GuardConfig):
    """Settings for fetching images by URL: whether, from which hosts, and the limits of one fetch."""

    enabled: bool = Field(False, description="Fetch images by URL. If false, clients have to send the image itself.")
    max_bytes: int = Field(20 * 2**20, gt=0, description="Largest response, in bytes.")


class Fetcher:
    """Fetches the URLs of clients within the limits of `config`, and fairly: each API key has a few connections.

    Each event loop needs its own. Use it as an async context manager, or call `aclose`.
    """

    def __init__(self, config: FetchConfig, resolver: Resolver | None = None) -> None:
        self.config = config
        self._client = WebClient(config, config.max_bytes, CONNECTIONS, resolver=resolver, tls=config.enabled)
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def fetch(self, url: str, key: str = "", hold: Callable[[int], None] = lambda count: None) -> bytes:
        """GET `url` and return the body.

        `hold` is called with the number of bytes of each chunk when it arrives. An exception that it raises ends the
        fetch. Fetches of one `key` use at most `KEY_CONNECTIONS` at the same time, however slow the hosts are. Raises
        `FetchRefused`.
        """
        slots = self._slots.get(key) or self._slots.setdefault(key, asyncio.Semaphore(KEY_CONNECTIONS))
        try:
            async with slots:
                if not self.config.enabled:
                    raise FetchRefused(
                        "fetch_disabled",
                        "this server does not fetch URLs: send the image's bytes as a data: URI or as base64 "
                        "(its operator can set fetch.enabled)",
                    )
                return (await self._client.get(url, hold)).body
        except FetchRefused as refused:
            # The message is not logged, because it may repeat a part of the URL, which may be secret.
            log.info("a URL was not fetched: %s %s", refused.code, refused.detail)
            raise
