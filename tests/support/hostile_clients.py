"""Hostile clients: they disconnect early, stall, flood, and send decompression bombs and garbage.

They run in a process of their own, so that they do not slow down the well-behaved clients of the test.

    python -m tests.support.hostile_clients PORT KEY SECONDS

Their number is fixed. All end after SECONDS.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable

from tests.support.endpoint import data_uri, shape_png

BOMB = (
    bytes.fromhex("524946462600000057454250565038580a0000000000000000")
    + b"\xff\x1f\x00\xff\x1f\x00VP8L\x05\x00\x00\x00/\x00\x00\x00\x00"
)
"""A WebP whose header claims 8,192 x 8,192 pixels."""


class HostileClients:
    """The target, the deadline and the count of requests that all hostile clients share."""

    def __init__(self, port: int, key: str, seconds: float) -> None:
        self.port = port
        self.key = key
        self.end = time.monotonic() + seconds
        self.random = random.Random(0)
        self.requests = 0

    def request(self, path: str, body: bytes, kind: str = "application/json", extra: str = "") -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\nContent-Type: {kind}\r\n"
        )
        return f"{head}{extra}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    async def send(self, data: bytes, wait: float) -> None:
        """Send, wait at most `wait` seconds for a response, then abort the connection."""
        self.requests += 1
        writer = None
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port), 5)
            writer.write(data)
            await asyncio.wait_for(reader.read(), wait)
        except (OSError, TimeoutError):
            pass
        finally:
            if writer is not None:
                writer.transport.abort()

    async def disconnect(self) -> None:
        body = json.dumps({"image": data_uri(shape_png()), "labels": [f"thing {self.random.random()}"]}).encode()
        await self.send(self.request("/v1/classify", body), self.random.random() * 0.1)

    async def stall(self) -> None:
        data = self.request("/v1/classify", bytes(200_000))
        await self.send(data[: self.random.randrange(len(data))], 20)

    async def flood(self) -> None:
        body = json.dumps({"images": [data_uri(shape_png())] * 64, "label_set": "shapes"}).encode()
        await self.send(self.request("/v1/classify", body), 60)

    async def send_bomb(self) -> None:
        uri = f"data:image/webp;base64,{base64.b64encode(BOMB).decode()}"
        kinds = [
            self.request("/v1/classify", json.dumps({"images": [uri] * 64, "labels": ["a"]}).encode()),
            self.request("/v1/embeddings", gzip.compress(bytes(80 * 2**20)), extra="Content-Encoding: gzip\r\n"),
            self.request("/v1/embeddings", b'{"model": "tiny", "input": [' + b"{}," * 300_000 + b"{}]}"),
            self.request("/v1/embeddings", b"[" * 500_000),
            self.request("/v1/embeddings", json.dumps({"model": "tiny", "input": [1] * 150_000}).encode()),
            self.request("/v1/classify", (b"--x\r\n\r\n" * 50_000), "multipart/form-data; boundary=x"),
        ]
        await self.send(self.random.choice(kinds), 30)
        await asyncio.sleep(0.2)

    async def send_garbage(self) -> None:
        noise = self.random.randbytes(self.random.randrange(1, 4000))
        kinds = [
            noise,
            b"GET /" + noise,
            self.request("/v1/classify", noise),
            self.request("/", noise, "image/jpeg"),
            f"GET /{'a' * 30_000} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n" + noise,
            b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33554432\r\n\r\n" + bytes(2**20),
        ]
        await self.send(self.random.choice(kinds), 5)
        await asyncio.sleep(0.1)


async def run(clients: HostileClients) -> None:
    """Run all clients until the deadline, then print how many requests they sent."""
    kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
        (clients.disconnect, 6),
        (clients.stall, 20),
        (clients.flood, 6),
        (clients.send_bomb, 3),
        (clients.send_garbage, 4),
    ]

    async def keep(act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < clients.end:
            await act()

    tasks = [asyncio.create_task(keep(act)) for act, count in kinds for _ in range(count)]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*tasks), max(0.0, clients.end - time.monotonic()) + 5)
    print(clients.requests)


if __name__ == "__main__":
    os.nice(5)  # in production hostile clients do not use the server's cores
    asyncio.run(run(HostileClients(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
