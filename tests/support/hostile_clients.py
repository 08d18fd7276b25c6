"""Hostile clients: they disconnect early, stall, flood, hold idle connections, and send bombs and garbage.

They run in a process of their own, so that they do not slow down the well-behaved clients of the test, and connect
from an address of their own, 127.0.0.2.

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
import resource
import sys
import time
from collections.abc import Awaitable, Callable

from tests.support.endpoint import data_uri, shape_png

BOMB = (
    bytes.fromhex("524946462600000057454250565038580a0000000000000000")
    + b"\xff\x1f\x00\xff\x1f\x00VP8L\x05\x00\x00\x00/\x00\x00\x00\x00"
)
"""A WebP whose header claims 8,192 x 8,192 pixels."""
SOURCE = "127.0.0.2"
"""The address that the clients connect from. All of 127.0.0.0/8 is loopback on Linux."""
IDLE = 4200
"""Connections that one client opens and leaves idle: more than HAProxy's usual limit for all sources together."""
TEXTS = [f"text number {n}" for n in range(2048)]
"""A full batch of OpenAI's clients."""


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

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(SOURCE, 0))

    async def send(self, data: bytes, wait: float) -> None:
        """Send, wait at most `wait` seconds for a response, then abort the connection."""
        self.requests += 1
        writer = None
        try:
            reader, writer = await asyncio.wait_for(self.connect(), 5)
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

    async def ask_for_large_responses(self) -> None:
        images = [data_uri(shape_png(seed=n)) for n in range(4)] * 16
        kinds = [
            ("/v1/similarity", {"texts": TEXTS, "images": images}),
            ("/v1/embeddings", {"model": "tiny", "input": TEXTS, "encoding_format": "float"}),
            ("/v1/classify", {"images": images, "labels": [f"thing {n}" for n in range(1000)]}),
        ]
        path, body = self.random.choice(kinds)
        await self.send(self.request(path, json.dumps(body).encode()), 60)

    async def pollute_label_cache(self) -> None:
        words = [self.random.randbytes(4).hex() for _ in range(20)]
        templates = [f"{' '.join(self.random.sample(words, 8))} {{label}} {n}" for n in range(1000)]
        body = json.dumps({"image": data_uri(shape_png()), "labels": [words[0]], "templates": templates}).encode()
        await self.send(self.request("/v1/classify", gzip.compress(body), extra="Content-Encoding: gzip\r\n"), 60)
        await asyncio.sleep(0.5)

    async def send_echo_bomb(self) -> None:
        name = json.dumps("x" * 30_000_000)
        bodies = [
            f'{{{name}: 1, "image": "a", "labels": ["a"]}}',
            f'{{"model": {name}, "input": "a"}}',
            f'{{"image": "a", "label_set": {name}}}',
        ]
        packed = gzip.compress(self.random.choice(bodies).encode(), 1)
        path = "/v1/embeddings" if self.random.random() < 0.3 else "/v1/classify"
        await self.send(self.request(path, packed, extra="Content-Encoding: gzip\r\n"), 30)
        await asyncio.sleep(1)

    async def send_full_batches(self) -> None:
        body = json.dumps({"model": "tiny", "input": TEXTS, "encoding_format": "base64"}).encode()
        await asyncio.gather(*(self.send(self.request("/v1/embeddings", body), 60) for _ in range(5)))

    async def hold_idle_connections(self) -> None:
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writers = []
        for _ in range(IDLE):
            self.requests += 1
            try:
                _, writer = await asyncio.wait_for(self.connect(), 5)
            except (OSError, TimeoutError):
                await asyncio.sleep(0.1)
                continue
            writer.write(request)
            writers.append(writer)
            if time.monotonic() > self.end:
                break
        await asyncio.sleep(min(20.0, max(0.0, self.end - time.monotonic())))
        for writer in writers:
            writer.transport.abort()

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
        (clients.ask_for_large_responses, 2),
        (clients.pollute_label_cache, 1),
        (clients.send_echo_bomb, 1),
        (clients.send_full_batches, 1),
        (clients.hold_idle_connections, 1),
    ]

    async def keep(act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < clients.end:
            await act()

    tasks = [asyncio.create_task(keep(act)) for act, count in kinds for _ in range(count)]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*tasks), max(0.0, clients.end - time.monotonic()) + 5)
    print(clients.requests)


if __name__ == "__main__":
    os.nice(19)  # in production hostile clients do not use the server's cores; Ray's workers have 15
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    asyncio.run(run(HostileClients(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
