"""The memory of a reader for images from the web, whose sizes are known only when they have arrived."""

from __future__ import annotations

import asyncio

KEPT_BYTES, MOST_BYTES = 64 * 2**20, 128 * 2**20
"""With so many bytes of images that arrive or wait for a decoder, no further image is begun; and the most bytes that
are held. An image that arrives when they are full is dropped, and fetched once more when there is room, alone."""


class NoRoom(Exception):
    """An image arrived when the memory for images was full."""


class Memory:
    """Counts the bytes of images that are arriving or wait for a decoder. Belongs to one event loop.

    It never has more than `MOST_BYTES` and one image that was fetched alone.
    """

    def __init__(self) -> None:
        self.held = 0
        self.most = 0
        """The most bytes that were held."""
        self._room = asyncio.Event()

    def take(self, count: int, must: bool) -> None:
        """Count bytes that have arrived. Raises `NoRoom` if there is no room for them, unless they `must` stay."""
        if not must and self.held + count > MOST_BYTES:
            raise NoRoom
        self.held += count
        self.most = max(self.most, self.held)

    def free(self, count: int) -> None:
        """Count bytes that are not held any more."""
        self.held -= count
        self._room.set()

    async def wait(self) -> None:
        """Wait until an image may be begun."""
        while self.held >= KEPT_BYTES:
            self._room.clear()
            await self._room.wait()
