"""Admission: how much work an ingress holds at once, and who is told to come back later."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.config import EndpointLimits
from serve.errors import ApiError

MEMORY_SECONDS = 20.0
"""For how much time under work the rate is remembered: several batches of the slowest machine."""
TRUSTED_SECONDS = 5.0
"""After how much time under work the rate is believed. Answers come in bursts, a batch at a time."""
MAX_RETRY_AFTER = 60.0


@dataclass
class Pass:
    """What one request holds. `deadline` is on the clock of `time.monotonic`."""

    deadline: float
    items: int = 0
    bytes: int = 0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class Gate:
    """Counts images, texts and bytes in flight, and refuses what would be too many or would wait too long.

    How long a new request would wait is judged from the rate at which items were done while there were any: time
    without work does not count. So it holds for any mix of stages behind the gate, and it adapts: a slow machine has
    a short queue, a fast one a long one. When nothing is in flight, everything is let in.
    """

    def __init__(self, limits: EndpointLimits) -> None:
        self._limits = limits
        self.items = 0
        self.bytes = 0
        self._working = 0.0
        self._done = 0.0
        self._marked = 0.0

    @property
    def seconds_per_item(self) -> float:
        """What an item costs now, or 0 where that is not known yet."""
        return self._working / self._done if self._done and self._working >= TRUSTED_SECONDS else 0.0

    @contextmanager
    def admit(self, seconds: float) -> Iterator[Pass]:
        """Let a request in, as one item, and take it out at the end. `seconds` are until its deadline.

        Raises `ApiError` (overloaded).
        """
        now = time.monotonic()
        held = Pass(now + seconds)
        if not self.items:
            self._marked = now
        self.add(held, 1)
        done = 0
        try:
            yield held
            done = held.items if held.items > 1 else 0  # a request without images or texts did no work
        finally:
            self._count(done)
            self.items -= held.items
            self.bytes -= held.bytes

    def add(self, held: Pass, items: int) -> None:
        """Let `items` more in for a request that was let in. Raises `ApiError`."""
        wait = self.seconds_per_item * (self.items + items)
        others = self.items - held.items
        if self.items + items > self._limits.in_flight:
            raise self._refuse("the queue is full")
        if others and wait > held.left():
            raise self._refuse(f"the queue is about {wait:.0f} s long, and the deadline is in {held.left():.0f} s")
        self.items += items
        held.items += items

    def add_bytes(self, held: Pass, count: int) -> None:
        """Let in bytes of a body. Raises `ApiError`."""
        if self.bytes + count > self._limits.in_flight_bytes:
            raise self._refuse("too many bytes of requests are in flight")
        self.bytes += count
        held.bytes += count

    def retry_after(self) -> float:
        """Seconds after which about half of what is in flight will be done."""
        return min(MAX_RETRY_AFTER, max(1.0, self.seconds_per_item * self.items / 2))

    def _count(self, done: int) -> None:
        """Add the time since the last count, all of it under work, and the items that were done in it."""
        now = time.monotonic()
        elapsed, self._marked = now - self._marked, now
        fading = math.exp(-elapsed / MEMORY_SECONDS)
        self._working = self._working * fading + elapsed
        self._done = self._done * fading + done

    def _refuse(self, why: str) -> ApiError:
        return ApiError("overloaded", f"{why}: try again later", retry_after=self.retry_after())
