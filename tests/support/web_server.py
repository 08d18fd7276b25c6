"""A web server on loopback with a fixed response for each path, also responses that no honest server gives."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakSet

Respond = Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes = b"", status: str = "200 OK", length: int | None = None, **fields: str) -> Respond:
    """A response that closes the connection."""

    async def write(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8") + body)
        await writer.drain()

    return write


def redirect(location: str, status: str = "302 Found") -> Respond:
    return reply(status=status, Location=location)


def drip(piece: bytes, seconds: float, start: bytes = b"") -> Respond:
    """`start`, then `piece` every `seconds`, without end."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(seconds)

    return write


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


class Web:
    """A loopback HTTP server with a fixed response for each path.

    `seen` has the heads of its requests as text, and `most` is the largest number of requests at the same time.
    """

    def __init__(self, responses: Mapping[str, Respond]) -> None:
        self.responses: Mapping[str, Respond] = responses
        self.seen: list[str] = []
        self.now = self.most = 0
        self.writers: WeakSet[asyncio.StreamWriter] = WeakSet()
        self.port = 0
        self.server_names: list[str | None] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.seen.append(head)
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await self.responses[head.split()[1]](writer)
            finally:
                self.now -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
        if tls:
            tls.sni_callback = lambda _socket, name, _context: self.server_names.append(name)
        server = await asyncio.start_server(self.handle, host, 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


@contextmanager
def serve(responses: Mapping[str, Respond], host: str = "127.0.0.1") -> Iterator[Web]:
    """Run a server in a thread, for a test that fetches in another one. It stops with the block."""
    web = Web(responses)
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with web.run(host):
            started.set()
            await stop.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in web.writers:  # some have bytes that nobody reads
            writer.transport.abort()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=loop.run_until_complete, args=[run()], daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield web
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def url_of(web: Web, path: str, host: str = "127.0.0.1") -> str:
    """The URL of a path of a server."""
    return f"http://{host}:{web.port}{path}"


def then(*responses: Respond) -> Respond:
    """These responses one after the other, for each request one, and the last one for ever."""
    left = list(responses)

    async def write(writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(writer)

    return write


async def reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a reset, in the place of a response."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
