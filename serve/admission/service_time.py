"""The service time of a stage: seconds per item while the stage is saturated."""

from __future__ import annotations

import time
from collections import deque

BATCHES = 32
"""Batches that the mean is taken over."""


class ServiceTime:
    """Measures the mean seconds per item of one stage, over its last `BATCHES` batches.

    The stage calls `begin` and `end` for each batch. Batches may overlap: time in which several run counts once, and
    time in which none runs does not count. Batches behind which nothing waited are ignored unless they lower the mean:
    an item of a small batch costs more than an item of a full batch. They may lower it because otherwise one slow
    start would make admission refuse everything: then nothing would ever wait, and the mean could never change.
    """

    def __init__(self) -> None:
        self._running = 0
        self._marked = 0.0
        self._mean: float | None = None
        self._batches: deque[tuple[float, int]] = deque(maxlen=BATCHES)  # seconds and items of each

    @property
    def seconds_per_item(self) -> float:
        """The mean, or 0 while it is not known. It is added up once for each batch: admission reads it often."""
        if self._mean is None:
            items = sum(items for _, items in self._batches)
            self._mean = sum(seconds for seconds, _ in self._batches) / items if items else 0.0
        return self._mean

    def forget(self) -> None:
        """Discard all measurements, such as those of a stage that was just started."""
        self._batches.clear()
        self._mean = None

    def begin(self) -> None:
        """A batch starts."""
        if not self._running:
            self._marked = time.monotonic()
        self._running += 1

    def end(self, items: int, saturated: bool) -> None:
        """A batch ends, with `items` done; `saturated` tells whether it was full or other items waited."""
        self._running -= 1
        now = time.monotonic()
        seconds, self._marked = now - self._marked, now
        if saturated or seconds < items * self.seconds_per_item:
            self._batches.append((seconds, items))
            self._mean = None
