"""Amounts of work that requests bring, and what one request holds of an ingress's capacity."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

PAIRS_PER_ITEM = 1000
"""Pairs of a response that count as one item: writing a thousand takes about as long as preparing a small image."""


@dataclass
class Load:
    """An amount of work: requests, the images and texts in them, pairs in the response, and bytes.

    A pair is a label or a match with its score. `bytes` are those of the body, of fetched images and of the response.
    """

    requests: int = 0
    images: int = 0
    texts: int = 0
    pairs: int = 0
    bytes: int = 0

    @property
    def items(self) -> int:
        """What `limits.in_flight` and a key's `items_per_minute` count: images, texts, and each thousand of pairs."""
        return self.images + self.texts + self.pairs // PAIRS_PER_ITEM

    def grow(self, more: Load, sign: int = 1) -> None:
        """Add another load, or subtract it with `sign` -1."""
        self.requests += sign * more.requests
        self.images += sign * more.images
        self.texts += sign * more.texts
        self.pairs += sign * more.pairs
        self.bytes += sign * more.bytes


@dataclass
class Permit:
    """One admitted request: its deadline on the clock of `time.monotonic`, its key, and the load that it holds.

    Requests without a key (None), which no other key competes with, may hold the whole capacity together.
    """

    deadline: float
    key: str | None = None
    load: Load = field(default_factory=Load)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()
