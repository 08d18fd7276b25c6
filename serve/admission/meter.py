"""How long an item of work takes."""

from __future__ import annotations

import math
import time

MEMORY_SECONDS = 20.0
"""For how much time under work the rate is remembered: several batches of the slowest machine."""
TRUSTED_SECONDS = 5.0
"""After how much time under work the rate is believed. Answers come in bursts, a batch at a time."""


class Meter:
    """Seconds that a stage takes for an item, while it has as much as it can take.

    Told of each batch when it begins and ends. Time in which nothing ran does not count, whatever clients do
    meanwhile; nor do batches behind which nothing waited, because a small batch's items are dearer than a full one's,
    unless they were cheaper than what is believed: else one slow start would be believed for ever, since who believes
    it lets nothing in that could wait.
    It does not know items apart: it is told of those of one stage.
    """

    def __init__(self) -> None:
        self._running = 0
        self._marked = 0.0
        self._working = 0.0
        self._done = 0.0

    @property
    def seconds_per_item(self) -> float:
        """What an item costs now, or 0 where that is not known yet."""
        return self._working / self._done if self._done and self._working >= TRUSTED_SECONDS else 0.0

    def forget(self) -> None:
        """Know nothing: what was done until now says nothing of what is to come."""
        self._working = self._done = 0.0

    def begin(self) -> None:
        """A batch starts."""
        if not self._running:
            self._marked = time.monotonic()
        self._running += 1

    def end(self, done: int, loaded: bool) -> None:
        """A batch is over, with so many items `done`; `loaded` says whether others waited meanwhile."""
        self._running -= 1
        now = time.monotonic()
        elapsed, self._marked = now - self._marked, now
        if loaded or elapsed < done * self.seconds_per_item:
            fading = math.exp(-elapsed / MEMORY_SECONDS)
            self._working = self._working * fading + elapsed
            self._done = self._done * fading + done
