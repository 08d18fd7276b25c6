"""Attempts at an operation of an object store, with pauses between them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from storage.store import Unreachable

PAUSE_SECONDS = 0.5
T = TypeVar("T")


def retry(once: Callable[[], T], attempts: int) -> T:
    """Return what `once` returns. While it raises `Unreachable`, it is called up to `attempts` times in all."""
    for attempt in range(attempts):
        try:
            return once()
        except Unreachable:
            if attempt == attempts - 1:
                raise
        pause(attempt)
    raise AssertionError("not reached")


def pause(attempt: int) -> None:
    """Wait before the next attempt. Random, so that clients that were refused together do not retry together."""
    time.sleep(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
