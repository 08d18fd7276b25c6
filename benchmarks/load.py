"""A load generator that costs little: raw HTTP/1.1 on kept connections, each sending its next request on an answer.

    python -m benchmarks.load HOST:PORT PATH BODY_FILE CLIENTS SECONDS

Prints JSON: successes/s, their latencies in milliseconds, and all statuses. Real clients cost more, and this
machine's cores are the server's too.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


class _Client(asyncio.Protocol):
    """One connection. It parses as much of an answer as it takes to know where it ends."""

    def __init__(self, request: bytes, load: _Load) -> None:
        self.request = request
        self.load = load
        self.buffer = bytearray()
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        del self.buffer[: end + 4 + length]
        self.load.count(int(head[9:12]), time.perf_counter() - self.sent)
        if time.perf_counter() < self.load.end:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.load.closed()

    def _send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)


class _Load:
    def __init__(self, clients: int, seconds: float) -> None:
        self.begin = time.perf_counter()
        self.end = self.begin + seconds
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.open = clients
        self.done = asyncio.Event()

    def count(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        if status == 200 and time.perf_counter() <= self.end:
            self.latencies.append(seconds)

    def closed(self) -> None:
        self.open -= 1
        if not self.open:
            self.done.set()


async def send_load(host: str, port: int, path: str, body: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Keep `clients` requests in flight for `seconds`, and sum up."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    load = _Load(clients, seconds)
    loop = asyncio.get_running_loop()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(request, load), host, port)
    await asyncio.wait_for(load.done.wait(), seconds + 120)
    latencies = sorted(load.latencies)
    p50, p99 = (1000 * latencies[int(share * (len(latencies) - 1))] if latencies else 0.0 for share in (0.5, 0.99))
    return {
        "rate": len(latencies) / seconds,
        "p50": round(p50, 1),
        "p99": round(p99, 1),
        "statuses": dict(load.statuses),
    }


if __name__ == "__main__":
    address, path, body_file, clients, seconds = sys.argv[1:]
    host, _, port = address.partition(":")
    body = Path(body_file).read_bytes()
    print(json.dumps(asyncio.run(send_load(host, int(port), path, body, int(clients), float(seconds)))))
