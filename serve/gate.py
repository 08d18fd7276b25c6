"""Admission: how much work an ingress holds at once, and who is told to come back later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.config import EndpointLimits
from serve.errors import ApiError

SMOOTHING = 0.05
"""Weight of one request in the running mean of what an item costs."""
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

    How long a new request would wait is judged from those before it: their seconds, divided by the items that were in
    flight when they came. That is Little's law, so it holds for any mix of stages behind the gate, and it adapts: a
    slow machine has a short queue, a fast one a long one. When nothing is in flight, everything is let in.
    """

    def __init__(self, limits: EndpointLimits) -> None:
        self._limits = limits
        self.items = 0
        self.bytes = 0
        self.seconds_per_item = 0.0

    @contextmanager
    def admit(self, seconds: float) -> Iterator[Pass]:
        """Let a request in, as one item, and take it out at the end. `seconds` are until its deadline.

        Raises `ApiError` (overloaded).
        """
        start = time.monotonic()
        held = Pass(start + seconds)
        self.add(held, 1)
        ahead = self.items
        try:
            yield held
            if held.items > 1:  # only requests that did work say what work costs
                cost = (time.monotonic() - start) / max(1, ahead + held.items - 1)
                self.seconds_per_item += SMOOTHING * (cost - self.seconds_per_item)
        finally:
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

    def _refuse(self, why: str) -> ApiError:
        return ApiError("overloaded", f"{why}: try again later", retry_after=self.retry_after())
