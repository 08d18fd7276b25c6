"""A load generator that needs little CPU time: raw HTTP/1.1 on persistent connections.

Each connection sends its next request when the response to the previous one has arrived. A connection that the server
closes is opened again; HAProxy closes connections when it loads a new configuration. A request without a response
counts as status 0.

    python -m benchmarks.load HOST:PORT PATH BODY_FILE CLIENTS WARM_SECONDS SECONDS

Prints JSON: successes/s, their latencies in milliseconds, and the counts of all statuses. Requests of the first
WARM_SECONDS do not count, because a server with large batches needs some batches until they are full. Real clients need
more CPU time than this one, and it runs on the server's cores.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

RETRY_SECONDS = 0.1
"""Seconds until a refused connection is tried again."""


class _Client(asyncio.Protocol):
    """One connection. It parses only as much of a response as is needed to find its end."""

    def __init__(self, load: _Load) -> None:
        self.load = load
        self.buffer = bytearray()
        self.sent = 0.0
        self.pending = False

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
        self.pending = False
        self.load.count(int(head[9:12]), time.perf_counter() - self.sent)
        if b"connection: close" in head or time.perf_counter() >= self.load.end:
            self.transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self.pending:
            self.load.count(0, 0.0)
        self.load.connect()

    def _send(self) -> None:
        self.pending = True
        self.sent = time.perf_counter()
        self.transport.write(self.load.request)


class _Load:
    def __init__(self, host: str, port: int, request: bytes, clients: int, warm: float, seconds: float) -> None:
        self.host, self.port = host, port
        self.request = request
        self.begin = time.perf_counter() + warm
        self.end = self.begin + seconds
        self.first = self.last = self.begin
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.open_connections = clients
        self.done = asyncio.Event()

    def count(self, status: int, seconds: float) -> None:
        now = time.perf_counter()
        if self.begin <= now:
            self.statuses[status] += 1
        if status == 200 and now <= self.end:
            if self.begin <= now:
                self.latencies.append(seconds)
                self.last = now
            else:
                self.first = now

    def rate(self) -> float:
        """Return successes/s, from the last success before counting started to the last counted success.

        A model answers one batch at a time, so with fixed times the result would depend on one batch more or less.
        """
        return len(self.latencies) / (self.last - self.first) if self.latencies else 0.0

    def connect(self) -> None:
        """Open a connection to replace one that was lost, unless the time is over."""
        if time.perf_counter() >= self.end:
            self.open_connections -= 1
            if not self.open_connections:
                self.done.set()
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.create_connection(lambda: _Client(self), self.host, self.port))
        self.tasks.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if task.exception():
            self.count(0, 0.0)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.connect)


async def send_load(
    host: str, port: int, path: str, body: bytes, clients: int, warm: float, seconds: float
) -> dict[str, Any]:
    """Keep `clients` requests in flight for `warm` and then `seconds`, and return the summary of the latter."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    load = _Load(host, port, request, clients, warm, seconds)
    for _ in range(clients):
        load.connect()
    await asyncio.wait_for(load.done.wait(), warm + seconds + 120)
    latencies = sorted(load.latencies)
    p50, p99 = (1000 * latencies[int(share * (len(latencies) - 1))] if latencies else 0.0 for share in (0.5, 0.99))
    return {
        "rate": load.rate(),
        "p50": round(p50, 1),
        "p99": round(p99, 1),
        "statuses": dict(load.statuses),
    }


if __name__ == "__main__":
    address, path, body_file, clients, warm, seconds = sys.argv[1:]
    host, _, port = address.partition(":")
    body = Path(body_file).read_bytes()
    result = asyncio.run(send_load(host, int(port), path, body, int(clients), float(warm), float(seconds)))
    print(json.dumps(result))
