"""A load generator that costs little: raw HTTP/1.1 on kept connections, each sending its next request on an answer.

A connection that the server closes is opened again, as HAProxy's are when it takes a new configuration. If it owed an
answer that is status 0.

    python -m benchmarks.load HOST:PORT PATH BODY_FILE CLIENTS WARM_SECONDS SECONDS

Prints JSON: successes/s, their latencies in milliseconds, and all statuses, counted once the load has run for
WARM_SECONDS: a server of large batches takes some of them until they are full. Real clients cost more, and this
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

RETRY_SECONDS = 0.1
"""After this a connection that was refused is tried again."""


class _Client(asyncio.Protocol):
    """One connection. It parses as much of an answer as it takes to know where it ends."""

    def __init__(self, load: _Load) -> None:
        self.load = load
        self.buffer = bytearray()
        self.sent = 0.0
        self.owed = False

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
        self.owed = False
        self.load.count(int(head[9:12]), time.perf_counter() - self.sent)
        if b"connection: close" in head or time.perf_counter() >= self.load.end:
            self.transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self.owed:
            self.load.count(0, 0.0)
        self.load.connect()

    def _send(self) -> None:
        self.owed = True
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
        self.open = clients
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
        """Successes/s, from the last one before the count to the last one in it.

        A model answers a batch at a time: by the clock a batch more or less would be counted.
        """
        return len(self.latencies) / (self.last - self.first) if self.latencies else 0.0

    def connect(self) -> None:
        """A connection more, in the place of one that was lost, or none when the time is over."""
        if time.perf_counter() >= self.end:
            self.open -= 1
            if not self.open:
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
    """Keep `clients` requests in flight for `warm` and then for `seconds`, and sum those up."""
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
