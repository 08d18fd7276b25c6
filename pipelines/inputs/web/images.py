"""Images that lists name by http(s) URLs: many are fetched at once, and each comes when it has arrived."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from queue import SimpleQueue

from pipelines.inputs.rows import Input, Reading, Row
from pipelines.inputs.web.config import FetchConfig
from pipelines.inputs.web.fetch import Fetched, ImageFetcher
from siglip.images.decode import ImageRejected
from storage.settings import ConfigError

RESPONSE_KEY = "sightline:http"
"""The key in a row's metadata that holds what the host said of the image: its final URL, ETag, and more."""
_WINDOW = 4096
"""The most images that are begun and not yet there. Most of them wait: for their host, for a connection, for memory."""

_Arrived = tuple[str, Fetched]


class _Loop:
    """A thread with an event loop, and its fetcher. Lives as long as the process, so that connections are kept."""

    def __init__(self, config: FetchConfig, max_bytes: int) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="fetch", daemon=True).start()
        self.fetcher = asyncio.run_coroutine_threadsafe(self._open(config, max_bytes), self.loop).result()

    async def _open(self, config: FetchConfig, max_bytes: int) -> ImageFetcher:
        return ImageFetcher(config, max_bytes)

    def free(self, fetched: Fetched) -> None:
        """Tell the fetcher that an image's bytes are not held any more."""
        if isinstance(fetched.found, bytes):
            self.loop.call_soon_threadsafe(self.fetcher.memory.free, len(fetched.found))


def fetch_urls(planned: Sequence[tuple[int, Input]], reading: Reading) -> Iterator[tuple[Input, Row]]:
    """Yield a row for each input, which is given with the row's number. Images come as they arrive, not in order.

    A URL that several inputs have is fetched once, and their rows, which share the bytes, come one after the other. No
    image waits for another one of another host, except for a connection. Raises `ConfigError` if fetching is not
    enabled.
    """
    if not planned:
        return
    if not reading.fetch.enabled:
        raise ConfigError(f"{len(planned):,} images of this shard are http(s) URLs: set fetch.enabled: true")
    inputs: dict[str, list[tuple[int, Input]]] = {}
    for number, item in planned:
        inputs.setdefault(item.uri, []).append((number, item))
    loop = _open_loop(reading.fetch, reading.max_bytes)
    arrived: SimpleQueue[_Arrived | None] = SimpleQueue()
    fetching = asyncio.run_coroutine_threadsafe(
        _fetch_all(loop.fetcher, list(inputs), reading.last, arrived), loop.loop
    )
    ended = False
    try:
        while (one := arrived.get()) is not None:
            url, fetched = one
            try:
                for number, item in inputs[url]:
                    yield item, _make_row(number, item, fetched)
            finally:
                loop.free(fetched)
        ended = True
        fetching.result()
    finally:
        if not ended:  # the reader has stopped early
            fetching.cancel()
            while (one := arrived.get()) is not None:
                loop.free(one[1])


async def _fetch_all(
    fetcher: ImageFetcher, urls: Sequence[str], last: bool, arrived: SimpleQueue[_Arrived | None]
) -> None:
    window = asyncio.Semaphore(_WINDOW)

    async def fetch(url: str) -> None:
        try:
            arrived.put((url, await fetcher.fetch(url, last)))
        finally:
            window.release()

    try:
        async with asyncio.TaskGroup() as group:
            for url in urls:
                await window.acquire()
                group.create_task(fetch(url))
    finally:
        arrived.put(None)


def _make_row(number: int, item: Input, fetched: Fetched) -> Row:
    metadata = item.metadata
    if fetched.response is not None:
        added = json.dumps({RESPONSE_KEY: fetched.response}, ensure_ascii=False)
        # Joined as texts, so that the list's own values stay as they are.
        metadata = added if not metadata or metadata == "{}" else f"{metadata[:-1]}, {added[1:]}"
    row = Row(item.key, item.uri, metadata=metadata, note=fetched.note, trouble=fetched.trouble, number=number)
    row.data, row.rejected = (
        (None, fetched.found) if isinstance(fetched.found, ImageRejected) else (fetched.found, None)
    )
    return row


@cache
def _open_loop(config: FetchConfig, max_bytes: int) -> _Loop:
    return _Loop(config, max_bytes)
