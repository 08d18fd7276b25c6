"""A TCP proxy that adds latency, so that a store on loopback responds as slowly as a remote one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class DelayProxy:
    """A proxy that delays what clients send by `seconds`, and passes responses on at once.

    `at_once` is the largest number of messages that were delayed at the same time.
    """

    def __init__(self, upstream: str, seconds: float) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname, address.port)
        self.seconds = seconds
        self.at_once = 0
        self._waiting = 0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = "http://{}:{}".format(*self._server.sockets[0].getsockname())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, and close all connections."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection(*self._upstream)
            try:
                await asyncio.gather(self._pass(reader, back, self.seconds), self._pass(there, writer, 0))
            finally:
                back.close()
                writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        while data := await reader.read(2**16):
            if seconds:
                self._waiting += 1
                self.at_once = max(self.at_once, self._waiting)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self._waiting -= 1
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()


@contextmanager
def delay_proxy(upstream: str, seconds: float) -> Iterator[DelayProxy]:
    """Run a proxy in front of `upstream`, an http URL, until the `with` block ends."""
    proxy = DelayProxy(upstream, seconds)
    try:
        yield proxy
    finally:
        proxy.stop()
